"""`dsa-eval bench kernels|attention`: the kernels' own benchmarks, with their refusals as errors of this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.errors import ModelError


def bench_kernels(only: str, rounds: int, out: Path | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Test the kernels, then time every case whose name contains a part of `only`; see `kernels.bench.bench_kernels`.

    Raises ModelError: no GPU, no such case, or a test fails.
    """
    from kernels.bench import bench_kernels as measure

    try:
        return measure(only, rounds, out=out, tell=tell)
    except ValueError as error:
        raise ModelError(str(error)) from None


def bench_attention(only: str, rounds: int, out: Path | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """The same for the whole attention step; see `kernels.bench_step.bench_attention`."""
    from kernels.bench_step import bench_attention as measure

    try:
        return measure(only, rounds, out=out, tell=tell)
    except ValueError as error:
        raise ModelError(str(error)) from None

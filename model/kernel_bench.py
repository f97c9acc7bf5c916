"""`dsa-eval bench kernels`: the kernels' own benchmark, with its refusals as errors of this package."""

from typing import Any

from model.errors import ModelError


def bench_kernels(only: str, rounds: int) -> dict[str, Any]:
    """Test the kernels, then time every case whose name contains `only`; see `kernels.bench.bench_kernels`.

    Raises ModelError: no GPU, no such case, or a test fails.
    """
    from kernels.bench import bench_kernels as measure

    try:
        return measure(only, rounds)
    except ValueError as error:
        raise ModelError(str(error)) from None

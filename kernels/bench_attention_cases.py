"""The attention kernels' cases for `dsa-eval bench kernels`."""

from collections.abc import Iterator
from typing import Any

from kernels.bench_attention import cases as attention_cases

TESTS = ["tests/gpu/test_attention_kernels.py"]


def cases() -> Iterator[Any]:
    """One `kernels.bench.Case` for each case of `bench_attention`."""
    from kernels.bench import Case

    for case in attention_cases():
        shape = " ".join(f"{axis}={size}" for axis, size in case["shape"].items())
        shape += f" design: {case['design']}" if case["design"] else ""
        yield Case(
            kernel=case["kernel"], shape=f"{case['dtype']} {shape}", prepare=case["build"], flops=case["flops"],
            num_bytes=case["bytes"], peer_ms=case["peers"],
        )  # fmt: skip

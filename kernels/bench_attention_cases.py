"""The attention kernels' cases for `dsa-eval bench kernels`."""

from collections.abc import Iterator
from typing import Any

from kernels.bench_attention import cases as attention_cases
from kernels.bench_case import Case

TESTS = ("tests/gpu/test_attention_kernels.py",)
EDGES = "same_bits or persistently or two_to_the_31 or outside_the_cache"
# pytest's -k expression of each kernel's tests
TESTED_BY = {
    "sparse_prefill_hopper": f"full_width_prefill or public_functions or {EDGES}",
    "sparse_prefill_triton": f"full_width_prefill or other_widths or public_functions or {EDGES}",
    "sparse_decode": f"decode_splits or fp8_rows or captured_graph or {EDGES}",
    "dense_decode": "dense_decode or captured_graph",
    "dense_prefill_cudnn": "dense_prefill",
    "dense_prefill_triton": "dense_prefill or masked_attention",
    "masked_prefill": "masked_attention",
}


def cases() -> Iterator[Case]:
    """One `Case` for each case of `bench_attention`; they have no FP8 products."""
    for case in attention_cases():
        axes: dict[str, Any] = case["shape"]
        panel, series = _place(case["kernel"], axes, case["dtype"])
        yield Case(
            kernel=case["kernel"], shape=" ".join([case["dtype"], *(f"{axis}={size}" for axis, size in axes.items())]),
            prepare=case["build"], flops=case["flops"], num_bytes=case["bytes"], peer_ms=case["peers"],
            tests=TESTED_BY[case["kernel"]], panel=panel, series=series, context=axes["keys"],
        )  # fmt: skip


def _place(kernel: str, axes: dict[str, Any], dtype: str) -> tuple[str, str]:
    """The plot's panel and the series in it; ("", "") for what is no line over contexts."""
    if "batch" in axes:
        return (f"{kernel}, batch {axes['batch']}", dtype) if axes["batch"] in (1, 64) else ("", "")
    if kernel == "masked_prefill" or axes["queries"] < 4096:
        return "", ""
    phase, _, backend = kernel.rpartition("_")
    return f"{phase}, {axes['queries']:,} queries", backend

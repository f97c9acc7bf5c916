"""The attention kernels' cases for `dsa-eval bench kernels`."""

from collections.abc import Iterator
from typing import Any

from kernels.bench_attention import cases as attention_cases
from kernels.bench_case import Case

TESTS = ("tests/gpu/test_attention_kernels.py", "tests/gpu/test_mha_kernels.py")
EDGES = "same_bits or persistently or two_to_the_31 or outside_the_cache"
HOPPER_TFLOPS = {8192: 500.0, 32768: 490.0, 131072: 450.0}  # the first bar, by context
# pytest's -k expression of each kernel's tests
TESTED_BY = {
    "sparse_prefill_hopper": f"full_width_prefill or public_functions or {EDGES}",
    "sparse_prefill_triton": f"full_width_prefill or other_widths or public_functions or {EDGES}",
    "sparse_decode": f"decode_splits or fp8_rows or captured_graph or {EDGES}",
    "dense_decode": "dense_decode or captured_graph",
    "dense_prefill_cudnn": "dense_prefill",
    "dense_prefill_hopper": "dense_prefill or mha_on_hopper",
    "dense_prefill_triton": "dense_prefill or masked_attention",
    "masked_prefill": "masked_attention or mha_on_hopper or under_a_mask",
}


def cases() -> Iterator[Case]:
    """One `Case` for each case of `bench_attention`; they have no FP8 products."""
    for case in attention_cases():
        axes: dict[str, Any] = case["shape"]
        # designs are compared in the table, the plot shows the default
        panel, series = ("", "") if case["design"] else _place(case["kernel"], axes, case["dtype"])
        shape = " ".join([case["dtype"], *(f"{axis}={size}" for axis, size in axes.items())])
        yield Case(
            kernel=case["kernel"], shape=shape + (f" design: {case['design']}" if case["design"] else ""),
            prepare=case["build"], flops=case["flops"], num_bytes=case["bytes"], peer_ms=case["peers"],
            **_aims(case), tests=TESTED_BY[case["kernel"]], panel=panel, series=series, context=axes["keys"],
        )  # fmt: skip


def _aims(case: dict[str, Any]) -> dict[str, float | None]:
    """What the first version must reach on an H100, and what we aim at: the peer that reads the same cache."""
    kernel, axes, flops = case["kernel"], case["shape"], case["flops"]
    bar, goal = None, None
    if kernel == "sparse_prefill_hopper":
        rate = HOPPER_TFLOPS.get(axes["keys"]) if axes["queries"] == 4096 else None
        bar, goal = rate and flops / rate / 1e9, case["peers"]["FlashMLA"]
    elif kernel == "sparse_prefill_triton":
        bar = flops / 290e9
    elif kernel == "sparse_decode":
        peer = min(case["peers"].values())
        bar, goal = 2.0 * peer, 1.1 * peer
    elif kernel in ("dense_prefill_cudnn", "dense_prefill_hopper"):
        bar, goal = flops / 550e9, case["peers"]["FA3"]
    elif kernel == "dense_decode":
        bar = case["bytes"] / 1.5e9 if axes["batch"] == 64 and case["dtype"] == "bfloat16" else None
        goal = case["peers"]["FlashMLA fp8" if case["dtype"] == "fp8" else "FlashMLA bf16"]
    return {"bar_ms": bar, "goal_ms": goal}


def _place(kernel: str, axes: dict[str, Any], dtype: str) -> tuple[str, str]:
    """The plot's panel and the series in it; ("", "") for what is no line over contexts."""
    if "batch" in axes:
        return (f"{kernel}, batch {axes['batch']}", dtype) if axes["batch"] in (1, 64) else ("", "")
    if kernel == "masked_prefill" or axes["queries"] < 4096:
        return "", ""
    phase, _, backend = kernel.rpartition("_")
    return f"{phase}, {axes['queries']:,} queries", backend

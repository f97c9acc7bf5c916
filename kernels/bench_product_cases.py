"""Cases of `dsa-eval bench kernels`: FP8 rounding, products and experts at DeepSeek-V3.2's shapes, in every design."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kernels.bench_case import Case, graphed
from kernels.bench_selection_cases import BF16, random_e4m3
from kernels.expert_mlp_triton import expert_mlp_triton
from kernels.fp8 import block_matmul, quantize_e4m3
from kernels.grouped_gemm import expert_mlp
from kernels.grouped_gemm_triton import DESIGN, DESIGNS, block_matmul_triton

TESTS = ("tests/gpu/test_products.py",)
# rows, weight rows, width: q_b and o of a chunk; o, q_a and kv_a of 64 sequences in decode
PROJECTIONS = ((4096, 24576, 1536), (4096, 7168, 16384), (64, 7168, 16384), (64, 1536, 7168), (64, 576, 7168))
CUBLAS_MS = {8192: 0.774}  # scales by row, the kernel study's


def cases() -> Iterator[Case]:
    """All cases, most important first; the design in use without a name, the others by theirs."""
    n = 8192
    shape = f"block matmul {n} x {n} x {n}"
    peers: dict[str, Any] = {
        "peer_ms": {"cuBLAS rowwise": CUBLAS_MS[n]}, "bar_ms": CUBLAS_MS[n] / 0.7, "goal_ms": CUBLAS_MS[n] / 0.85,
        "fp8_flops": 2.0 * n**3, "tests": "block_matmul",
    }  # fmt: skip
    yield Case(kernel="fp8", shape=shape, prepare=blocks(n, n, n), flops=2.0 * n**3, **peers)
    yield Case(
        kernel="fp8",
        shape=f"cuBLAS rowwise matmul {n} x {n} x {n}",
        prepare=cublas(n),
        flops=2.0 * n**3,
        fp8_flops=2.0 * n**3,
        tests="block_matmul",
    )
    for name in other_designs():
        yield Case(kernel="fp8", shape=f"{shape}, {name}", prepare=blocks(n, n, n, name), flops=2.0 * n**3, **peers)
    for rows, width, d in PROJECTIONS:
        for name in (None, *other_designs()):
            yield Case(
                kernel="fp8", shape=f"block matmul {rows} x {width} x {d}" + (f", {name}" if name else ""),
                prepare=blocks(rows, width, d, name), flops=2.0 * rows * width * d,
                fp8_flops=2.0 * rows * width * d, num_bytes=1.0 * d * (width + rows),
                tests="block_matmul",
            )  # fmt: skip
    yield Case(
        kernel="fp8",
        shape=f"cast [{n}, 7168] bf16",
        prepare=cast(n, 7168),
        num_bytes=n * 7168 * (3 + 4 / 128),
        tests="fp8_rounding",
    )
    for rows in (64, 4096, 16384):
        hit = 256 * (1 - (1 - 8 / 256) ** rows)  # experts that a row chooses, on average
        for name in (None, *(name for name in other_designs() if not DESIGNS[name].narrow)):
            yield Case(
                kernel="expert_mlp",
                shape=f"fp8, {rows} rows x 8 of 256 experts, 7168 x 2048" + (f", {name}" if name else ""),
                prepare=experts(rows, name), flops=2.0 * rows * 8 * 3 * 7168 * 2048,
                fp8_flops=2.0 * rows * 8 * 3 * 7168 * 2048,
                num_bytes=3.0 * 7168 * 2048 * hit, tests="expert or grouped or graph or swiglu",
            )  # fmt: skip


def other_designs() -> list[str]:
    return [name for name in DESIGNS if name not in (DESIGN, "hopper_narrow")]  # that is two others


def cast(rows: int, width: int) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        x = torch.randn(rows, width, device="cuda").to(BF16)
        return lambda: quantize_e4m3(x)

    return prepare


def blocks(rows: int, n: int, d: int, design: str | None = None) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        x, weight, groups = random_e4m3(rows, d), random_e4m3(n, d), d // 128
        x_scale, scale = torch.rand(rows, groups, device="cuda"), torch.rand(-(-n // 128), groups, device="cuda")
        call = (lambda: block_matmul(x, x_scale, weight, scale)) if design is None else partial(
            block_matmul_triton, x, x_scale, weight, scale, BF16, design
        )  # fmt: skip
        return graphed(call) if rows <= 64 else call

    return prepare


def cublas(n: int) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        x, weight = random_e4m3(n, n), random_e4m3(n, n).T
        ones = torch.ones(n, 1, device="cuda")
        return lambda: torch._scaled_mm(x, weight, scale_a=ones, scale_b=ones.T, out_dtype=BF16, use_fast_accum=False)

    return prepare


def experts(rows: int, design: str | None = None) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        gate_up, down = random_e4m3(256, 4096, 7168), random_e4m3(256, 7168, 2048)
        scales = (torch.rand(256, 32, 56, device="cuda") / 1e3, torch.rand(256, 56, 16, device="cuda") / 1e3)
        x, weights = torch.randn(rows, 7168, device="cuda").to(BF16), torch.rand(rows, 8, device="cuda")
        chosen = torch.rand(rows, 256, device="cuda").argsort(1)[:, :8].contiguous()
        if design is None:
            return lambda: expert_mlp(x, gate_up, down, chosen, weights, scales)
        return lambda: expert_mlp_triton(x, gate_up, down, chosen, weights, scales, design)

    return prepare

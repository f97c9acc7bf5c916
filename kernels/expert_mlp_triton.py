"""SwiGLU experts on a GPU: two grouped products, between them SwiGLU and rounding in one pass, behind them one sum."""

import torch
import triton
import triton.language as tl

from kernels.fp8 import AMAX_FLOOR, E4M3_MAX, GROUP, quantize_e4m3
from kernels.grouped_gemm_triton import DESIGN, DESIGNS, Groups, usable_design

SWIGLU_ROWS, COMBINE_COLS = 32, 1024  # of a program


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    both_ptr, hidden_ptr, scale_ptr, num_rows, floor, largest,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, QUANTIZED: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows of one group of columns
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    col = group * GROUP + tl.arange(0, GROUP)
    inside = (row < num_rows)[:, None] & (col < WIDTH)[None, :]
    rows = row.to(tl.int64)
    gates = both_ptr + rows[:, None] * (2 * WIDTH) + col[None, :]
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + WIDTH, mask=inside, other=0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    if QUANTIZED:
        if BFLOAT16:  # what is rounded to FP8 is the hidden value in the model's own dtype
            hidden = hidden.to(tl.bfloat16).to(tl.float32)
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(hidden), axis=1), floor), tl.full((ROWS,), largest, tl.float32))
        bits = scale.to(tl.int32, bitcast=True)  # up to the next power of two
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        hidden = tl.div_rn(hidden, tl.broadcast_to(scale[:, None], (ROWS, GROUP)))
        hidden = tl.minimum(tl.maximum(hidden, -largest), largest)
        num_groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
        tl.store(scale_ptr + rows * num_groups + group, scale, mask=row < num_rows)
    tl.store(hidden_ptr + rows[:, None] * WIDTH + col[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    y_ptr, place_ptr, weight_ptr, out_ptr, weight_row_stride, weight_col_stride,
    WIDTH: tl.constexpr, CHOICES: tl.constexpr, BLOCK_A: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # one program: COLS columns of one row; places ascend with the number of the expert, so they give the order of sums
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    choice = tl.arange(0, BLOCK_A)
    real = choice < CHOICES
    place = tl.load(place_ptr + row * CHOICES + choice, mask=real, other=0)
    weight = tl.load(weight_ptr + row * weight_row_stride + choice * weight_col_stride, mask=real, other=0.0)
    rank = tl.sum((real[None, :] & (place[None, :] < place[:, None])).to(tl.int32), axis=1)
    total = tl.zeros((COLS,), tl.float32)
    for i in tl.static_range(CHOICES):
        mine = real & (rank == i)
        source = tl.sum(tl.where(mine, place, 0), axis=0)
        factor = tl.sum(tl.where(mine, weight, 0.0), axis=0)
        total += tl.load(y_ptr + source * WIDTH + col, mask=col < WIDTH, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + row * WIDTH + col, total, mask=col < WIDTH)


def swiglu(both: torch.Tensor, dtype: torch.dtype, *, quantized: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu(gate) * up of both [n, 2 * f] -> [n, f] in dtype, or rounded to it and then to e4m3 with its scales."""
    n, f = both.shape[0], both.shape[1] // 2
    groups = triton.cdiv(f, GROUP)
    hidden = torch.empty(n, f, dtype=torch.float8_e4m3fn if quantized else dtype, device=both.device)
    scales = torch.empty(n, groups, dtype=torch.float32, device=both.device) if quantized else None
    swiglu_kernel[(triton.cdiv(n, SWIGLU_ROWS), groups)](
        both, hidden, hidden if scales is None else scales, n, AMAX_FLOOR, E4M3_MAX,
        WIDTH=f, GROUP=GROUP, ROWS=SWIGLU_ROWS, QUANTIZED=quantized, BFLOAT16=dtype == torch.bfloat16, num_warps=4,
    )  # fmt: skip
    return hidden, scales


def combine(y: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sorted rows y [s * a, d] times their weights [s, a], summed by row in ascending order of expert: [s, d] float32.

    place: [s * a] int64, where each row's choices stand in y; places ascend with experts.
    """
    s, a = weights.shape
    out = torch.empty(s, y.shape[1], dtype=torch.float32, device=y.device)
    combine_kernel[(s, triton.cdiv(y.shape[1], COMBINE_COLS))](
        y, place, weights, out, *weights.stride(),
        WIDTH=y.shape[1], CHOICES=a, BLOCK_A=triton.next_power_of_2(a), COLS=COMBINE_COLS, num_warps=4,
    )  # fmt: skip
    return out


def expert_mlp_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    design: str | None = None,
) -> torch.Tensor:
    """As `kernels.grouped_gemm.expert_mlp`, for checked arguments; design: of FP8 products, None is the one in use."""
    if experts.numel() == 0:
        return torch.zeros(x.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
    if scales is None:
        groups = Groups(experts, gate_up.shape[0])
        both = groups.matmul(x, gate_up, x.dtype, gather=True)
        hidden, _ = swiglu(both, x.dtype, quantized=False)
        y = groups.matmul(hidden, down, x.dtype, gather=False)
        return combine(y, groups.place, weights)
    values, x_scale = quantize_e4m3(x)
    first = usable_design(design or DESIGN, values, gate_up, x.dtype)
    groups = Groups(experts, gate_up.shape[0], DESIGNS[first].few_rows)
    both = groups.matmul(values, gate_up, x.dtype, (x_scale, scales[0]), gather=True, design=first)
    hidden, hidden_scale = swiglu(both, x.dtype, quantized=True)
    second = usable_design(design or DESIGN, hidden, down, x.dtype)
    y = groups.matmul(hidden, down, x.dtype, (hidden_scale, scales[1]), gather=False, design=second)
    return combine(y, groups.place, weights)

"""Rounding to e4m3 on a GPU: one read, one write, the same bits as `kernels.fp8.quantize_e4m3`."""

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of a program


@triton.jit(do_not_specialize=["num_rows"])
def quantize_kernel(
    x_ptr, values_ptr, scales_ptr, num_rows, x_stride, floor, largest,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows of one group
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    place = tl.arange(0, BLOCK)
    col = group * GROUP + place
    inside = (row < num_rows)[:, None] & ((place < GROUP) & (col < WIDTH))[None, :]
    rows = row.to(tl.int64)
    x = tl.load(x_ptr + rows[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=1), floor), tl.full((ROWS,), largest, tl.float32))
    if POWER_OF_TWO:  # the exponent field, one up if any bit of the mantissa is set
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, BLOCK)))
    rounded = tl.minimum(tl.maximum(scaled, -largest), largest).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + rows[:, None] * WIDTH + col[None, :], rounded, mask=inside)
    num_groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    tl.store(scales_ptr + rows * num_groups + group, scale, mask=row < num_rows)


def quantize_triton(
    x: torch.Tensor, group: int, power_of_two: bool, floor: float, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.fp8.quantize_e4m3`; x is copied first unless its rows are evenly spaced and packed."""
    d = x.shape[-1]
    rows = x.reshape(-1, d)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    groups = triton.cdiv(d, group)
    values = torch.empty(*x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(*x.shape[:-1], groups, dtype=torch.float32, device=x.device)
    if rows.numel() == 0:
        return values, scales
    block = triton.next_power_of_2(group)
    rows_a_program = max(1, ELEMENTS // block)
    quantize_kernel[(triton.cdiv(rows.shape[0], rows_a_program), groups)](
        rows, values, scales, rows.shape[0], rows.stride(0), floor, largest,
        WIDTH=d, GROUP=group, BLOCK=block, ROWS=rows_a_program, POWER_OF_TWO=power_of_two, num_warps=4,
    )  # fmt: skip
    return values, scales

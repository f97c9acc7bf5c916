"""RMSNorm on a GPU: a row is in registers between its one read and its one write."""

import torch
import triton
import triton.language as tl

ELEMENTS = 2048  # of a program, or one row


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, num_rows, x_stride, x_head_stride, out_stride, out_head_stride, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows, each one head of one token
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token, head = row // HEADS, row % HEADS
    col = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (col < WIDTH)[None, :]
    # strides are counted in units of 16 bytes: what a thread holds of a row, and with it the order of its sum, must not
    # depend on which multiples of them the compiler knows of
    places = (token * x_stride + head * x_head_stride)[:, None] * UNIT + col[None, :]
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < WIDTH, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    y = x * factor[:, None] * weight[None, :]
    places = (token * out_stride + head * out_head_stride)[:, None] * UNIT + col[None, :]
    tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """As `kernels.rms_norm.rms_norm`, for checked arguments; fills out, which may be x."""
    if x.numel() == 0:
        return
    if x.dim() == 2:
        x, out = x[:, None], out[:, None]
    n, h, d = x.shape
    block = triton.next_power_of_2(d)
    rows = max(1, ELEMENTS // block)
    strides = (x.stride(0), x.stride(1), out.stride(0), out.stride(1))
    unit = 16 // x.element_size()
    if any(stride % unit for stride in strides):
        unit = 1
    rms_norm_kernel[(triton.cdiv(n * h, rows),)](
        x, weight, out, n * h, *(stride // unit for stride in strides), eps,
        HEADS=h, WIDTH=d, BLOCK=block, ROWS=rows, UNIT=unit, num_warps=8 if block > 2048 else 4,
    )  # fmt: skip

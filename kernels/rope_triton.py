"""Rotary position embedding in place, and rows laid into a slice of wider ones, on a GPU."""

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of a program


@triton.jit(do_not_specialize=["num_rows"])
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, num_rows, x_stride, head_stride,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows, each one head of one token
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = row // HEADS
    x_row = (x_ptr + token * x_stride + (row % HEADS) * head_stride)[:, None]
    dtype = x_ptr.dtype.element_ty
    if INTERLEAVED:  # both of a pair in one thread: loads and stores are of whole rows
        both = tl.arange(0, 2 * BLOCK)[None, :]
        mask = (row < num_rows)[:, None] & (both < 2 * PAIRS)
        a, b = tl.split(tl.reshape(tl.load(x_row + both, mask=mask, other=0.0), (ROWS, BLOCK, 2)))
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (pair < PAIRS)
    table = token[:, None] * PAIRS + pair
    cos = tl.load(cos_ptr + table, mask=inside, other=1.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
    if INTERLEAVED:
        a, b = a.to(tl.float32), b.to(tl.float32)
        turned = tl.join((a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype))
        tl.store(x_row + both, tl.reshape(turned, (ROWS, 2 * BLOCK)), mask=mask)
    else:
        a = tl.load(x_row + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_row + PAIRS + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_row + pair, (a * cos - b * sin).to(dtype), mask=inside)
        tl.store(x_row + PAIRS + pair, (b * cos + a * sin).to(dtype), mask=inside)


def rotate_triton(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
    """As `kernels.rope.rotate_`, for checked arguments."""
    n, h, d = x.shape
    if x.numel() == 0:
        return
    block = triton.next_power_of_2(d // 2)
    rows = max(1, ELEMENTS // (2 * block))
    rotate_kernel[(triton.cdiv(n * h, rows),)](
        x, cos.contiguous(), sin.contiguous(), n * h, x.stride(0), x.stride(1),
        HEADS=h, PAIRS=d // 2, INTERLEAVED=interleaved, BLOCK=block, ROWS=rows, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def lay_kernel(
    rows_ptr, out_ptr, num_rows, row_stride, row_head_stride, out_stride, out_head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows, each one head of one token
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token, head = row // HEADS, row % HEADS
    dim = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (dim < DIM)
    x = tl.load(rows_ptr + (token * row_stride + head * row_head_stride)[:, None] + dim, mask=inside, other=0.0)
    tl.store(out_ptr + (token * out_stride + head * out_head_stride)[:, None] + dim, x, mask=inside)


def lay_triton(rows: torch.Tensor, out: torch.Tensor) -> None:
    """As `kernels.rope.lay_rows`, for checked arguments."""
    n, h, d = out.shape
    if out.numel() == 0:
        return
    block = triton.next_power_of_2(d)
    height = max(1, ELEMENTS // block)
    lay_kernel[(triton.cdiv(n * h, height),)](
        rows, out, n * h, rows.stride(0), rows.stride(1), out.stride(0), out.stride(1),
        HEADS=h, DIM=d, BLOCK=block, ROWS=height, num_warps=4,
    )  # fmt: skip

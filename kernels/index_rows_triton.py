"""Index queries and keys on a GPU: one read of the projected rows, one write of what the score kernels take."""

import torch
import triton
import triton.language as tl

from kernels.fp8 import AMAX_FLOOR, E4M3_MAX
from kernels.index_rows import IndexDtype, IndexNorm, IndexRope
from kernels.index_scores_paged import PAGE

ROWS = 64  # of a program, whatever the batch: the rotation's sums never change


@triton.jit(do_not_specialize=["num_rows"])
def index_rows_kernel(
    x_ptr, cos_ptr, sin_ptr, norm_weight_ptr, norm_bias_ptr, weights_ptr, slots_ptr, values_ptr, scales_ptr,
    num_rows, x_stride, head_stride, page_stride, eps, floor, largest,
    HEADS: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
    FP8: tl.constexpr, WEIGHTED: tl.constexpr, PAGE: tl.constexpr, ROUNDED: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows, each one head of one token
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    real = row < num_rows
    inside = real[:, None] & (dim < DIM)[None, :]
    rows = row.to(tl.int64)
    token = rows // HEADS
    x_row = x_ptr + token * x_stride + (rows % HEADS) * head_stride
    x = tl.load(x_row[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        mean = tl.sum(x, axis=1) / DIM
        spread = tl.where(inside, x - mean[:, None], 0.0)
        factor = tl.rsqrt(tl.sum(spread * spread, axis=1) / DIM + eps)
        norm_weight = tl.load(norm_weight_ptr + dim, mask=dim < DIM, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + dim, mask=dim < DIM, other=0.0).to(tl.float32)
        x = spread * factor[:, None] * norm_weight[None, :] + norm_bias[None, :]
    if ROPE > 0:
        half: tl.constexpr = ROPE // 2
        turned = dim < ROPE
        if INTERLEAVED:
            pair, first = dim // 2, dim % 2 == 0
            other = dim ^ 1
        else:
            pair, first = dim % half, dim < half
            other = tl.where(first, dim + half, dim - half)
        in_rope = real[:, None] & turned[None, :]
        y = tl.load(x_row[:, None] + other[None, :], mask=in_rope, other=0.0).to(tl.float32)  # each dim's partner
        if NORMED:
            weight = tl.load(norm_weight_ptr + other, mask=turned, other=0.0).to(tl.float32)
            bias = tl.load(norm_bias_ptr + other, mask=turned, other=0.0).to(tl.float32)
            y = (y - mean[:, None]) * factor[:, None] * weight[None, :] + bias[None, :]
        table = token[:, None] * half + pair[None, :]
        cos = tl.load(cos_ptr + table, mask=in_rope, other=1.0)
        sin = tl.load(sin_ptr + table, mask=in_rope, other=0.0)
        x = tl.where(turned[None, :], x * cos + y * tl.where(first[None, :], -sin, sin), x)
    if FP8:
        both = dim[:, None] & dim[None, :]
        odd = (0x6996 >> ((both ^ (both >> 4)) & 15)) & 1  # parity of up to 8 bits: where Sylvester's matrix has -1
        matrix = tl.where(odd == 1, -1.0, 1.0).to(ROUNDED)
        x = tl.dot(x.to(ROUNDED), matrix, input_precision="ieee") * SCALE
        x = x.to(ROUNDED).to(tl.float32)
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=1), floor), tl.full((ROWS,), largest, tl.float32))
        bits = scale.to(tl.int32, bitcast=True)  # up to the next power of two
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, BLOCK_D)))
        x = tl.minimum(tl.maximum(x, -largest), largest)
    place, scale_place = rows * DIM, rows
    if PAGE > 0:
        slot = tl.load(slots_ptr + rows, mask=real, other=0)
        place = slot // PAGE * page_stride + slot % PAGE * DIM
        scale_place = slot // PAGE * (page_stride // 4) + slot % PAGE
    tl.store(values_ptr + place[:, None] + dim[None, :], x.to(values_ptr.dtype.element_ty), mask=inside)
    if FP8:
        if WEIGHTED:
            scale *= tl.load(weights_ptr + rows, mask=real, other=0.0)
        tl.store(scales_ptr + scale_place, scale, mask=real)


def index_rows_triton(
    x: torch.Tensor,
    rope: IndexRope,
    dtype: IndexDtype,
    norm: IndexNorm | None,
    weights: torch.Tensor | None,
    target: tuple[torch.Tensor, torch.Tensor] | None = None,
    rounded: tl.dtype = tl.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Checked rows [n, h, d] -> values [n, h, d] and for FP8 scales [n, h], times `weights` [n, h] where given.

    target: pages and slots to write to instead, as `kernels.index_rows.write_index_keys`. rounded: what the rotation
    takes and gives; the interpreter cannot multiply bfloat16.
    """
    n, h, d = x.shape
    fp8 = dtype == "fp8"
    kind = {"fp8": torch.float8_e4m3fn, "bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    page_stride, slots = 0, x
    scales: torch.Tensor | None = None
    if target is None:
        values = torch.empty(n, h, d, dtype=kind, device=x.device)
        scales = torch.empty(n, h, dtype=torch.float32, device=x.device) if fp8 else None
    else:
        pages, slots = target
        values, page_stride = pages.view(kind).flatten(1), pages.stride(0)
        scales = pages[:, PAGE * d :].view(torch.float32) if fp8 else None
    if x.numel() == 0:
        return values, scales
    index_rows_kernel[(triton.cdiv(n * h, ROWS),)](
        x, rope.cos.contiguous(), rope.sin.contiguous(),
        x if norm is None else norm.weight, x if norm is None else norm.bias,
        x if weights is None else weights, slots, values, x if scales is None else scales,
        n * h, x.stride(0), x.stride(1), page_stride, 0.0 if norm is None else norm.eps, AMAX_FLOOR, E4M3_MAX,
        HEADS=h, DIM=d, ROPE=rope.dim, INTERLEAVED=rope.interleaved, NORMED=norm is not None, FP8=fp8,
        WEIGHTED=weights is not None, PAGE=0 if target is None else PAGE, ROUNDED=rounded, SCALE=d**-0.5,
        BLOCK_D=max(16, triton.next_power_of_2(d)), ROWS=ROWS, num_warps=8,
    )  # fmt: skip
    return values, scales

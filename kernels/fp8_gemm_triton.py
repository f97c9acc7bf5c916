"""FP8 products with block scales by TMA loads, in plain Triton: tiles of 64 or 128 rows x 128 or 256 weight rows.

256 weight rows are two products of 128, one after the other, each with sums of its own: a stage of x serves both, so a
third of the bytes between L2 and the multiprocessors is saved against tiles of 128 x 128.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 128  # weight rows and columns that share a scale
BAND = 16  # tiles of rows that programs running side by side share: both operands stay in L2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Weight rows of a tile in blocks of 128; stages are 128 columns deep."""

    blocks: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


SHAPES = {
    "tma": Shape(blocks=1, num_warps=8, num_stages=3, maxnreg=128),
    "tma_wide": Shape(blocks=2, num_warps=8, num_stages=4),
}


@triton.jit(do_not_specialize=["tiles_m", "num_rows", "num_groups"])
def fp8_gemm_kernel(
    x_desc, w_desc, x_scale_ptr, w_scale_ptr, tile_group_ptr, tile_first_ptr, group_end_ptr, out_ptr,
    tiles_m, num_rows, num_groups,
    N: tl.constexpr, K: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (N + BLOCKS * BLOCK - 1) // (BLOCKS * BLOCK)
    steps: tl.constexpr = (K + BLOCK - 1) // BLOCK
    blocks_n: tl.constexpr = (N + BLOCK - 1) // BLOCK
    tile = tl.program_id(0)
    group, end = 0, num_rows
    if GROUPED:
        tile_n = tile % tiles_n
        group = tl.load(tile_group_ptr + tile // tiles_n).to(tl.int32)
        if group >= num_groups:  # the grid is as large as it may have to be
            return
        first = tl.load(tile_first_ptr + tile // tiles_n).to(tl.int32)
        end = tl.load(group_end_ptr + group).to(tl.int32)
    else:
        band = tile // (BAND * tiles_n)
        height = tl.minimum(tiles_m - band * BAND, BAND)
        rest = tile % (BAND * tiles_n)
        tile_n = rest // height
        first = (band * BAND + rest % height) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    x_scale_ptr += tl.minimum(row, num_rows - 1).to(tl.int64) * steps
    block = tile_n * BLOCKS
    near_scale_ptr = w_scale_ptr + (group * blocks_n + block).to(tl.int64) * steps
    far_scale_ptr = w_scale_ptr + (group * blocks_n + tl.minimum(block + 1, blocks_n - 1)).to(tl.int64) * steps
    w_row = group * N + block * BLOCK
    sums = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    more = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for step in range(0, steps):
        x = x_desc.load([first, step * BLOCK])
        x_scale = tl.load(x_scale_ptr + step)
        near = w_desc.load([w_row, step * BLOCK])
        sums += tl.dot(x, near.T) * (x_scale * tl.load(near_scale_ptr + step))[:, None]
        if BLOCKS == 2:
            far = w_desc.load([w_row + BLOCK, step * BLOCK])
            more += tl.dot(x, far.T) * (x_scale * tl.load(far_scale_ptr + step))[:, None]
    col = block * BLOCK + tl.arange(0, BLOCK)
    places = out_ptr + row.to(tl.int64)[:, None] * N + col[None, :]
    real = (row < end)[:, None]
    tl.store(places, sums.to(out_ptr.dtype.element_ty), mask=real & (col < N)[None, :])
    if BLOCKS == 2:
        tl.store(places + BLOCK, more.to(out_ptr.dtype.element_ty), mask=real & (col + BLOCK < N)[None, :])


def fp8_gemm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    block_m: int,
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    shape: Shape,
) -> None:
    """Arguments as `kernels.fp8_gemm_hopper.fp8_gemm_hopper`."""
    (rows, k), n = x.shape, weight.shape[-2]
    x_desc = TensorDescriptor(x, [rows, k], [k, 1], [block_m, BLOCK])
    w_desc = TensorDescriptor(weight, [weight.numel() // k, k], [k, 1], [BLOCK, BLOCK])
    tiles_m = len(index[0]) if index is not None else triton.cdiv(rows, block_m)
    num_warps = shape.num_warps if block_m == 128 else shape.num_warps // 2
    fp8_gemm_kernel[(tiles_m * triton.cdiv(n, shape.blocks * BLOCK),)](
        x_desc, w_desc, *scales, *(index if index is not None else (scales[0],) * 3), out,
        tiles_m, rows, weight.shape[0] if index is not None else 1,
        N=n, K=k, GROUPED=index is not None, BLOCK_M=block_m, BLOCKS=shape.blocks, BLOCK=BLOCK, BAND=BAND,
        num_warps=num_warps, num_stages=shape.num_stages, maxnreg=shape.maxnreg,
    )  # fmt: skip

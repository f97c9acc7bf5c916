"""FP8 products with block scales on Hopper, in Gluon: one warp group loads by TMA while two multiply in turns.

Same meaning as `grouped_gemm_triton` for FP8. A tile is BLOCK_M rows x 256 weight rows; each multiplying warp group has
128 of these, so one weight scale a step, and keeps its sums in registers for the whole product. It multiplies 64 rows
at a time into 64 registers and adds them, scaled, to the sums: while one group scales, the other has the tensor cores.
A program goes from tile to tile, and the loads of the next run ahead under the stores of the last. An element is summed
in the same order whatever BLOCK_M is. Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.index_scores_triton import num_processors

TESTED = "3.6."  # Gluon may change between releases of Triton
BLOCK_N, BLOCK_K, STAGES = 256, 128, 4
BAND = 16  # tiles of rows that programs running side by side share: both operands stay in L2


@gluon.jit
def _tile(t, tiles_m, tiles_n, num_groups, num_rows, tile_group, tile_first, group_end, steps,
          GROUPED: gl.constexpr, BLOCK_M: gl.constexpr, BAND: gl.constexpr):  # fmt: skip
    """Group, first row, end of rows, tile of columns, steps of a tile; an unused one has no rows and no steps."""
    if GROUPED:
        tile_m = t // tiles_n
        tile_n = t % tiles_n
        group = gl.load(tile_group + tile_m).to(gl.int32)
        used = group < num_groups
        group = gl.minimum(group, num_groups - 1)
        first = gl.load(tile_first + tile_m).to(gl.int32)
        end = gl.where(used, gl.load(group_end + group).to(gl.int32), 0)
        steps = gl.where(used, steps, 0)
    else:
        band = t // (BAND * tiles_n)
        height = gl.minimum(tiles_m - band * BAND, BAND)
        rest = t % (BAND * tiles_n)
        tile_n = rest // height
        first = (band * BAND + rest % height) * BLOCK_M
        group = 0
        end = num_rows
    return group, first, end, tile_n, steps


@gluon.jit
def _load(
    x_desc, w_desc, xs, ws, full, empty, tile_group, tile_first, group_end, tiles_m, tiles_n, num_groups, num_rows,
    N: gl.constexpr, K: gl.constexpr, GROUPED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    turn = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        group, first, _, tile_n, steps = _tile(
            t, tiles_m, tiles_n, num_groups, num_rows, tile_group, tile_first, group_end, (K + BLOCK_K - 1) // BLOCK_K,
            GROUPED, BLOCK_M, BAND,
        )  # fmt: skip
        for step in range(0, steps):
            stage = turn % STAGES
            mbarrier.wait(empty.index(stage), (turn // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K)
            tma.async_copy_global_to_shared(x_desc, [first, step * BLOCK_K], full.index(stage), xs.index(stage))
            rows = group * N + tile_n * BLOCK_N
            tma.async_copy_global_to_shared(w_desc, [rows, step * BLOCK_K], full.index(stage), ws.index(stage))
            turn += 1


@gluon.jit
def _store(out, sums, first, end, column, N: gl.constexpr, L: gl.constexpr):
    """64 x 128 sums to their rows before `end` and columns before N."""
    values = gl.convert_layout(sums.to(out.dtype.element_ty), L)
    row = first + gl.arange(0, 64, gl.SliceLayout(1, L))
    col = column + gl.arange(0, 128, gl.SliceLayout(0, L))
    gl.store(out + row.to(gl.int64)[:, None] * N + col[None, :], values, mask=(row < end)[:, None] & (col < N)[None, :])


@gluon.jit
def _multiply(
    x_scale, w_scale, out, xs, ws, full, empty, tile_group, tile_first, group_end, tiles_m, tiles_n, num_groups,
    num_rows, SIDE: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, GROUPED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    R: gl.constexpr = gl.SliceLayout(1, A)
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BLOCKS: gl.constexpr = (N + 127) // 128
    zero = gl.zeros((64, 128), gl.float32, A)
    turn = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        group, first, end, tile_n, steps = _tile(
            t, tiles_m, tiles_n, num_groups, num_rows, tile_group, tile_first, group_end, STEPS, GROUPED, BLOCK_M, BAND,
        )  # fmt: skip
        column = tile_n * BLOCK_N + SIDE * 128
        # rows and blocks past the end read the last one's scale and are not stored
        row = first + gl.arange(0, 64, R)
        near = x_scale + gl.minimum(row, num_rows - 1).to(gl.int64) * STEPS
        block = w_scale + (group * BLOCKS + gl.minimum(column // 128, BLOCKS - 1)).to(gl.int64) * STEPS
        sums = gl.zeros((64, 128), gl.float32, A)
        if BLOCK_M == 128:
            far = x_scale + gl.minimum(row + 64, num_rows - 1).to(gl.int64) * STEPS
            more = gl.zeros((64, 128), gl.float32, A)
        for step in range(0, steps):
            stage = turn % STAGES
            factor = gl.load(block + step)
            scale = gl.load(near + step) * factor
            if BLOCK_M == 128:
                more_scale = gl.load(far + step) * factor
            mbarrier.wait(full.index(stage), turn // STAGES & 1)
            w = ws.index(stage).slice(SIDE * 128, 128).permute((1, 0))
            x = xs.index(stage)
            product = warpgroup_mma(x.slice(0, 64), w, zero, use_acc=False, is_async=True)
            sums += warpgroup_mma_wait(0, [product]) * scale[:, None]
            if BLOCK_M == 128:
                product = warpgroup_mma(x.slice(64, 64), w, zero, use_acc=False, is_async=True)
                last = warpgroup_mma_wait(0, [product])
                gl.thread_barrier()  # one thread arrives: all four warps must have read the stage
                mbarrier.arrive(empty.index(stage), count=1)
                more += last * more_scale[:, None]
            else:
                gl.thread_barrier()
                mbarrier.arrive(empty.index(stage), count=1)
            turn += 1
        _store(out, sums, first, end, column, N, L)
        if BLOCK_M == 128:
            _store(out, more, first + 64, end, column, N, L)


@gluon.jit(do_not_specialize=["tiles_m", "tiles_n", "num_groups", "num_rows"])
def fp8_gemm_hopper_kernel(
    x_desc, w_desc, x_scale, w_scale, out, tile_group, tile_first, group_end, tiles_m, tiles_n, num_groups, num_rows,
    N: gl.constexpr, K: gl.constexpr, GROUPED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)  # both multiplying groups
    fence_async_shared()  # TMA sees the barriers through the other proxy
    gl.warp_specialize([
        (_multiply, (x_scale, w_scale, out, xs, ws, full, empty, tile_group, tile_first, group_end, tiles_m, tiles_n,
                     num_groups, num_rows, 0, N, K, GROUPED, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, BAND)),
        (_multiply, (x_scale, w_scale, out, xs, ws, full, empty, tile_group, tile_first, group_end, tiles_m, tiles_n,
                     num_groups, num_rows, 1, N, K, GROUPED, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, BAND)),
        (_load, (x_desc, w_desc, xs, ws, full, empty, tile_group, tile_first, group_end, tiles_m, tiles_n, num_groups,
                 num_rows, N, K, GROUPED, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, BAND)),
    ], [4, 4], [240, 24])  # fmt: skip


def fp8_gemm_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    block_m: int,
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Fill out [rows, n] with x [rows, k] times the transposed weight [n, k], both FP8 with scales.

    index, for weight [g, n, k] and rows sorted by group: group and first row of each tile of block_m rows, and where
    each group's rows end; groups >= g mark unused tiles. k must be a multiple of 16.
    """
    (rows, k), n = x.shape, weight.shape[-2]
    num_groups = weight.shape[0] if index is not None else 1
    layout = gl.NVMMASharedLayout(128, 8, 2)
    flat = weight.view(-1, k)
    x_desc = TensorDescriptor(x, [rows, k], [k, 1], [block_m, BLOCK_K], layout)
    w_desc = TensorDescriptor(flat, list(flat.shape), [k, 1], [BLOCK_N, BLOCK_K], layout)
    tiles_m = len(index[0]) if index is not None else triton.cdiv(rows, block_m)
    tiles_n = triton.cdiv(n, BLOCK_N)
    fp8_gemm_hopper_kernel[(min(tiles_m * tiles_n, num_processors(x.device)),)](
        x_desc, w_desc, *scales, out, *(index if index is not None else (scales[0],) * 3), tiles_m, tiles_n, num_groups,
        rows, N=n, K=k, GROUPED=index is not None, BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, STAGES=STAGES,
        BAND=BAND, num_warps=4,
    )  # fmt: skip

"""Which cache rows a tile of the Hopper kernels reads, and the partition that copies them into shared memory.

Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier


@gluon.jit
def _span(tile, lengths, num_ids, splits, max_splits, min_split, HEAD_TILES: gl.constexpr, LENGTHS: gl.constexpr):
    """Query, split, and where in the query's list the tile's rows begin and how many they are."""
    rest = tile // HEAD_TILES
    query = rest // splits
    split = rest % splits
    limit = num_ids
    if LENGTHS:
        limit = gl.minimum(gl.load(lengths + query), limit)
    run = gl.maximum(((limit + max_splits - 1) // max_splits + 127) // 128 * 128, min_split)
    first = split * run
    return query, split, first, gl.minimum(run, limit - first)


@gluon.jit
def _rows(table, first, block, at, count, num_rows, PAGED: gl.constexpr, PAGE: gl.constexpr):
    """Cache rows of the 64 places block + `at` of a split, negative where there is none; with PAGED they are a page."""
    if PAGED:
        row = gl.load(table + (first + block) // PAGE, mask=block < count, other=-1) * PAGE + at
        row = gl.where(block + at < count, row, -1)
    else:
        row = gl.load(table + first + block + at, mask=block + at < count, other=-1)
    return gl.where(row < num_rows, row, -1)


@gluon.jit
def _filled(table, first, count, num_rows, DECODE: gl.constexpr, PAGED: gl.constexpr):
    """Whether a tile has rows to read; all partitions ask alike, before any wait, and leave out one that has none.

    A prompt's ids are not looked at: they fill their tile.
    """
    found = count > 0
    if DECODE and not PAGED:
        # every warp looks at all 512 ids, so that none waits for another; the list begins with rows, if it has any
        at = gl.arange(0, 512, gl.SliceLayout(0, gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])))
        best = -1
        i = 0
        while (i < count) & (best < 0):
            row = gl.load(table + first + i + at, mask=i + at < count, other=-1)
            best = gl.max(gl.where(row < num_rows, row, -1), 0)
            i += 512
        found = best >= 0
    return found


@gluon.jit
def _gather(
    kv, ids, lengths, kl, kr, kp, full, empty, tiles, num_ids, ids_stride, num_rows, splits, max_splits, min_split,
    HEAD_TILES: gl.constexpr, LENGTHS: gl.constexpr, PAGED: gl.constexpr, PAGE: gl.constexpr, DECODE: gl.constexpr,
):  # fmt: skip
    # 8 lanes copy 128 contiguous bytes of a row, 16 each: 4 row pointers a thread, no bank conflicts; a copy whose mask
    # is false writes zeros without reading, so a stale row's NaN never meets a weight of 0
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, 64, gl.SliceLayout(1, B))
    c = gl.arange(0, 256, gl.SliceLayout(0, B))
    d = gl.arange(0, 64, gl.SliceLayout(0, B))
    turn = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query, _, first, count = _span(t, lengths, num_ids, splits, max_splits, min_split, HEAD_TILES, LENGTHS)
        table = ids + query.to(gl.int64) * ids_stride
        if _filled(table, first, count, num_rows, DECODE, PAGED):
            j0 = _rows(table, first, 0, r, count, num_rows, PAGED, PAGE)
            j1 = _rows(table, first, 64, r, count, num_rows, PAGED, PAGE)
            for i in range(0, gl.maximum(count, 1), 128):
                phase = (turn & 1) ^ 1
                turn += 1
                m0 = (j0 >= 0)[:, None]
                m1 = (j1 >= 0)[:, None]
                p0 = kv + gl.maximum(j0, 0).to(gl.int64)[:, None] * 576
                p1 = kv + gl.maximum(j1, 0).to(gl.int64)[:, None] * 576
                j0 = _rows(table, first, i + 128, r, count, num_rows, PAGED, PAGE)  # the next turn's: ahead of waits
                j1 = _rows(table, first, i + 192, r, count, num_rows, PAGED, PAGE)
                # the order of the four waits is the order in which the halves are released
                mbarrier.wait(empty.index(0), phase)
                async_copy.async_copy_global_to_shared(kl.index(0), p0 + c[None, :], mask=m0)
                async_copy.mbarrier_arrive(full.index(0), increment_count=False)  # when the thread's copies have landed
                mbarrier.wait(empty.index(1), phase)
                async_copy.async_copy_global_to_shared(kr.index(0), p0 + 256 + c[None, :], mask=m0)
                async_copy.async_copy_global_to_shared(kp.index(0), p0 + 512 + d[None, :], mask=m0)
                async_copy.mbarrier_arrive(full.index(1), increment_count=False)
                mbarrier.wait(empty.index(3), phase)
                async_copy.async_copy_global_to_shared(kr.index(1), p1 + 256 + c[None, :], mask=m1)
                async_copy.mbarrier_arrive(full.index(3), increment_count=False)
                mbarrier.wait(empty.index(2), phase)
                async_copy.async_copy_global_to_shared(kl.index(1), p1 + c[None, :], mask=m1)
                async_copy.async_copy_global_to_shared(kp.index(1), p1 + 512 + d[None, :], mask=m1)
                async_copy.mbarrier_arrive(full.index(2), increment_count=False)

"""The merge of split attentions inside the Hopper kernels: the last program to finish a tile of heads does it.

Each of the two multiplying groups stores its half of the columns, then counts itself in; who counts to the number of
splits reads all partial results, its own included, and adds them in the order of the splits. So the bits do not depend
on who came last, nobody waits, and what is read has just been written and lies in the L2.
Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

COLUMNS = gl.constexpr(32)  # merged at a time, for 64 heads; four splits' loads are in flight


@gluon.jit
def _used_splits(query, lengths, num_ids, splits, max_splits, min_split, LENGTHS: gl.constexpr):
    """How many of the splits have rows, at least one: the others would add nothing."""
    limit = num_ids
    if LENGTHS:
        limit = gl.minimum(gl.load(lengths + query), limit)
    run = gl.maximum(((limit + max_splits - 1) // max_splits + 127) // 128 * 128, min_split)
    return gl.minimum(gl.maximum((limit + run - 1) // run, 1), splits)


@gluon.jit
def _load_sum(part_lse, head, split, used, stride):
    """Log-sums of one split; -inf if there is no such split."""
    lse = gl.load(part_lse + gl.minimum(split, used - 1).to(gl.int64) * stride + head)
    return gl.where(split < used, lse, float("-inf"))


@gluon.jit
def _load_part(part, head, cols, split, used, stride):
    """Values of one split; zeros, not read, if there is no such split."""
    at = gl.minimum(split, used - 1).to(gl.int64) * stride + head
    real = cols < gl.where(split < used, 512, 0)
    return gl.load(part + at[:, None] * 512 + cols[None, :], mask=real[None, :], other=0.0).to(gl.float32)


@gluon.jit
def _merge_last(
    part, part_lse, out, lse, counters, query, tile, used, splits, num_queries, SIDE: gl.constexpr,
    HEAD_TILES: gl.constexpr,
):  # fmt: skip
    """Count this group in; the last one of a query and 64 heads writes their 256 columns of out, and one side lse."""
    M: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    R: gl.constexpr = gl.SliceLayout(1, M)
    gl.thread_barrier()  # every thread's stores are behind it: the counting thread releases them all
    counted = gl.atomic_add(counters + (query * HEAD_TILES + tile) * 2 + SIDE, 1, sem="acq_rel", scope="gpu")
    gl.thread_barrier()
    if counted == splits - 1:
        stride = num_queries * HEAD_TILES * 64
        head = ((query * HEAD_TILES + tile) * 64 + gl.arange(0, 64, R)).to(gl.int64)
        base = gl.full((64,), float("-inf"), gl.float32, R)
        for split in range(0, used, 4):
            a = gl.maximum(_load_sum(part_lse, head, split, used, stride),
                           _load_sum(part_lse, head, split + 1, used, stride))  # fmt: skip
            b = gl.maximum(_load_sum(part_lse, head, split + 2, used, stride),
                           _load_sum(part_lse, head, split + 3, used, stride))  # fmt: skip
            base = gl.maximum(base, gl.maximum(a, b))
        base = gl.where(base == float("-inf"), 0.0, base)
        total = gl.zeros((64,), gl.float32, R)
        for col in range(0, 256, COLUMNS):
            cols = SIDE * 256 + col + gl.arange(0, COLUMNS, gl.SliceLayout(0, M))
            total = gl.zeros((64,), gl.float32, R)
            acc = gl.zeros((64, COLUMNS), gl.float32, M)
            for split in range(0, used, 4):
                a = _load_part(part, head, cols, split, used, stride)
                b = _load_part(part, head, cols, split + 1, used, stride)
                c = _load_part(part, head, cols, split + 2, used, stride)
                d = _load_part(part, head, cols, split + 3, used, stride)
                wa = gl.exp2((_load_sum(part_lse, head, split, used, stride) - base) * 1.4426950408889634)
                wb = gl.exp2((_load_sum(part_lse, head, split + 1, used, stride) - base) * 1.4426950408889634)
                wc = gl.exp2((_load_sum(part_lse, head, split + 2, used, stride) - base) * 1.4426950408889634)
                wd = gl.exp2((_load_sum(part_lse, head, split + 3, used, stride) - base) * 1.4426950408889634)
                acc = acc + wa[:, None] * a
                acc = acc + wb[:, None] * b
                acc = acc + wc[:, None] * c
                acc = acc + wd[:, None] * d
                total = total + wa + wb + wc + wd
            inverse = gl.where(total > 0.0, 1.0 / total, 0.0)
            gl.store(out + head[:, None] * 512 + cols[None, :], (acc * inverse[:, None]).to(out.dtype.element_ty))
        if SIDE == 0:
            found = total > 0.0
            # one split alone keeps its bits, as if nothing had been merged
            natural = base + gl.log2(gl.where(found, total, 1.0)) * 0.6931471805599453
            gl.store(lse + head, gl.where(found, natural, float("-inf")))

"""Attention over latent rows on Hopper, in Gluon: one warp group gathers while two multiply.

Same meaning and arguments as `sparse_mla_triton`, for DeepSeek's widths (latent 512, rope 64), bfloat16 and heads in
multiples of 64. A tile is one query x 64 heads x one split of its rows. Three partitions of four warps:
  even     scores blocks 0, 2, ... of 64 rows and owns output columns 0..255
  odd      scores blocks 1, 3, ... and owns output columns 256..511
  gather   copies rows into two 64-row stages: even blocks into stage 0, odd ones into stage 1
Each multiplying group publishes its softmaxed weights, running maximum and rescale factor; the other multiplies those
weights with its own half of the values. The weights lie over the rope part of their stage, dead by then: so all fits.
Barriers full / empty are numbered 2 * stage + half; the rope part travels with the half that is released last.
Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.decode_designs import Design
from kernels.fp8_cache import PAGE
from kernels.layout import KvLayout
from kernels.sparse_mla_hopper_gather import _filled, _gather, _rows, _span
from kernels.sparse_mla_triton import merge_splits, plan_splits

TESTED = "3.6."  # Gluon may change between releases of Triton
DESIGN = Design(backend="hopper")
PERSISTENT_ROWS = 131072  # from here on one program a multiprocessor is faster (measured)


@gluon.jit
def _load_q(q, row0, ql, qr, qp):
    """64 query rows into shared memory, the latent part in the type of its products."""
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = row0 + gl.arange(0, 64, gl.SliceLayout(1, B))
    c = gl.arange(0, 256, gl.SliceLayout(0, B))
    d = gl.arange(0, 64, gl.SliceLayout(0, B))
    p = q + r.to(gl.int64)[:, None] * 576
    async_copy.async_copy_global_to_shared(qp, p + 512 + d[None, :])
    if ql.dtype == q.dtype.element_ty:
        async_copy.async_copy_global_to_shared(ql, p + c[None, :])
        async_copy.async_copy_global_to_shared(qr, p + 256 + c[None, :])
    else:
        ql.store(gl.load(p + c[None, :]).to(ql.dtype))
        qr.store(gl.load(p + 256 + c[None, :]).to(ql.dtype))
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _issue_scores(qa, qb, qp, ka, kb, kp, first_full, second_full, phase, LS: gl.constexpr):
    """Start the 64 x 64 scores as soon as the first half of the rows is there; returns the token."""
    zero = gl.zeros((64, 64), gl.float32, LS)
    mbarrier.wait(first_full, phase)
    fence_async_shared()  # the copies wrote through the generic proxy, wgmma reads through the async one
    token = warpgroup_mma(qa, ka.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(second_full, phase)
    fence_async_shared()
    token = warpgroup_mma(qb, kb.permute((1, 0)), token, is_async=True)
    return warpgroup_mma(qp, kp.permute((1, 0)), token, is_async=True)


@gluon.jit
def _finish(out, lse, acc, top, total, sums, sums_full, row0, parity, SIDE: gl.constexpr, LO: gl.constexpr,
            R: gl.constexpr):  # fmt: skip
    """Join the two partial sums of weights, normalise, store 256 columns. No weight at all: zeros and -inf."""
    sums.index(SIDE).store(total)
    gl.thread_barrier()
    mbarrier.arrive(sums_full.index(SIDE), count=1)
    mbarrier.wait(sums_full.index(1 - SIDE), parity)
    total = total + sums.index(1 - SIDE).load(R)
    RO: gl.constexpr = gl.SliceLayout(1, LO)
    row = row0 + gl.arange(0, 64, RO)
    col = SIDE * 256 + gl.arange(0, 256, gl.SliceLayout(0, LO))
    inverse = gl.where(total > 0.0, 1.0 / total, 0.0)
    values = acc * gl.convert_layout(inverse, RO)[:, None]
    if out.dtype.element_ty == gl.float16:
        values = gl.minimum(gl.maximum(values, -65504.0), 65504.0)
    gl.store(out + row.to(gl.int64)[:, None] * 512 + col[None, :], values.to(out.dtype.element_ty))
    if SIDE == 0:
        # a NaN is passed on: the merge skips -inf
        natural = gl.where(total == 0.0, float("-inf"), (top + gl.log2(total)) * 0.6931471805599453)
        gl.store(lse + row0 + gl.arange(0, 64, R), natural)


@gluon.jit
def _finish_empty(out, lse, row0, SIDE: gl.constexpr, LO: gl.constexpr, R: gl.constexpr, DIRECT: gl.constexpr):
    """A tile without rows: -inf, for which the merge reads no values, and zeros only where nothing is merged."""
    if DIRECT:
        row = row0 + gl.arange(0, 64, gl.SliceLayout(1, LO))
        col = SIDE * 256 + gl.arange(0, 256, gl.SliceLayout(0, LO))
        place = out + row.to(gl.int64)[:, None] * 512 + col[None, :]
        gl.store(place, gl.zeros((64, 256), out.dtype.element_ty, LO))
    if SIDE == 0:
        gl.store(lse + row0 + gl.arange(0, 64, R), gl.full((64,), float("-inf"), gl.float32, R))


@gluon.jit
def _even(
    q, ids, lengths, out, lse, to_log2, ql, qr, qp, kl, kr, kp, fades, tops, sums, full, empty, weights_full, q_full,
    sums_full, tiles, num_queries, num_ids, ids_stride, num_rows, splits, max_splits, min_split, ZERO,
    HEAD_TILES: gl.constexpr, LENGTHS: gl.constexpr, PAGED: gl.constexpr, PAGE: gl.constexpr, DECODE: gl.constexpr,
    DIRECT: gl.constexpr,
):  # fmt: skip
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    LA: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    R: gl.constexpr = gl.SliceLayout(1, LS)
    RO: gl.constexpr = gl.SliceLayout(1, LO)
    kw = kp if kl.dtype == kp.dtype else kp._reinterpret(kl.dtype, kp.shape, kp.layout)  # rope keys, then weights
    keys = gl.arange(0, 64, gl.SliceLayout(0, LS))
    turn = 0
    parity = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query, split, first, count = _span(t, lengths, num_ids, splits, max_splits, min_split, HEAD_TILES, LENGTHS)
        table = ids + query.to(gl.int64) * ids_stride
        row0 = ((split * num_queries + query) * HEAD_TILES + t % HEAD_TILES) * 64
        if _filled(table, first, count, num_rows, DECODE, PAGED):
            _load_q(q, (query * HEAD_TILES + t % HEAD_TILES) * 64, ql.index(0), qr.index(0), qp.index(0))
            mbarrier.arrive(q_full, count=1)
            top = gl.full((64,), -1e30, gl.float32, R)  # finite: a block without a valid row leaves no NaN
            total = gl.zeros((64,), gl.float32, R)
            acc = gl.zeros((64, 256), gl.float32, LO)
            for i in range(0, gl.maximum(count, 1), 128):
                phase = turn & 1
                # always 0, but only at run time: with constant stages the wgmma descriptors are hoisted and spill
                u = turn & ZERO
                v = u + 1
                turn += 1
                # the own block: scores, softmax, publish, then its product with the own half (weights from registers)
                scores = _issue_scores(ql.index(u), qr.index(u), qp.index(u), kl.index(u), kr.index(u), kp.index(u),
                                       full.index(0), full.index(1), phase, LS)  # fmt: skip
                valid = _rows(table, first, i, keys, count, num_rows, PAGED, PAGE) >= 0
                y = gl.where(valid[None, :], warpgroup_mma_wait(0, [scores]), float("-inf"))
                new_top = gl.maximum(top, gl.max(y, 1) * to_log2)
                fade = gl.exp2(top - new_top)
                tops.index(0).store(new_top)
                w = gl.exp2(y * to_log2 - new_top[:, None])
                wb = w.to(kw.dtype)
                kw.index(u).store(wb)
                fades.index(0).store(fade)
                fence_async_shared()
                gl.thread_barrier()  # one thread arrives: every store must be behind it
                mbarrier.arrive(weights_full.index(0), count=1)
                acc = acc * gl.convert_layout(fade, RO)[:, None]
                product = warpgroup_mma(gl.convert_layout(wb, LA), kl.index(u), acc, is_async=True)
                total = total * fade + gl.sum(w, 1)
                acc = warpgroup_mma_wait(0, [product])
                gl.thread_barrier()
                mbarrier.arrive(empty.index(0), count=1)
                # the other group's block, its weights from shared memory
                mbarrier.wait(weights_full.index(1), phase)
                fade = fades.index(1).load(R)
                top = tops.index(1).load(R)
                total = total * fade
                acc = acc * gl.convert_layout(fade, RO)[:, None]
                fence_async_shared()
                product = warpgroup_mma(kw.index(v), kl.index(v), acc, is_async=True)
                acc = warpgroup_mma_wait(0, [product])
                gl.thread_barrier()
                mbarrier.arrive(empty.index(2), count=1)
            _finish(out, lse, acc, top, total, sums, sums_full, row0, parity, 0, LO, R)
            parity ^= 1
        else:
            _finish_empty(out, lse, row0, 0, LO, R, DIRECT)


@gluon.jit
def _odd(
    ids, lengths, out, lse, to_log2, ql, qr, qp, kl, kr, kp, fades, tops, sums, full, empty, weights_full, q_full,
    sums_full, tiles, num_queries, num_ids, ids_stride, num_rows, splits, max_splits, min_split, ZERO,
    HEAD_TILES: gl.constexpr, LENGTHS: gl.constexpr, PAGED: gl.constexpr, PAGE: gl.constexpr, DECODE: gl.constexpr,
    DIRECT: gl.constexpr,
):  # fmt: skip
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    LA: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    R: gl.constexpr = gl.SliceLayout(1, LS)
    RO: gl.constexpr = gl.SliceLayout(1, LO)
    kw = kp if kl.dtype == kp.dtype else kp._reinterpret(kl.dtype, kp.shape, kp.layout)  # rope keys, then weights
    keys = gl.arange(0, 64, gl.SliceLayout(0, LS))
    turn = 0
    parity = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query, split, first, count = _span(t, lengths, num_ids, splits, max_splits, min_split, HEAD_TILES, LENGTHS)
        table = ids + query.to(gl.int64) * ids_stride
        row0 = ((split * num_queries + query) * HEAD_TILES + t % HEAD_TILES) * 64
        if _filled(table, first, count, num_rows, DECODE, PAGED):
            mbarrier.wait(q_full, parity)
            top = gl.full((64,), -1e30, gl.float32, R)
            total = gl.zeros((64,), gl.float32, R)
            acc = gl.zeros((64, 256), gl.float32, LO)
            for i in range(0, gl.maximum(count, 1), 128):
                phase = turn & 1
                u = turn & ZERO
                v = u + 1
                turn += 1
                scores = _issue_scores(qr.index(u), ql.index(u), qp.index(u), kr.index(v), kl.index(v), kp.index(v),
                                       full.index(3), full.index(2), phase, LS)  # fmt: skip
                valid = _rows(table, first, i + 64, keys, count, num_rows, PAGED, PAGE) >= 0
                # out of the wgmma registers before acc is touched, or ptxas injects a wait (C7517)
                y = gl.where(valid[None, :], warpgroup_mma_wait(0, [scores]) * to_log2, float("-inf"))
                y_top = gl.max(y, 1)
                # the other group's block first (its weights are older): its product runs under our softmax
                mbarrier.wait(weights_full.index(0), phase)
                fade = fades.index(0).load(R)
                top = tops.index(0).load(R)
                total = total * fade
                acc = acc * gl.convert_layout(fade, RO)[:, None]
                fence_async_shared()
                product = warpgroup_mma(kw.index(u), kr.index(u), acc, is_async=True)
                new_top = gl.maximum(top, y_top)
                fade = gl.exp2(top - new_top)
                tops.index(1).store(new_top)
                w = gl.exp2(y - new_top[:, None])
                wb = w.to(kw.dtype)
                kw.index(v).store(wb)
                fades.index(1).store(fade)
                fence_async_shared()
                gl.thread_barrier()
                mbarrier.arrive(weights_full.index(1), count=1)
                total = total * fade + gl.sum(w, 1)
                acc = warpgroup_mma_wait(0, [product])
                gl.thread_barrier()
                mbarrier.arrive(empty.index(1), count=1)
                acc = acc * gl.convert_layout(fade, RO)[:, None]
                product = warpgroup_mma(gl.convert_layout(wb, LA), kr.index(v), acc, is_async=True)
                top = new_top
                acc = warpgroup_mma_wait(0, [product])
                gl.thread_barrier()
                mbarrier.arrive(empty.index(3), count=1)
            _finish(out, lse, acc, top, total, sums, sums_full, row0, parity, 1, LO, R)
            parity ^= 1
        else:
            _finish_empty(out, lse, row0, 1, LO, R, DIRECT)


@gluon.jit
def latent_attention_hopper_kernel(
    q, kv, ids, lengths, out, lse, to_log2, tiles, num_queries, num_ids, ids_stride, num_rows, splits, max_splits,
    min_split, ZERO, HEAD_TILES: gl.constexpr, LENGTHS: gl.constexpr, PAGED: gl.constexpr, PAGE: gl.constexpr,
    DECODE: gl.constexpr, DIRECT: gl.constexpr, MULTIPLY_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    V: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ql = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], S)
    qr = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], S)
    qp = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], S)
    kl = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], S)
    kr = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], S)
    kp = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], S)  # rope keys, then weights
    fades = gl.allocate_shared_memory(gl.float32, [2, 64], V)
    tops = gl.allocate_shared_memory(gl.float32, [2, 64], V)
    sums = gl.allocate_shared_memory(gl.float32, [2, 64], V)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    sums_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=128)  # every gathering thread arrives
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(weights_full.index(i), count=1)
        mbarrier.init(sums_full.index(i), count=1)
    mbarrier.init(q_full, count=1)
    gl.warp_specialize([
        (_even, (q, ids, lengths, out, lse, to_log2, ql, qr, qp, kl, kr, kp, fades, tops, sums, full, empty,
                 weights_full, q_full, sums_full, tiles, num_queries, num_ids, ids_stride, num_rows, splits, max_splits,
                 min_split, ZERO, HEAD_TILES, LENGTHS, PAGED, PAGE, DECODE, DIRECT)),
        (_odd, (ids, lengths, out, lse, to_log2, ql, qr, qp, kl, kr, kp, fades, tops, sums, full, empty, weights_full,
                q_full, sums_full, tiles, num_queries, num_ids, ids_stride, num_rows, splits, max_splits, min_split,
                ZERO, HEAD_TILES, LENGTHS, PAGED, PAGE, DECODE, DIRECT)),
        (_gather, (kv, ids, lengths, kl, kr, kp, full, empty, tiles, num_ids, ids_stride, num_rows, splits, max_splits,
                   min_split, HEAD_TILES, LENGTHS, PAGED, PAGE, DECODE)),
    ], [4, 4], [MULTIPLY_REGISTERS, GATHER_REGISTERS])  # fmt: skip


def fits(q: torch.Tensor, kv: torch.Tensor, layout: KvLayout) -> bool:
    """Whether these kernels take the tensors: Hopper, a tested Triton, DeepSeek's widths, bfloat16 queries, bfloat16 or
    FP8 rows, whole tiles of heads."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and triton.__version__.startswith(TESTED)
        and layout.absorbed
        and (layout.latent_dim, layout.rope_dim) == (512, 64)
        and q.dtype == torch.bfloat16
        and kv.dtype in (torch.bfloat16, torch.uint8)
        and q.shape[1] % 64 == 0
        and q.data_ptr() % 16 == kv.data_ptr() % 16 == 0
    )


def plan_tiles(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    paged: bool,
    split: bool,
    design: Design,
) -> tuple[tuple[int, int, int], int, int, torch.Tensor, torch.Tensor]:
    """(splits, most splits, least rows a split), tiles, programs, and where the tiles write: out or partial results."""
    s, h, _ = q.shape
    cut, part, part_lse = plan_splits(ids, out, lse, paged=paged, split=split, design=design)
    tiles = programs = s * cut[0] * (h // 64)
    if kv.shape[0] >= PERSISTENT_ROWS and q.is_cuda:
        programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    return cut, tiles, programs, part, part_lse


def latent_attention_hopper(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    lengths: torch.Tensor | None,
    layout: KvLayout,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    paged: bool = False,
    split: bool = False,
    design: Design = DESIGN,
) -> None:
    """Launch the kernel on checked arguments that fit; fills out and lse. Arguments as `latent_attention`."""
    (splits, max_splits, min_split), tiles, programs, part, part_lse = plan_tiles(
        q, kv, ids, out, lse, paged=paged, split=split, design=design
    )
    s, h, _ = q.shape
    latent_attention_hopper_kernel[(programs,)](
        q, kv, ids, ids if lengths is None else lengths, part, part_lse, scale * 1.4426950408889634, tiles, s,
        ids.shape[1] * (PAGE if paged else 1), ids.stride(0), kv.shape[0], splits, max_splits, min_split, 0,
        HEAD_TILES=h // 64, LENGTHS=lengths is not None, PAGED=paged, PAGE=PAGE, DECODE=split, DIRECT=part is out,
        MULTIPLY_REGISTERS=216, GATHER_REGISTERS=72, num_warps=4,
    )  # fmt: skip
    if part is not out:
        merge_splits(part, part_lse, out, lse)

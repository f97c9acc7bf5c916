"""Attention of a prompt's chunk in the MHA form on Hopper, in Gluon: one warp group loads by TMA while two multiply.

Same meaning as `masked_mha_triton` for DeepSeek-V3.2's widths (queries and keys 192, values 128) in bfloat16. A tile of
work is 128 queries of one head, 64 for each multiplying group, over tiles of 128 keys in ascending order: a row's sums
depend on absolute positions alone. Within a group the next scores and the last weights' product with the values are
both in flight while it computes a softmax; between the groups, one has the tensor cores while the other computes.
Under a mask a tile's keys come as bits (`mask_bits_triton`), causality already in them.
Importing this module needs triton.experimental.gluon.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import math

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
from kernels.mask_bits_triton import KEYS, pack_mask
from kernels.mha_hopper_tiles import (
    _bits,
    _hide,
    _issue_scores,
    _load_keys,
    _load_values,
    _release,
    _step,
    _tile,
    _weigh,
)

TESTED = "3.6."  # Gluon may change between releases of Triton
DIM, VALUE, QUERIES, STAGES = 192, 128, 128, 2
HEADS_TOGETHER = 4  # their keys and values share L2; 4 heads x 2^n blocks spread evenly over 132 programs
IN_TURNS = True  # the multiplying groups issue their products in turns
PERSISTENT = False  # one program an SM, whose loads run ahead into its next tile: slower (measured)


@gluon.jit
def _load(
    qn_desc, qr_desc, kn_desc, kr_desc, v_desc, qn, qr, kn, kr, vs, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    q_head, k_head, v_head, num_keys, num_heads, heads_a_group, start, blocks, tiles,
    TOGETHER: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    done = 0  # key tiles of the tiles of work before
    parity = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, block, count = _tile(t, num_keys, num_heads, start, blocks, TOGETHER, QUERIES, KEYS)
        k_column = head // heads_a_group * k_head
        v_column = head // heads_a_group * v_head
        _load_keys(kn_desc, kr_desc, kn, kr, k_full, k_empty, 0, done, k_column, KEYS, STAGES)
        mbarrier.wait(q_empty, parity ^ 1)
        gl.thread_barrier()
        mbarrier.expect(q_full, QUERIES * 192 * 2)
        for side in gl.static_range(2):
            row = block * QUERIES + side * 64
            tma.async_copy_global_to_shared(qn_desc, [row, head * q_head], q_full, qn.index(side))
            tma.async_copy_global_to_shared(qr_desc, [row, head * q_head + 128], q_full, qr.index(side))
        parity ^= 1
        # in the order of use: the next keys before the last values
        for tile in range(1, count):
            _load_keys(kn_desc, kr_desc, kn, kr, k_full, k_empty, tile, done + tile, k_column, KEYS, STAGES)
            _load_values(v_desc, vs, v_full, v_empty, tile - 1, done + tile - 1, v_column, KEYS, STAGES)
        _load_values(v_desc, vs, v_full, v_empty, count - 1, done + count - 1, v_column, KEYS, STAGES)
        done += count


@gluon.jit
def _attend(
    mask, out, lse, qn, qr, kn, kr, vs, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, to_log2, num_queries,
    num_keys, num_heads, start, blocks, tiles, ZERO, SIDE: gl.constexpr, MASKED: gl.constexpr, TOGETHER: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, IN_TURNS: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    R: gl.constexpr = gl.SliceLayout(1, L)
    done = 0
    turn = 0
    parity = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head, block, count = _tile(t, num_keys, num_heads, start, blocks, TOGETHER, QUERIES, KEYS)
        first = block * QUERIES + SIDE * 64
        rows = first + gl.arange(0, 64, R)
        # the first tile has no product to run under
        i = done
        if MASKED:
            words = _bits(mask, first, i - done, num_queries, L)
        mbarrier.wait(q_full, parity)
        mbarrier.wait(k_full.index(i % STAGES), i // STAGES & 1)
        y = warpgroup_mma_wait(0, [_issue_scores(qn, qr, kn, kr, i, SIDE, ZERO, STAGES, L)])
        _release(k_empty.index(i % STAGES))
        if MASKED:
            y = _hide(y, words, L)
        else:
            y = gl.where(gl.arange(0, 128, gl.SliceLayout(0, L))[None, :] <= (start + rows)[:, None], y, float("-inf"))
        # finite at first: a tile without a chosen key leaves no NaN
        w, _, top = _weigh(y, gl.full((64,), -1e30, gl.float32, R), to_log2)
        total = gl.sum(w, 1)
        weights = gl.convert_layout(w.to(gl.bfloat16), A)
        acc = gl.zeros((64, 128), gl.float32, L)
        clear = (start + first + 1) // KEYS  # tiles of which every query sees every key
        for tile in range(1, count):
            acc, weights, total, top = _step(
                acc, weights, total, top, mask, qn, qr, kn, kr, vs, q_full, k_full, k_empty, v_full, v_empty, turns,
                to_log2, first, start, num_queries, clear, tile, done + tile, turn, parity, ZERO, SIDE, MASKED, KEYS,
                STAGES, IN_TURNS, L, A,
            )  # fmt: skip
            turn += 1
        _release(q_empty)  # every score is there: the next queries may come
        i = done + count - 1
        mbarrier.wait(v_full.index(i % STAGES), i // STAGES & 1)
        product = warpgroup_mma(weights, vs.index(i % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [product])
        _release(v_empty.index(i % STAGES))
        done += count
        parity ^= 1
        found = total > 0.0
        values = acc * gl.where(found, 1.0 / total, 0.0)[:, None]
        real = rows < num_queries
        place = rows.to(gl.int64) * num_heads + head
        column = gl.arange(0, 128, gl.SliceLayout(0, L))
        gl.store(out + (place * 128)[:, None] + column[None, :], values.to(gl.bfloat16), mask=real[:, None])
        natural = gl.where(found, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        gl.store(lse + place, natural, mask=real)


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "num_heads", "heads_a_group", "start", "blocks", "tiles"])
def mha_hopper_kernel(
    qn_desc, qr_desc, kn_desc, kr_desc, v_desc, mask, out, lse, to_log2, q_head, k_head, v_head, num_queries, num_keys,
    num_heads, heads_a_group, start, blocks, tiles, ZERO, MASKED: gl.constexpr, TOGETHER: gl.constexpr,
    QUERIES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, IN_TURNS: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    qn = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], qn_desc.layout)
    qr = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], qr_desc.layout)
    kn = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, 128], kn_desc.layout)
    kr = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, 64], kr_desc.layout)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, 128], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)  # both multiplying groups
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()  # TMA sees the barriers through the other proxy
    gl.warp_specialize([
        (_attend, (mask, out, lse, qn, qr, kn, kr, vs, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                   to_log2, num_queries, num_keys, num_heads, start, blocks, tiles, ZERO, 0, MASKED, TOGETHER, QUERIES,
                   KEYS, STAGES, IN_TURNS)),
        (_attend, (mask, out, lse, qn, qr, kn, kr, vs, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                   to_log2, num_queries, num_keys, num_heads, start, blocks, tiles, ZERO, 1, MASKED, TOGETHER, QUERIES,
                   KEYS, STAGES, IN_TURNS)),
        (_load, (qn_desc, qr_desc, kn_desc, kr_desc, v_desc, qn, qr, kn, kr, vs, q_full, q_empty, k_full, k_empty,
                 v_full, v_empty, q_head, k_head, v_head, num_keys, num_heads, heads_a_group, start, blocks, tiles,
                 TOGETHER, QUERIES, KEYS, STAGES)),
    ], [4, 4], [MULTIPLY_REGISTERS, LOAD_REGISTERS])  # fmt: skip


def fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether this kernel takes queries [s, h, d], keys [t, g, d] and values [t, g, c]: Hopper, a tested Triton,
    bfloat16, V3.2's widths, and rows that TMA can address without a copy."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and triton.__version__.startswith(TESTED)
        and all(x.dtype == torch.bfloat16 and _addressable(x) for x in (q, k, v))
        and (q.shape[-1], v.shape[-1]) == (DIM, VALUE)
    )


def _addressable(x: torch.Tensor) -> bool:
    """Heads beside each other within a row, everything on 16 bytes."""
    _, heads, width = x.shape
    row, head, one = x.stride()
    inside = one == 1 and width <= head and (heads - 1) * head + width <= row
    return inside and row % 8 == head % 8 == 0 and x.data_ptr() % 16 == 0


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """[rows, heads, width] as a matrix: heads beside each other, with what lies between them."""
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    layout = gl.NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(x, [x.shape[0], width], [x.stride(0), 1], [rows, columns], layout)


def mha_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    start: int,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    in_turns: bool = IN_TURNS,
    persistent: bool = PERSISTENT,
) -> None:
    """Fill out [s, h, 128] and lse [s, h] from checked arguments that fit; as `masked_mha`. Designs give the same bits.

    Memory beside them: a bit a (query, key) pair of the mask.
    """
    (s, h, _), (t, g, _) = q.shape, v.shape
    blocks = triton.cdiv(s, QUERIES)
    tiles = blocks * h
    mha_hopper_kernel[(min(tiles, num_processors(q.device)) if persistent else tiles,)](
        _descriptor(q, 64, 128), _descriptor(q, 64, 64), _descriptor(k, KEYS, 128), _descriptor(k, KEYS, 64),
        _descriptor(v, KEYS, 128), lse if mask is None else pack_mask(mask, start), out, lse,
        scale * 1.4426950408889634, q.stride(1), k.stride(1), v.stride(1), s, t, h, h // g, start, blocks, tiles, 0,
        MASKED=mask is not None, TOGETHER=math.gcd(h, HEADS_TOGETHER), QUERIES=QUERIES, KEYS=KEYS, STAGES=STAGES,
        IN_TURNS=in_turns, MULTIPLY_REGISTERS=240, LOAD_REGISTERS=24, num_warps=4,
    )  # fmt: skip

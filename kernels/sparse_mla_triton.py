"""Attention over latent rows in plain Triton: selected by id (sparse) or by page (dense decode), split and merged.

The portable form: any GPU, any head count, widths in multiples of 16, bfloat16, float16, float32 or FP8 rows.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from kernels.decode_designs import Design
from kernels.fp8_cache import PAGE, split_rows
from kernels.layout import KvLayout
from kernels.prefill_designs import PrefillDesign, prefill_default
from kernels.sparse_prefill_triton import fits, sparse_prefill

DESIGN = Design(backend="triton")


@triton.jit
def latent_attention_kernel(
    q_ptr, latent_ptr, rope_ptr, scale_ptr, ids_ptr, length_ptr, out_ptr, lse_ptr,
    softmax_scale, num_rows, num_queries, num_heads, num_ids, ids_stride, max_splits, min_split,
    LATENT_STRIDE: tl.constexpr, ROPE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, ROPE_START: tl.constexpr,
    SCALE_START: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, GROUPS: tl.constexpr, ABSORBED: tl.constexpr,
    FP8: tl.constexpr, PAGED: tl.constexpr, LENGTHS: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DECODE: tl.constexpr, RUN: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    # one program: one query, BLOCK_H heads of one group, one split of its rows
    VALUE: tl.constexpr = LATENT // GROUPS
    KEY: tl.constexpr = ROPE // GROUPS
    WIDTH: tl.constexpr = LATENT + ROPE if ABSORBED else KEY
    group_heads = num_heads // GROUPS
    tiles = tl.cdiv(group_heads, BLOCK_H)
    query = (tl.program_id(0) // (tiles * GROUPS)).to(tl.int64)
    tile = tl.program_id(0) % (tiles * GROUPS)
    group = tile // tiles
    split = tl.program_id(1)
    head = (tile % tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    real = head < group_heads
    head += group * group_heads
    cols = tl.arange(0, BLOCK_C)
    dims = tl.arange(0, BLOCK_R)
    # compile-time true where the width is a power of two: a mask of columns costs registers
    in_value = (cols < VALUE)[None, :] if VALUE < BLOCK_C else True
    in_key = (dims < KEY)[None, :] if KEY < BLOCK_R else True

    limit = num_ids
    if LENGTHS:
        limit = tl.minimum(tl.load(length_ptr + query), limit)
    rows_a_split = tl.maximum(tl.cdiv(tl.cdiv(limit, max_splits), 128) * 128, min_split)
    first = split * rows_a_split
    last = tl.minimum(first + rows_a_split, limit)
    asking = real
    if DECODE:  # a split without rows loads nothing: without a branch, which would cost registers
        if not PAGED:  # where ids are, they stand first; but all may be padding
            every = first + tl.arange(0, RUN)
            listed = tl.load(ids_ptr + query * ids_stride + every, mask=every < last, other=-1)
            last = tl.where(tl.max(tl.where(listed < num_rows, listed, -1), 0) >= 0, last, first)
        asking = tl.where(first < last, real, False)

    q_row = q_ptr + (query * num_heads + head[:, None]) * WIDTH
    if ABSORBED:
        q_latent = tl.load(q_row + cols[None, :], mask=asking[:, None] & in_value, other=0.0)
        q_rope = tl.load(q_row + LATENT + dims[None, :], mask=asking[:, None] & in_key, other=0.0)
    else:
        q_rope = tl.load(q_row + dims[None, :], mask=asking[:, None] & in_key, other=0.0)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    top = tl.full((BLOCK_H,), -1e30, tl.float32)  # finite, so that a block without a valid row leaves no NaN
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    to_log2 = softmax_scale * 1.4426950408889634

    for i in range(first, last, BLOCK_K):
        slots = i + tl.arange(0, BLOCK_K)
        inside = slots < last
        if PAGED:
            page = tl.load(ids_ptr + query * ids_stride + i // PAGE)  # a block lies in one page
            row = page * PAGE + i % PAGE + tl.arange(0, BLOCK_K)
            valid = inside & (row >= 0) & (row < num_rows)
        else:
            row = tl.load(ids_ptr + query * ids_stride + slots, mask=inside, other=-1)
            valid = (row >= 0) & (row < num_rows)
        row = tl.where(valid, row, 0).to(tl.int64)  # a masked row is never read: a stale one may hold NaN
        seen = valid[:, None] & in_value
        latent = tl.load(
            latent_ptr + row[:, None] * LATENT_STRIDE + group * VALUE + cols[None, :], mask=seen, other=0.0
        )
        rope = tl.load(
            rope_ptr + row[:, None] * ROPE_STRIDE + ROPE_START + group * KEY + dims[None, :],
            mask=valid[:, None] & in_key,
            other=0.0,
        )
        rope = rope.to(tl.float32).to(dtype) if FP8 else rope
        if FP8:
            scale_row = scale_ptr + row[:, None] * SCALE_STRIDE + SCALE_START
            if ABSORBED:
                SPAN: tl.constexpr = 128 if BLOCK_C >= 128 else BLOCK_C
                part = tl.arange(0, BLOCK_C // SPAN)
                scales = tl.load(
                    scale_row + part[None, :], mask=valid[:, None] & (part * 128 < LATENT)[None, :], other=0.0
                )
                # e4m3 becomes float16 in one instruction, bfloat16 only by way of float32
                wider: tl.constexpr = tl.float16 if dtype == tl.float16 else tl.float32
                scales = scales.to(wider)[:, :, None]
                wide = tl.reshape(latent.to(wider), (BLOCK_K, BLOCK_C // SPAN, SPAN)) * scales
                latent = tl.reshape(wide, (BLOCK_K, BLOCK_C)).to(dtype)
            else:
                scales = tl.load(scale_row + (group * VALUE + cols[None, :]) // 128, mask=seen, other=0.0)
                latent = (latent.to(tl.float32) * scales).to(dtype)
        scores = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
        if ABSORBED:
            scores = tl.dot(q_latent, tl.trans(latent), scores, input_precision="ieee")
        scores = tl.where(valid[None, :], scores * to_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), latent, acc * fade[:, None], input_precision="ieee")
        top = new_top

    found = total != 0.0  # a NaN is passed on
    acc = acc / tl.where(found, total, 1.0)[:, None]
    lse = tl.where(found, top * 0.6931471805599453 + tl.log(tl.where(found, total, 1.0)), float("-inf"))
    at = (split * num_queries + query) * num_heads + head
    if out_ptr.dtype.element_ty == tl.float16:
        acc = tl.clamp(acc, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(
        out_ptr + at[:, None] * VALUE + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(real if DIRECT else real & found)[:, None] & in_value,  # the merge does not read where lse is -inf
    )
    tl.store(lse_ptr + at, lse, mask=real)


@triton.jit
def merge_splits_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, num_heads_total, num_splits, VALUE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    # one program: one head of one query; splits are added in order, and one without rows (-inf) is not read: it would
    # change no bit, and nobody has written it
    head = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    in_value = cols < VALUE
    splits = tl.arange(0, BLOCK_S)
    every = tl.load(part_lse_ptr + splits * num_heads_total + head, mask=splits < num_splits, other=float("-inf"))
    if tl.max((every != float("-inf")).to(tl.int32), 0) == 0:
        tl.store(out_ptr + head * VALUE + cols, tl.zeros((BLOCK_C,), out_ptr.dtype.element_ty), mask=in_value)
        tl.store(lse_ptr + head, float("-inf"))
        return
    top = tl.max(every, 0)  # passes over NaN, which comes back with its split's weight
    total = 0.0
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.static_range(BLOCK_S):  # unrolled: all loads are in flight together
        at = tl.minimum(i, num_splits - 1) * num_heads_total + head
        lse = tl.where(num_splits > i, tl.load(part_lse_ptr + at), float("-inf"))
        weight = tl.exp(lse - top)
        part = tl.load(part_ptr + at * VALUE + cols, mask=cols < tl.where(lse != float("-inf"), VALUE, 0), other=0.0)
        acc += weight * part.to(tl.float32)
        total += weight
    tl.store(out_ptr + head * VALUE + cols, (acc / total).to(out_ptr.dtype.element_ty), mask=in_value)
    tl.store(lse_ptr + head, top + tl.log(total))


def tile_options(heads: int, layout: KvLayout, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages for one shape; a function of shapes alone.

    64 heads x 64 rows, 8 warps, 2 stages fills the shared memory at V3.2's width; 32 rows lose a third of the speed
    (measured on an H100, bfloat16 rows). BLOCK_K divides 64: a block of a paged cache lies in one page.
    """
    block_c = max(16, triton.next_power_of_2(layout.latent_dim // layout.groups))
    block_r = max(16, triton.next_power_of_2(layout.rope_dim // layout.groups))
    block_h = min(64, max(16, triton.next_power_of_2(heads // layout.groups)))
    block_k = 64
    warps = 8 if block_h == 64 and block_c >= 256 else 4
    if dtype == torch.float32:
        block_h, block_k, warps = 16, 16 if block_c > 128 else 32, 4
    return {
        "BLOCK_H": block_h, "BLOCK_K": block_k, "BLOCK_C": block_c, "BLOCK_R": block_r,
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


def latent_attention(
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
    prefill: PrefillDesign | None = None,
) -> None:
    """Launch the kernel on checked arguments; fills out and lse.

    Args:
        q: [s, h, d]. kv: [t, layout.width], or [t, row_bytes] uint8 for an FP8 cache.
        ids: [s, k] rows to read (-1: none), or with paged the pages of each query in order, [s, pages].
        lengths: [s] int32, entries of ids (with paged: tokens) to read, or None for all of them.
        out: [s, h, c] in q's dtype. lse: [s, h] float32, natural log; -inf where no row was read.
        split: work on at least design.split rows apart and merge; else one pass a query.
        prefill: how to run with neither paged nor split, None for the fastest measured way.
    """
    prefill = prefill or prefill_default(layout)
    if prefill.halved and not (paged or split) and fits(q, kv, layout):
        tile = tile_options(q.shape[1], layout, q.dtype)
        return sparse_prefill(q, kv, ids, lengths, layout, scale, out, lse, tile, prefill)
    s, h, _ = q.shape
    limit = ids.shape[1] * (PAGE if paged else 1)
    (splits, max_splits, min_split), part, part_lse = plan_splits(
        ids, out, lse, paged=paged, split=split, design=design
    )
    fp8 = kv.dtype == torch.uint8
    if fp8:
        latent, scales, rope = split_rows(kv, layout)
        groups = -(-layout.latent_dim // 128)
        rope_start, scale_start = (layout.latent_dim + 4 * groups) // 2, layout.latent_dim // 4
        q = q.to(design.products) if q.dtype == torch.bfloat16 else q
    else:
        latent = rope = scales = kv
        rope_start, scale_start = layout.latent_dim, 0
    options = tile_options(h, layout, q.dtype)
    tiles = triton.cdiv(h // layout.groups, options["BLOCK_H"]) * layout.groups
    latent_attention_kernel[(s * tiles, splits)](
        q, latent, rope, scales, ids, lengths if lengths is not None else ids, part, part_lse,
        scale, kv.shape[0], s, h, limit, ids.stride(0), max_splits, min_split,
        # constants, or the compiler could not prove that a row's pieces are aligned and would load them by twos
        LATENT_STRIDE=latent.stride(0), ROPE_STRIDE=rope.stride(0), SCALE_STRIDE=scales.stride(0),
        ROPE_START=rope_start, SCALE_START=scale_start,
        LATENT=layout.latent_dim, ROPE=layout.rope_dim, GROUPS=layout.groups, ABSORBED=layout.absorbed, FP8=fp8,
        PAGED=paged, LENGTHS=lengths is not None, PAGE=PAGE, DECODE=split,
        RUN=triton.next_power_of_2(max(128, min_split)), DIRECT=part is out, **options,
    )  # fmt: skip
    if part is not out:
        merge_splits(part, part_lse, out, lse)


def plan_splits(
    ids: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *, paged: bool, split: bool, design: Design
) -> tuple[tuple[int, int, int], torch.Tensor, torch.Tensor]:
    """(splits of this launch, most splits, least rows a split), and where they write: out and lse, or partial results.

    A run of rows is max(least, ceil(limit / most)) long, a function of the query's own limit alone.
    """
    if not split:
        return (1, 1, 0), out, lse
    limit = ids.shape[1] * (PAGE if paged else 1)
    splits = max(1, -(-limit // design.split))
    most = design.max_splits if paged else splits
    splits = min(splits, most)
    # one split needs no merge, but float16 rounds: a page table made wider by another request must change no bit
    if splits == 1 and design.partials == torch.float32:
        return (1, most, design.split), out, lse
    part = torch.empty(splits, *out.shape, dtype=design.partials, device=out.device)
    return (splits, most, design.split), part, torch.empty(splits, *lse.shape, dtype=torch.float32, device=out.device)


def merge_splits(part: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Join partial attentions over disjoint rows: [n, s, h, c] and their log-sums [n, s, h] into out and lse."""
    n, s, h, c = part.shape
    merge_splits_kernel[(s * h,)](
        part, part_lse, out, lse, s * h, n,
        VALUE=c, BLOCK_C=triton.next_power_of_2(c), BLOCK_S=triton.next_power_of_2(n), num_warps=4 if c >= 256 else 1,
    )  # fmt: skip

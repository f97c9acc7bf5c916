"""Sparse prefill over plain latent rows in Triton, where each warp group computes half of a tile's scores.

`sparse_mla_triton` covers every form; this one is in use for DeepSeek-V3.2's widths.
"""
# Triton's decorators and kernel arguments have no types
# mypy: ignore-errors

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from kernels.layout import KvLayout
from kernels.prefill_designs import PrefillDesign


@triton.jit
def sparse_prefill_kernel(
    q_ptr, kv_ptr, ids_ptr, length_ptr, out_ptr, lse_ptr, softmax_scale, num_rows, num_heads, num_ids, ids_stride,
    ROW_STRIDE: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, LENGTHS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    # one program: one query, BLOCK_H heads; the head tiles of a query are neighbours, so that its rows stay in L2
    tiles = tl.cdiv(num_heads, BLOCK_H)
    query = (tl.program_id(0) // tiles).to(tl.int64)
    head = (tl.program_id(0) % tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    real = head < num_heads
    cols = tl.arange(0, LATENT)
    dims = tl.arange(0, ROPE)
    slots = tl.arange(0, BLOCK_K)
    limit = num_ids
    if LENGTHS:
        limit = tl.minimum(tl.load(length_ptr + query), limit)

    q_row = q_ptr + (query * num_heads + head[:, None]) * (LATENT + ROPE)
    q_latent = tl.load(q_row + cols[None, :], mask=real[:, None], other=0.0)
    # Triton lets every warp group compute all columns of a product whose result reaches another product. So the two
    # parts of the scores are subtracted, one of them negated: as a sum they would be chained; and below is a branch
    q_rope = -tl.load(q_row + LATENT + dims[None, :], mask=real[:, None], other=0.0)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    top = tl.full((BLOCK_H,), -1e30, tl.float32)  # finite, so that a block without a valid row leaves no NaN
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, LATENT), tl.float32)
    to_log2 = softmax_scale * 1.4426950408889634
    listed = ids_ptr + query * ids_stride + slots
    if AHEAD:
        ahead = tl.load(listed, mask=slots < limit, other=-1)

    for i in range(0, limit, BLOCK_K):
        if AHEAD:
            row = ahead
            ahead = tl.load(listed + i + BLOCK_K, mask=i + BLOCK_K + slots < limit, other=-1)
        else:
            row = tl.load(listed + i, mask=i + slots < limit, other=-1)
        valid = row.to(tl.uint32, bitcast=True) < num_rows  # -1 is the largest number: one test instead of two
        row = tl.where(valid, row, 0).to(tl.int64)  # a masked row is never read: a stale one may hold NaN
        key = kv_ptr + row[:, None] * ROW_STRIDE
        latent = tl.load(key + cols[None, :], mask=valid[:, None], other=0.0)
        rope = tl.load(key + LATENT + dims[None, :], mask=valid[:, None], other=0.0)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        scores -= tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
        if i < limit:  # always: the branch hides the next product from the scores', and is gone from the machine code
            scores = tl.where(valid[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * to_log2)
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores * to_log2 - new_top[:, None])
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), latent, acc * fade[:, None], input_precision="ieee")
        top = new_top

    found = total != 0.0  # a NaN is passed on
    total = tl.where(found, total, 1.0)
    acc = acc / total[:, None]
    lse = tl.where(found, top * 0.6931471805599453 + tl.log(total), float("-inf"))
    at = query * num_heads + head
    if dtype == tl.float16:
        acc = tl.clamp(acc, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + at[:, None] * LATENT + cols[None, :], acc.to(dtype), mask=real[:, None])
    tl.store(lse_ptr + at, lse, mask=real)


def fits(q: torch.Tensor, kv: torch.Tensor, layout: KvLayout) -> bool:
    """Whether the kernel takes these tensors: a plain cache, absorbed, one group, widths that are powers of two."""
    powers = all(n >= 16 and n & (n - 1) == 0 for n in (layout.latent_dim, layout.rope_dim))
    return powers and layout.absorbed and layout.groups == 1 and kv.dtype == q.dtype


def sparse_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    lengths: torch.Tensor | None,
    layout: KvLayout,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    tile: Mapping[str, int],
    design: PrefillDesign,
) -> None:
    """Launch the kernel on checked arguments that fit; fills out and lse. Arguments as `latent_attention`'s.

    tile: what `sparse_mla_triton.tile_options` gives for them.
    """
    s, h, _ = q.shape
    sparse_prefill_kernel[(s * triton.cdiv(h, tile["BLOCK_H"]),)](
        q, kv, ids, lengths if lengths is not None else ids, out, lse, scale, kv.shape[0], h, ids.shape[1],
        ids.stride(0), ROW_STRIDE=kv.stride(0), LATENT=layout.latent_dim, ROPE=layout.rope_dim,
        LENGTHS=lengths is not None, BLOCK_H=tile["BLOCK_H"], BLOCK_K=tile["BLOCK_K"], AHEAD=design.ids_ahead,
        num_warps=tile["num_warps"], num_stages=tile["num_stages"],
    )  # fmt: skip

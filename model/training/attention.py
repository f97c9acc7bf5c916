"""Attention of whole batches with gradients: dense in one fused call, sparse in chunks of rows that are recomputed."""

from typing import Any

import torch
import torch.nn.functional as F

import kernels.topk
from kernels.indexer_kl import index_logits

CHUNK_ELEMENTS = 1 << 25  # [b, rows, t] elements of one chunk's scores or mask
ALIGNED = 16  # rows of scores start at multiples of 64 bytes, which kernels read faster


def chunks(batch: int, length: int) -> list[slice]:
    """Rows of a sequence in chunks; memory beyond the inputs is linear in the length."""
    step = max(1, CHUNK_ELEMENTS // (batch * length))
    step -= step % ALIGNED if step > ALIGNED else 0
    return [slice(top, min(top + step, length)) for top in range(0, length, step)]


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention: q, k [b, h, l, d], v [b, h, l, d] (padded to the keys' width) -> [b, h, l, d]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


@torch.no_grad()
def select_ids(index_q: torch.Tensor, index_k: torch.Tensor, index_w: torch.Tensor, topk: int) -> torch.Tensor:
    """The `topk` best visible keys of every row, [b, l, topk] int32: index_q [b, l, h, d], index_k [b, l, d].

    The choice is that of `kernels.topk`. A row with fewer visible keys names others beside them, which `support_mask`
    drops.
    """
    b, length = index_q.shape[:2]
    ids = torch.empty(b, length, topk, dtype=torch.int32, device=index_q.device)
    cols = torch.arange(length, dtype=torch.int32, device=index_q.device)
    for rows in chunks(b, length):
        if rows.stop <= topk:
            ids[:, rows] = cols[:topk]
            continue
        scores = index_logits(index_q[:, rows], index_k[:, : rows.stop], index_w[:, rows])
        visible = (cols[rows] + 1).repeat(b)
        chosen = kernels.topk.topk(scores.flatten(0, 1), topk, visible).unflatten(0, (b, -1))
        ids[:, rows] = torch.where(chosen < 0, cols[:topk], chosen)
    return ids


def _bias(ids: torch.Tensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """0 for selected and visible keys of a chunk of rows, -inf for others: [b, 1, r, rows.stop], one for all heads."""
    cols = torch.arange(rows.stop, device=ids.device)
    hidden = cols > cols[rows, None]
    if rows.stop <= ids.shape[-1]:
        bias = torch.zeros(ids.shape[0], *hidden.shape, dtype=dtype, device=ids.device)
    else:
        bias = torch.full((ids.shape[0], *hidden.shape), float("-inf"), dtype=dtype, device=ids.device)
        bias.scatter_(-1, ids[:, rows].long(), 0.0)
    return bias.masked_fill_(hidden, float("-inf"))[:, None]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, rows: slice, scale: float
) -> torch.Tensor:
    """One chunk: its queries, all keys and values up to its end."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_bias(ids, rows, q.dtype), scale=scale)


class _SelectedAttention(torch.autograd.Function):
    """Keeps ids and inputs; the backward pass runs each chunk once more."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, ids)
        ctx.scale = scale
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        for rows in chunks(q.shape[0], q.shape[2]):
            seen = slice(0, rows.stop)
            out[:, :, rows] = _attend(q[:, :, rows], k[:, :, seen], v[:, :, seen], ids, rows, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, ids = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        # several chunks add to the same keys: their sum is kept in float32
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for rows in chunks(q.shape[0], q.shape[2]):
            seen = slice(0, rows.stop)
            with torch.enable_grad():
                one, keys, values = (x.detach().requires_grad_() for x in (q[:, :, rows], k[:, :, seen], v[:, :, seen]))
                out = _attend(one, keys, values, ids, rows, ctx.scale)
                found = torch.autograd.grad(out, (one, keys, values), grads[0][:, :, rows])
            grad_q[:, :, rows] = found[0]
            grad_k[:, :, seen] += found[1]
            grad_v[:, :, seen] += found[2]
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def selected_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention over the selected visible keys: q, k, v [b, h, l, d], ids [b, l, k] -> [b, h, l, d].

    Nothing of size l x l beyond a chunk is held between the passes.
    """
    out: torch.Tensor = _SelectedAttention.apply(q, k, v, ids, scale)  # type: ignore[no-untyped-call]
    return out

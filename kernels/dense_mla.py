"""Attention over every visible key, or over a mask of them: the masked form of sparse attention."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F


def dense_mla_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, start: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain meaning of `dense_mla`: softmax(scale * q . k) v over visible (and selected) keys; float32, quadratic."""
    s, h, _ = q.shape
    t, g, _ = k.shape
    heads = torch.arange(h) // (h // g)
    scores = torch.einsum("shd,thd->hst", q.float(), k.float()[:, heads]) * scale
    visible = torch.arange(t)[None, :] <= start + torch.arange(s)[:, None]
    scores = scores.masked_fill(~(visible if mask is None else visible & mask), float("-inf"))
    return torch.einsum("hst,thc->shc", scores.softmax(-1), v.float()[:, heads])


def dense_mla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, start: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend to keys 0..start + i, or to those of them in `mask`.

    Args:
        q: queries, [s, h, d]; head j belongs to group j // (h / g).
        k: keys, [t, g, d], t == start + s: one group for absorbed MLA, h groups for the MHA form.
        v: values, [t, g, c].
        scale: softmax scale; for MLA always that of the MHA form, whatever d is.
        start: position of q[0].
        mask: [s, t] bool, true where a key is selected; every row needs at least one visible key.

    Returns:
        [s, h, c] in q's dtype. Peak memory: a few float32 [s, t] and one head's keys beside the inputs.
    """
    s, h, d = q.shape
    t, g, c = v.shape
    width = max(d, c)  # one width for q, k and v, or torch leaves its fused kernel
    if s == 1 and mask is None:  # one query: a group's heads are the rows of one small attention
        one = F.pad(q, (0, width - d)).view(g, 1, h // g, width)
        keys, values = (F.pad(x, (0, width - x.shape[-1])).transpose(0, 1).unsqueeze(1) for x in (k, v))
        return F.scaled_dot_product_attention(one, keys, values, scale=scale)[..., :c].reshape(1, h, c)
    bias = torch.zeros(s, t, dtype=torch.float32, device=q.device)
    if mask is not None:
        bias.masked_fill_(~mask, float("-inf"))
    future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu_(1)
    bias[:, start:].masked_fill_(future, float("-inf"))
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        return _head_by_head(q, k, v, scale, bias)
    grouped = F.pad(q, (0, width - d)).unflatten(1, (g, h // g)).permute(1, 2, 0, 3)  # [g, m, s, d]
    keys = F.pad(k, (0, width - d)).permute(1, 0, 2).unsqueeze(1).expand(g, h // g, t, width)
    values = F.pad(v, (0, width - c)).permute(1, 0, 2).unsqueeze(1).expand(g, h // g, t, width)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias.to(q.dtype), scale=scale)
    return out[..., :c].permute(2, 0, 1, 3).reshape(s, h, c)


def _head_by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor) -> torch.Tensor:
    """The same in bfloat16 on a CPU, with whole rows of scores: three times the speed of torch's fused kernel there."""
    s, h, _ = q.shape
    t, g, c = v.shape
    out = torch.empty(s, h, c, dtype=q.dtype)
    # kept for all heads: fresh memory costs more than the products
    scores, p, rounded = torch.empty(s, t), torch.empty(s, t), torch.empty(s, t, dtype=v.dtype)
    with exact_bfloat16_products():
        for group in range(g):
            keys, values = k[:, group].float().T, v[:, group]
            for head in range(group * (h // g), (group + 1) * (h // g)):
                torch.mm(q[:, head].float(), keys, out=scores)
                torch.softmax(torch.add(bias, scores, alpha=scale, out=scores), -1, out=p)
                out[:, head] = rounded.copy_(p) @ values
    return out


@contextlib.contextmanager
def exact_bfloat16_products() -> Iterator[None]:
    """Float32 products of values that are exact in bfloat16 use its units: sums and results stay float32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before

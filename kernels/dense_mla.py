"""Attention over every visible key, or over a mask of them: the masked form of sparse attention."""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernels.check import check_tensor
from kernels.dense_prefill import PrefillBackend, causal_by_cudnn, choose_prefill, cudnn_fits, hopper_fits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dense_mla_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, start: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain meaning of `dense_mla`: softmax(scale * q . k) v over visible (and selected) keys; float32, quadratic."""
    s, h, _ = q.shape
    t, g, _ = k.shape
    heads = torch.arange(h, device=q.device) // (h // g)
    scores = torch.einsum("shd,thd->hst", q.float(), k.float()[:, heads]) * scale
    visible = torch.arange(t, device=q.device)[None, :] <= start + torch.arange(s, device=q.device)[:, None]
    scores = scores.masked_fill(~(visible if mask is None else visible & mask), float("-inf"))
    return torch.einsum("hst,thc->shc", scores.softmax(-1), v.float()[:, heads])


def dense_mla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    start: int,
    mask: torch.Tensor | None = None,
    *,
    backend: PrefillBackend = "auto",
) -> torch.Tensor:
    """Attend to keys 0..start + i, or to those of them in `mask`.

    Args:
        q: queries, [s, h, d], bfloat16, float16 or float32; head j belongs to group j // (h / g).
        k: keys, [t, g, d], t == start + s: one group for absorbed MLA, h groups for the MHA form. Its last axis and
            that of q and v are packed, the others may have any stride.
        v: values, [t, g, c].
        scale: softmax scale, above 0; for MLA always that of the MHA form, whatever d is.
        start: position of q[0].
        mask: [s, t] bool, true where a key is selected; every row needs at least one visible key.
        backend: "auto" takes what `choose_prefill` says. "hopper" is for an H100, bfloat16 and widths of 192 and 128.

    Returns:
        [s, h, c] in q's dtype. Peak memory: on a CPU a few float32 [s, t] and one head's keys beside the inputs (with
        AMX a copy of the values), on a GPU two results, under a mask hopper also takes a bit a (query, key) pair.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    _check(q, k, v, scale, start, mask)
    best = choose_prefill(q, k, v, masked=mask is not None)
    backend = best if backend == "auto" else backend
    if backend not in ("torch", best) and not _takes(backend, q, k, v, mask is not None):
        known = " or ".join(sorted({best, "torch"}))
        raise ValueError(f"dense_mla: expected backend {known} for these tensors on {q.device}, got {backend}")
    if backend == "torch":
        return _by_torch(q, k, v, scale, start, mask)
    if backend == "cudnn":
        return causal_by_cudnn(q, k, v, scale, start)[0]
    if backend == "triton":
        from kernels.masked_mha_triton import masked_mha as launch
    else:
        from kernels.mha_hopper import mha_hopper as launch

    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    launch(q, k, v, scale, start, mask, out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))
    return out


def _takes(backend: PrefillBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masked: bool) -> bool:
    """Whether a backend that is not the first choice can take the tensors all the same."""
    if backend == "cudnn":
        return not masked and cudnn_fits(q, k, v)
    return hopper_fits(q, k, v) if backend == "hopper" else q.is_cuda


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, start: int, mask: torch.Tensor | None
) -> None:
    check_tensor("dense_mla", "q", q, ("s", "h", "d"), DTYPES, q.device, contiguous=False)
    s, h, d = q.shape
    check_tensor("dense_mla", "k", k, (start + s, "g", d), (q.dtype,), q.device, contiguous=False)
    check_tensor("dense_mla", "v", v, (start + s, k.shape[1], "c"), (q.dtype,), q.device, contiguous=False)
    if h % k.shape[1]:
        raise ValueError(f"dense_mla: expected q's heads to be a multiple of k's {k.shape[1]} groups, got {h}")
    if mask is not None:
        check_tensor("dense_mla", "mask", mask, (s, start + s), (torch.bool,), q.device, contiguous=False)
    if not scale > 0.0:
        raise ValueError(f"dense_mla: expected scale above 0, got {scale}")


def _by_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, start: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """The CPU path: torch's fused attention, one key head a group."""
    s, h, d = q.shape
    t, g, c = v.shape
    width = max(d, c)  # one width for q, k and v, or torch leaves its fused kernel
    if s == 1 and mask is None:  # one query: a group's heads are the rows of one small attention
        one = _widened(q, width).view(g, 1, h // g, width)
        keys, values = (_widened(x, width).transpose(0, 1).unsqueeze(1) for x in (k, v))
        return F.scaled_dot_product_attention(one, keys, values, scale=scale)[..., :c].reshape(1, h, c)
    bias = torch.zeros(s, t, dtype=torch.float32, device=q.device)
    if mask is not None:
        bias.masked_fill_(~mask, float("-inf"))
    future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu_(1)
    bias[:, start:].masked_fill_(future, float("-inf"))
    if q.dtype == torch.bfloat16 and not q.is_cuda and not has_amx():
        return _head_by_head(q, k, v, scale, bias)
    grouped = _widened(q, width).unflatten(1, (g, h // g)).permute(1, 2, 0, 3)  # [g, m, s, d]
    keys = _widened(k, width).permute(1, 0, 2).unsqueeze(1).expand(g, h // g, t, width)
    values = _widened(v, width).permute(1, 0, 2).unsqueeze(1).expand(g, h // g, t, width)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias.to(q.dtype), scale=scale)
    return out[..., :c].permute(2, 0, 1, 3).reshape(s, h, c)


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros behind the last axis up to `width`. Where none are missing F.pad makes a copy: on a GPU its attention wants
    packed rows, on a CPU it would only cost."""
    return F.pad(x, (0, width - x.shape[-1])) if x.is_cuda or x.shape[-1] < width else x


@functools.cache
def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 tiles (AMX), which torch's fused attention uses."""
    return bool(torch.cpu._is_amx_tile_supported())


def _head_by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor) -> torch.Tensor:
    """The same in bfloat16, with whole rows of scores: three times the speed of torch's fused kernel on a CPU without
    AMX, half of it on one with AMX."""
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

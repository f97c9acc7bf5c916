"""Dense decode over a paged latent cache: one query a request reads every token of its own pages."""

import torch

from kernels.check import check_range, check_tensor
from kernels.decode_designs import DENSE_DEFAULT, Design
from kernels.fp8_cache import PAGE, row_bytes, unpack_rows
from kernels.layout import KvLayout
from kernels.sparse_mla import DTYPES, Backend, gpu_kernel, resolve_backend


def dense_decode_reference(
    q: torch.Tensor, kv: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, layout: KvLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain meaning of `dense_decode`: a softmax over each request's tokens, one after another; float32."""
    b, h, _ = q.shape
    heads = torch.arange(h, device=q.device) // (h // layout.groups)
    out = torch.zeros(b, h, layout.latent_dim // layout.groups, device=q.device)
    lse = torch.full((b, h), float("-inf"), device=q.device)
    for i in range(b):
        n = int(lengths[i])
        if n == 0:
            continue
        rows = kv[pages[i, : -(-n // PAGE)].long()].flatten(0, 1)[:n]
        rows = unpack_rows(rows, layout) if rows.dtype == torch.uint8 else rows.float()
        scores = torch.einsum("hd,thd->ht", q[i].float(), layout.keys(rows)[:, heads]) * scale
        out[i] = torch.einsum("ht,thc->hc", scores.softmax(-1), layout.values(rows)[:, heads])
        lse[i] = scores.logsumexp(-1)
    return out, lse


def dense_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    layout: KvLayout,
    scale: float,
    *,
    check_ids: bool = True,
    backend: Backend = "auto",
    design: Design | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to all cached tokens of each request.

    Args:
        q: one query a request in the cache's basis, [b, h, d] (absorbed for MLA), bfloat16, float16 or float32.
        kv: the cache's pages, [p, 64, layout.width] in q's dtype or [p, 64, row_bytes] uint8 (`fp8_cache`).
        pages: pages of each request in order, [b, n], int32; entries behind the last needed one do not matter.
        lengths: tokens of each request, [b], int32, 0..64 n. The new token counts: it must be in the cache.
        layout, scale: as for `sparse_mla`.
        check_ids: look at pages and lengths; on a GPU this waits for the device. Unchecked, a page outside the cache
            counts as not there.
        backend, design: as for `sparse_mla`.

    Returns:
        (out [b, h, c] in q's dtype, lse [b, h] float32, natural log); zeros and -inf for a request of length 0.
        A request's bits depend on its own tokens alone: splits are a function of its length.
        Peak memory on a GPU: at most design.max_splits copies of out in design.partials, 32 in float32 by default.

    Raises:
        ValueError: a shape, dtype, device, stride, page or length that does not fit.
    """
    width = layout.width if layout.absorbed else layout.rope_dim // layout.groups
    check_tensor("dense_decode", "q", q, ("b", "h", width), DTYPES, q.device)
    b, h, _ = q.shape
    fp8 = kv.dtype == torch.uint8
    wide = row_bytes(layout) if fp8 else layout.width
    check_tensor("dense_decode", "kv", kv, ("p", PAGE, wide), (q.dtype, torch.uint8), q.device)
    check_tensor("dense_decode", "pages", pages, (b, "n"), (torch.int32,), q.device)
    check_tensor("dense_decode", "lengths", lengths, (b,), (torch.int32,), q.device)
    if h % layout.groups:
        raise ValueError(f"dense_decode: expected q's heads to be a multiple of {layout.groups} groups, got {h}")
    if not scale > 0.0:
        raise ValueError(f"dense_decode: expected scale above 0, got {scale}")
    if check_ids:
        check_range("dense_decode", "lengths", lengths, 0, pages.shape[1] * PAGE + 1)
        needed = torch.arange(pages.shape[1], device=q.device)[None, :] * PAGE < lengths[:, None]
        check_range("dense_decode", "pages", torch.where(needed, pages, 0), 0, max(1, kv.shape[0]))
    out = torch.empty(b, h, layout.latent_dim // layout.groups, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or pages.shape[1] == 0 or kv.shape[0] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    design = design or DENSE_DEFAULT["fp8" if fp8 else "plain"]
    backend = resolve_backend("dense_decode", backend, q, kv, layout, design)
    if backend == "torch":
        values, sums = dense_decode_reference(q, kv, pages, lengths, layout, scale)
        return values.to(q.dtype), sums
    launch = gpu_kernel(backend, kv)
    launch(q, kv.flatten(0, 1), pages, lengths, layout, scale, out, lse, paged=True, split=True, design=design)
    return out, lse

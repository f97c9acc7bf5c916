"""Attention over gathered keys: each query reads only the rows it selected."""

from collections.abc import Callable
from typing import Literal

import torch

from kernels.check import check_range, check_tensor
from kernels.decode_designs import SPARSE_DEFAULT, Design
from kernels.fp8_cache import row_bytes, unpack_rows
from kernels.layout import KvLayout
from kernels.switch import takes_kernels

GATHER_BYTES = 32 << 20  # rows gathered at a time
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Backend = Literal["auto", "hopper", "triton", "torch"]


def sparse_mla_reference(
    q: torch.Tensor, kv: torch.Tensor, ids: torch.Tensor, layout: KvLayout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain meaning of `sparse_mla_lse`: one softmax per query and head over the valid ids; float32, a loop."""
    s, h, _ = q.shape
    keys, values = layout.keys(kv.float()), layout.values(kv.float())
    out = torch.zeros(s, h, values.shape[-1], device=q.device)
    lse = torch.full((s, h), float("-inf"), device=q.device)
    for i in range(s):
        chosen = ids[i][ids[i] >= 0].long()
        for j in range(h):
            group = j // (h // layout.groups)
            if len(chosen):
                scores = keys[chosen, group] @ q[i, j].float() * scale
                out[i, j] = scores.softmax(0) @ values[chosen, group]
                lse[i, j] = scores.logsumexp(0)
    return out, lse


def sparse_mla(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    layout: KvLayout,
    scale: float,
    *,
    lengths: torch.Tensor | None = None,
    decode: bool = False,
    check_ids: bool = True,
    backend: Backend = "auto",
    design: Design | None = None,
) -> torch.Tensor:
    """Attend to the selected rows of the latent cache. Arguments, errors: `sparse_mla_lse`; its first result."""
    return _attend(q, kv, ids, layout, scale, lengths, decode, check_ids, backend, design, with_lse=False)[0]


def sparse_mla_lse(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    layout: KvLayout,
    scale: float,
    *,
    lengths: torch.Tensor | None = None,
    decode: bool = False,
    check_ids: bool = True,
    backend: Backend = "auto",
    design: Design | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the selected rows of the latent cache, and say how much weight they had.

    Args:
        q: queries in the cache's basis, [s, h, d] (absorbed for MLA), bfloat16, float16 or float32.
        kv: latent cache, [t, layout.width] in q's dtype, or the FP8 cache [t, row_bytes] uint8 (`fp8_cache`). For a
            paged cache t is pages x 64 and an id is 64 * page + place in the page.
        ids: rows to read, [s, k], int32, -1 is padding; never a future row, no row twice.
        layout: where keys and values lie in a row.
        scale: softmax scale of the MHA form, above 0.
        lengths: [s] int32, how many leading ids count, 0..k; None for all.
        decode: few queries: split each one's ids in runs of design.split, 512 by default, and merge, so that they fill
            the GPU. Changes last bits, whatever the batch: a row's result never depends on the other rows.
        check_ids: look at every id and length. On a GPU this waits for the device: pass False where they come
            straight from `topk`. The GPU kernels never read a row outside kv, they count such an id as padding.
        backend: "auto" takes the design's where the shapes fit, else triton, and torch on a CPU.
        design: how to decode on a GPU, one of `decode_designs`; None for the fastest measured one.

    Returns:
        (out [s, h, c] in q's dtype, lse [s, h] float32: log of the sum of exp(scale * score), natural).
        A query without a valid id gets zeros and -inf. Softmax in float32.
        Peak memory: on a CPU 32 MiB of gathered rows (or one query's) beside the inputs; on a GPU nothing, or with
        decode ceil(k / design.split) copies of out in design.partials, 4 in float32 by default.

    Raises:
        ValueError: a shape, dtype, device, stride, id or length that does not fit.
    """
    return _attend(q, kv, ids, layout, scale, lengths, decode, check_ids, backend, design, with_lse=True)


def _attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    layout: KvLayout,
    scale: float,
    lengths: torch.Tensor | None,
    decode: bool,
    check_ids: bool,
    backend: Backend,
    design: Design | None,
    *,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check("sparse_mla", q, kv, ids, layout, scale, lengths, check_ids)
    s, h, _ = q.shape
    width = layout.latent_dim // layout.groups
    out = torch.empty(s, h, width, dtype=q.dtype, device=q.device)
    lse = torch.empty(s, h, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or ids.shape[1] == 0 or kv.shape[0] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    design = design or SPARSE_DEFAULT["fp8" if kv.dtype == torch.uint8 else "plain"]
    backend = resolve_backend("sparse_mla", backend, q, kv, layout, design)
    if backend == "torch":
        _gathered(q, kv, ids, lengths, layout, scale, out, lse if with_lse else None)
    else:
        launch = gpu_kernel(backend, kv)
        launch(q, kv, ids, lengths, layout, scale, out, lse, split=decode, design=design)
    return out, lse


def _check(
    where: str,
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    layout: KvLayout,
    scale: float,
    lengths: torch.Tensor | None,
    check_ids: bool,
) -> None:
    width = layout.width if layout.absorbed else layout.rope_dim // layout.groups
    check_tensor(where, "q", q, ("s", "h", width), DTYPES, q.device)
    s, h, _ = q.shape
    if h % layout.groups:
        raise ValueError(f"{where}: expected q's heads to be a multiple of {layout.groups} groups, got {h}")
    fp8 = isinstance(kv, torch.Tensor) and kv.dtype == torch.uint8
    check_tensor(where, "kv", kv, ("t", row_bytes(layout) if fp8 else layout.width), (q.dtype, torch.uint8), q.device)
    check_tensor(where, "ids", ids, (s, "k"), (torch.int32,), q.device)
    if lengths is not None:
        check_tensor(where, "lengths", lengths, (s,), (torch.int32,), q.device)
    if not scale > 0.0:
        raise ValueError(f"{where}: expected scale above 0, got {scale}")
    if check_ids:
        check_range(where, "ids", ids, -1, kv.shape[0])
        if lengths is not None:
            check_range(where, "lengths", lengths, 0, ids.shape[1] + 1)


def choose_backend(q: torch.Tensor, kv: torch.Tensor, layout: KvLayout, design: Design | None = None) -> Backend:
    """The form that a design takes for these tensors: a function of device, dtypes and widths alone."""
    design = design or SPARSE_DEFAULT["fp8" if kv.dtype == torch.uint8 else "plain"]
    if not takes_kernels(q):
        return "torch"
    return "hopper" if design.backend == "hopper" and _hopper_fits(q, kv, layout) else "triton"


def _hopper_fits(q: torch.Tensor, kv: torch.Tensor, layout: KvLayout) -> bool:
    try:
        from kernels.sparse_mla_hopper import fits
    except ImportError:  # a Triton without Gluon
        return False
    fitting: bool = fits(q, kv, layout)
    return fitting


def resolve_backend(
    where: str, backend: Backend, q: torch.Tensor, kv: torch.Tensor, layout: KvLayout, design: Design | None = None
) -> Backend:
    """The backend asked for, or `choose_backend`'s for "auto".

    Raises:
        ValueError: it cannot take these tensors.
    """
    if backend == "auto":
        return choose_backend(q, kv, layout, design)
    if backend != "torch" and not q.is_cuda:
        raise ValueError(f"{where}: expected q on a GPU for backend {backend}, got {q.device}")
    if backend == "hopper" and not _hopper_fits(q, kv, layout):
        raise ValueError(
            f"{where}: expected for backend hopper an H100 or H200, bfloat16 q, bfloat16 or FP8 kv, latent 512, rope "
            f"64 and heads in multiples of 64, got q {list(q.shape)} {q.dtype}, kv {kv.dtype}, {layout}"
        )
    return backend


def gpu_kernel(backend: Backend, kv: torch.Tensor) -> Callable[..., None]:
    """The launcher of a GPU backend for a plain or an FP8 cache; arguments as `sparse_mla_triton.latent_attention`."""
    launch: Callable[..., None]
    if backend == "triton":
        from kernels.sparse_mla_triton import latent_attention as launch
    elif kv.dtype == torch.uint8:
        from kernels.sparse_mla_hopper_fp8 import latent_attention_hopper_fp8 as launch
    else:
        from kernels.sparse_mla_hopper import latent_attention_hopper as launch
    return launch


def _gathered(
    q: torch.Tensor,
    kv: torch.Tensor,
    ids: torch.Tensor,
    lengths: torch.Tensor | None,
    layout: KvLayout,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """The CPU path: gather a few queries' rows, two batched products. Fills out and, if asked for, lse."""
    s, h, _ = q.shape
    k, g = ids.shape[1], layout.groups
    step = max(1, GATHER_BYTES // (k * layout.width * q.element_size()))
    for top in range(0, s, step):
        chosen = ids[top : top + step]
        b = chosen.shape[0]
        valid = chosen >= 0
        if lengths is not None:
            valid &= torch.arange(k, device=ids.device)[None, :] < lengths[top : top + step, None]
        rows = kv.index_select(0, torch.where(valid, chosen, 0).flatten())
        if kv.dtype == torch.uint8:
            rows = unpack_rows(rows, layout, q.dtype)
        rows = rows.view(b, k, layout.width)
        complete = bool(valid.all())
        if not complete:
            rows = rows.masked_fill(~valid[:, :, None], 0.0)  # a stale row may hold NaN, and 0 * NaN is NaN
        keys = layout.keys(rows).permute(0, 2, 3, 1)  # [b, g, d, k]
        values = layout.values(rows).permute(0, 2, 1, 3)  # [b, g, k, c]
        queries = q[top : top + step].unflatten(1, (g, h // g))  # [b, g, m, d]
        scores = torch.matmul(queries, keys).float() * scale
        if not complete:
            scores.masked_fill_(~valid[:, None, None, :], float("-inf"))
        weights = torch.softmax(scores, -1) if complete else torch.softmax(scores, -1).nan_to_num_(0.0)
        out[top : top + step] = torch.matmul(weights.to(q.dtype), values).flatten(1, 2)
        if lse is not None:
            lse[top : top + step] = scores.logsumexp(-1).flatten(1, 2)

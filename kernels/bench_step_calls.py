"""The whole attention step as calls to time: scores, selection and attention, of random inputs at V3.2's shapes."""

from collections.abc import Callable
from typing import Any

import torch

from kernels.bench_attention import (
    HEADS,
    QK_DIM,
    SCALE,
    TOPK,
    V32,
    V_DIM,
    Call,
    latent_cache,
    normal,
    random_pages,
)
from kernels.dense_mla import dense_mla
from kernels.fp8_cache import PAGE
from kernels.index_scores import index_scores
from kernels.index_scores_paged import index_scores_paged, page_bytes
from kernels.page_slots import page_slots
from kernels.prefill_form import Form, prefill_form
from kernels.sparse_mla import sparse_mla
from kernels.topk import topk, topk_mask

INDEX_HEADS, INDEX_DIM = 64, 128
FORM_QUERIES = 2048  # the chunk in which forms are compared: every bound of the table is a multiple of it


def sparse_prefill_step(keys: int, queries: int, *, heads: int = HEADS, k: int = TOPK, device: str = "cuda") -> Call:
    """Scores, selection and attention of the last `queries` of `keys` tokens, as one call; result [s, h, 512].

    On a GPU the scores are FP8 and the rest bfloat16; on a CPU all is float32.
    """
    return sparse_prompt(keys, queries, first=keys - queries, heads=heads, k=k, device=device)


def sparse_prompt(
    keys: int, chunk: int, *, first: int = 0, heads: int = HEADS, k: int = TOPK, device: str = "cuda"
) -> Call:
    """The same for all tokens from position `first` on, in chunks; result of the last chunk.

    Every chunk has the same random queries: they exceed the L2 by far.
    """
    q, kv = (normal(n, *shape, **_kind(device)) for n, shape in ((chunk, (heads, V32.width)), (keys, (V32.width,))))
    scores = _scorer(chunk, keys, device)
    visible = torch.arange(1, keys + 1, device=device, dtype=torch.int32)

    def call() -> torch.Tensor:
        for start in range(first, keys, chunk):
            stop = min(start + chunk, keys)
            ids = topk(scores(start, stop), k, visible[start:stop])
            out = sparse_mla(q[: stop - start], kv[:stop], ids, V32, SCALE, check_ids=False)
        return out

    return call


def dense_prompt(keys: int, chunk: int, *, heads: int = HEADS, device: str = "cuda") -> Call:
    """Dense attention of a whole prompt in the MHA form, in chunks (one, if chunk is keys); result of the last one."""
    shapes = ((chunk, heads, QK_DIM), (keys, heads, QK_DIM), (keys, heads, V_DIM))
    q, k, v = (normal(*shape, **_kind(device)) for shape in shapes)

    def call() -> torch.Tensor:
        for start in range(0, keys, chunk):
            stop = min(start + chunk, keys)
            out = dense_mla(q[: stop - start], k[:stop], v[:stop], SCALE, start)
        return out

    return call


def prompt_by_form(
    keys: int, chunk: int, form: Form | None, *, first: int = 0, heads: int = HEADS, k: int = TOPK, device: str = "cuda"
) -> Call:
    """All tokens from `first` on in one form, None for the table's, with the projections that the form needs.

    The MHA forms up-project the latents of the whole context for each chunk, the gathered form absorbs W_UK into the
    queries and up-projects its outputs. Result of the last chunk, [s, h, 128]; the forms agree up to rounding.
    """
    kind = _kind(device)
    q, kv = normal(chunk, heads, QK_DIM, **kind), normal(keys, V32.width, **kind)
    w_uk, w_uv = (normal(heads, V_DIM, V32.latent_dim, **kind) * V32.latent_dim**-0.5 for _ in range(2))
    both = torch.cat((w_uk, w_uv), 1).flatten(0, 1)  # [h * 256, c], as a checkpoint has it
    scores = _scorer(chunk, keys, device)
    visible = torch.arange(1, keys + 1, device=device, dtype=torch.int32)

    def gathered(start: int, stop: int) -> torch.Tensor:
        nope, rope = q[: stop - start].split((V_DIM, V32.rope_dim), -1)
        absorbed = torch.cat((torch.bmm(nope.transpose(0, 1), w_uk).transpose(0, 1), rope), -1)
        ids = topk(scores(start, stop), k, visible[start:stop])
        out = sparse_mla(absorbed, kv[:stop], ids, V32, SCALE, check_ids=False)
        return torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)

    def read_all(start: int, stop: int, masked: bool) -> torch.Tensor:
        latent, rope = kv[:stop].split((V32.latent_dim, V32.rope_dim), -1)
        nope, values = torch.matmul(latent, both.T).unflatten(-1, (heads, -1)).split((V_DIM, V_DIM), -1)
        expanded = torch.cat((nope, rope[:, None].expand(-1, heads, -1)), -1)
        mask = topk_mask(scores(start, stop), k, visible[start:stop]) if masked else None
        return dense_mla(q[: stop - start], expanded, values, SCALE, start, mask)

    def call() -> torch.Tensor:
        for start in range(first, keys, chunk):
            stop, chosen = min(start + chunk, keys), form or prefill_form(start, k)
            out = gathered(start, stop) if chosen == "gathered" else read_all(start, stop, chosen == "masked")
        return out

    return call


def _kind(device: str) -> dict[str, Any]:
    return {"dtype": torch.bfloat16 if device == "cuda" else torch.float32, "device": device}


def _scorer(chunk: int, keys: int, device: str) -> Callable[[int, int], torch.Tensor]:
    """The indexer's scores of a chunk, given its start and stop, over the keys up to its own; FP8 on a GPU."""
    index_q, index_k = (
        normal(*shape, **_kind(device)) for shape in ((chunk, INDEX_HEADS, INDEX_DIM), (keys, INDEX_DIM))
    )
    weights = torch.rand(chunk, INDEX_HEADS, device=device)
    scales = None
    if device == "cuda":
        index_q, index_k = index_q.to(torch.float8_e4m3fn), index_k.to(torch.float8_e4m3fn)
        scales = torch.ones(keys, device=device)

    def score(start: int, stop: int) -> torch.Tensor:
        scale = None if scales is None else scales[:stop]
        return index_scores(index_q[: stop - start], index_k[:stop], weights[: stop - start], start, scale)

    return score


def sparse_decode_step(
    keys: int, batch: int, dtype: str, *, heads: int = HEADS, k: int = TOPK, device: str = "cuda"
) -> Call:
    """One new token of each of `batch` contexts of `keys` tokens in random pages: scores, selection, slots, attention.

    dtype: of the latent cache, "fp8" or "bfloat16" ("float32" on a CPU). Index keys are FP8 pages.
    """
    pages = random_pages(keys, batch, device)
    total = pages.numel()
    index = torch.empty(total, page_bytes(INDEX_DIM), dtype=torch.uint8, device=device)
    index[:, : PAGE * INDEX_DIM] = (
        torch.randn(total, PAGE * INDEX_DIM, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
    )
    index[:, PAGE * INDEX_DIM :] = torch.ones(total, PAGE, device=device).view(torch.uint8)
    index_q = torch.randn(batch, INDEX_HEADS, INDEX_DIM, device=device).to(torch.float8_e4m3fn)
    weights = torch.rand(batch, INDEX_HEADS, device=device)
    cache = latent_cache(total * PAGE, dtype, device)
    q = normal(batch, heads, V32.width, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)

    def call() -> torch.Tensor:
        scores = index_scores_paged(index_q, index, weights, pages, lengths, keys)
        slots = page_slots(topk(scores, k, lengths), pages)
        return sparse_mla(q, cache, slots, V32, SCALE, decode=True, check_ids=False)

    return call

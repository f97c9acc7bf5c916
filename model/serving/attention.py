"""One layer's attention over a paged cache: a prompt's chunk, or one new token for each of many requests."""

import torch

from kernels.dense_decode import dense_decode
from kernels.dense_mla import dense_mla
from kernels.page_slots import page_slots
from kernels.prefill_form import Form
from kernels.rope import in_place, lay_rows
from kernels.sparse_mla import sparse_mla
from model.attention import MLA
from model.config import ModelConfig
from model.indexer import Tables
from model.serving.choose import choose_for_chunk, choose_for_rows
from model.serving.forms import dense_backend, form_runs, heads_at_once
from model.serving.pool import LayerPages
from model.serving.step import Chunk, Rows, Scorer


def attend_chunk(
    layer: MLA, x: torch.Tensor, tables: Tables, index_tables: Tables, chunk: Chunk, pages: LayerPages
) -> torch.Tensor:
    """Normalised hidden states of a chunk, [length, hidden] -> [length, hidden]; its tokens enter the cache."""
    q, latent = layer._queries(x, tables)
    pages.write(chunk.slots, layer._cache_rows(x, tables), rounded=chunk.attention.cache_dtype == "fp8")
    if layer.indexer is not None and chunk.index_dtype is not None:
        chunk.scorer = _score_with(layer, latent, x, index_tables, chunk, pages)
    kv = pages.rows(chunk.pages)[: chunk.stop]
    # what lies behind the last token may be another request's NaN, and 0 * NaN is NaN
    kv[chunk.start :].masked_fill_(~chunk.real[:, None], 0.0)
    out = _read_chunk(layer, q, kv, chunk)
    projected: torch.Tensor = layer.o_proj(out.flatten(1))
    return projected


def attend_rows(
    layer: MLA, x: torch.Tensor, tables: Tables, index_tables: Tables, rows: Rows, pages: LayerPages
) -> torch.Tensor:
    """Normalised hidden states [R, hidden] -> [R, hidden]; new tokens enter the cache. Never waits for a GPU."""
    q, latent = layer._queries(x, tables)
    if rows.kept is None:
        pages.write(rows.slots, layer._cache_rows(x, tables), rounded=rows.attention.cache_dtype == "fp8")
    if layer.indexer is not None and rows.index_dtype is not None:
        rows.scorer = _score_with(layer, latent, x, index_tables, rows, pages)
    queries, scale = layer.absorb(q), layer.config.softmax_scale
    if rows.kept is not None:
        rows.kept.keep(layer.layer, queries, rows.scorer if layer.indexer is not None else None)
    topk, selector = rows.attention.topk, rows.attention.selector
    if topk is None:
        out = dense_decode(queries, pages.latent, rows.tables, rows.lengths, layer.layout, scale, check_ids=False)[0]
    else:
        if not (selector == "indexer" and layer.indexer is None and rows.chosen is not None):
            rows.chosen = page_slots(choose_for_rows(layer, queries, rows, pages), rows.tables)
        out = sparse_mla(queries, pages.flat, rows.chosen, layer.layout, scale, decode=True, check_ids=False)
    projected: torch.Tensor = layer.o_proj(layer.up_project(out).flatten(1))
    return projected


def _score_with(
    layer: MLA, latent: torch.Tensor, x: torch.Tensor, tables: Tables, step: Chunk | Rows, pages: LayerPages
) -> Scorer:
    """Write the new tokens' index keys; the queries that will meet them and all earlier ones."""
    assert layer.indexer is not None and step.index_dtype is not None
    dtype = step.index_dtype
    layer.indexer.write_keys(x, tables, dtype, pages.index[dtype], step.slots)
    queries, weights = layer.indexer.queries(latent, x, tables, dtype)
    if pages.index[dtype].dtype == torch.float32:  # FP8 keys of an odd width
        queries = queries.float()
    return Scorer(queries=queries, weights=weights, dtype=dtype, pages=pages)


def _read_chunk(layer: MLA, q: torch.Tensor, kv: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Rotated queries [s, h, nope + rope] over cache rows [t, width] -> head outputs [s, h, v]."""
    topk = chunk.attention.topk
    if topk is None:
        return _read_all(layer, q, kv, chunk.start, None)
    runs = form_runs(layer, topk, chunk.start, chunk.stop, q.device)
    parts = []
    for first, end, form in runs:
        rows = slice(first - chunk.start, end - chunk.start)
        parts.append(_read_part(layer, q[rows], kv[:end], chunk.part(first, end), form))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read_part(layer: MLA, q: torch.Tensor, kv: torch.Tensor, part: Chunk, form: Form) -> torch.Tensor:
    """Rows of one form; kv: up to and with them."""
    if form == "dense":
        part.chosen = None
        return _read_all(layer, q, kv, part.start, None)
    if not (part.attention.selector == "indexer" and layer.indexer is None and part.chosen is not None):
        part.chosen = choose_for_chunk(layer, q, kv, part, masked=form == "masked")
    if form == "masked":
        return _read_all(layer, q, kv, part.start, part.chosen)
    scale = layer.config.softmax_scale
    return layer.up_project(sparse_mla(layer.absorb(q), kv, part.chosen, layer.layout, scale, check_ids=False))


def _read_all(layer: MLA, q: torch.Tensor, kv: torch.Tensor, start: int, mask: torch.Tensor | None) -> torch.Tensor:
    """All visible keys, or those in `mask`, in the MHA form, a few heads at a time where the context is long."""
    config, layout = layer.config, layer.layout
    scale, backend = config.softmax_scale, dense_backend(config, q.device)
    if not config.absorbs:
        return dense_mla(q, layout.keys(kv), layout.values(kv), scale, start, mask, backend=backend)
    latent, rope = kv.split((config.kv_lora_rank, config.rope_dim), -1)
    weights = layer.kv_b_proj.weight.unflatten(0, (config.num_heads, -1))
    out = torch.empty(q.shape[0], config.num_heads, config.v_dim, dtype=q.dtype, device=q.device)
    step = heads_at_once(config, kv.shape[0], kv.element_size())
    for first in range(0, config.num_heads, step):
        heads = slice(first, min(first + step, config.num_heads))
        keys, values = _expand(config, latent, rope, weights[heads])
        out[:, heads] = dense_mla(q[:, heads], keys, values, scale, start, mask, backend=backend)
        del keys, values  # before the next ones are made
    return out


def _expand(
    config: ModelConfig, latent: torch.Tensor, rope: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [t, c], rope keys [t, r], weights [g, nope + v, c] -> keys [t, g, nope + r] and values [t, g, v]."""
    t, g, sizes = latent.shape[0], weights.shape[0], (config.nope_dim, config.v_dim)
    shared = rope[:, None].expand(-1, g, -1)
    if in_place(latent):
        keys = torch.empty(t, g, config.nope_dim + config.rope_dim, dtype=latent.dtype, device=latent.device)
        values = torch.empty(t, g, config.v_dim, dtype=latent.dtype, device=latent.device)
        rows, (w_uk, w_uv) = latent.expand(g, -1, -1), weights.transpose(1, 2).split(sizes, -1)
        torch.bmm(rows, w_uk, out=keys[..., : config.nope_dim].transpose(0, 1))
        torch.bmm(rows, w_uv, out=values.transpose(0, 1))
        lay_rows(shared, keys[..., config.nope_dim :])
        return keys, values
    nope, values = (latent @ weights.flatten(0, 1).T).unflatten(-1, (g, -1)).split(sizes, -1)
    return torch.cat((nope, shared), -1), values

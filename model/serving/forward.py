"""The transformer's layers over a paged cache: one chunk of a prompt, or one new token for many requests."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from model.attention import MLA
from model.indexer import Tables
from model.layers import MoE
from model.serving.attention import attend_chunk, attend_rows
from model.serving.pool import PagePool
from model.serving.step import Chunk, Rows
from model.transformer import Transformer

Attend = Callable[[MLA, torch.Tensor, Tables, Tables], torch.Tensor]


def run_chunk(model: Transformer, ids: torch.Tensor, chunk: Chunk, pool: PagePool) -> torch.Tensor:
    """Token ids [length] int64 -> hidden states behind the last layer, [length, hidden]; the cache grows."""
    return _walk(
        model,
        ids,
        chunk.positions,
        lambda layer, x, tables, index: attend_chunk(layer, x, tables, index, chunk, pool.layers[layer.layer]),
    )


def run_rows(model: Transformer, rows: Rows, pool: PagePool) -> torch.Tensor:
    """One new token a request -> logits [R, v] float32; the cache grows."""
    return head(model, walk_rows(model, rows, pool))


def walk_rows(model: Transformer, rows: Rows, pool: PagePool) -> torch.Tensor:
    """One token a row -> hidden states behind the last layer, [R, hidden]."""
    return _walk(
        model,
        rows.ids,
        rows.positions,
        lambda layer, x, tables, index: attend_rows(layer, x, tables, index, rows, pool.layers[layer.layer]),
        rows.like,
    )


def head(model: Transformer, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [n, hidden] -> logits [n, v] float32."""
    logits: torch.Tensor = F.linear(model.norm(hidden), model.lm_head.weight).float()
    return logits


def _walk(
    model: Transformer, ids: torch.Tensor, positions: torch.Tensor, attend: Attend, like: torch.Tensor | None = None
) -> torch.Tensor:
    """like: of `Rows`, for layers with experts."""
    tables = model.rope(positions)
    index_tables = tables if model.index_rope is None else model.index_rope(positions)
    x: torch.Tensor = model.embed_tokens(ids)
    for layer in model.blocks():
        x = x + attend(layer.self_attn, layer.input_layernorm(x), tables, index_tables)
        normed = layer.post_attention_layernorm(x)
        if like is not None and isinstance(layer.mlp, MoE):
            normed = normed.index_select(0, like)
        x = x + layer.mlp(normed)
    return x

"""Which keys a step reads: the same sets as `model.selection.select`, as ids, without anything of tokens x tokens."""

import torch

from kernels.attention_mass import attention_mass, attention_mass_paged
from kernels.index_scores import index_scores
from kernels.index_scores_paged import index_scores_paged
from kernels.topk import topk, topk_mask
from model.attention import MLA
from model.errors import ModelError
from model.selection import random_scores, recency_ids, recency_mask
from model.serving.pool import LayerPages
from model.serving.step import Chunk, Rows

SCORE_BYTES = 1 << 30  # scores of a block of queries; a chunk of 2,048 queries against 128k keys just fits
RANDOM_TEMPORARIES = 8  # a random score takes that many times its 4 bytes while it is made
NO_INDEXER = "selector indexer: this model has no trained indexer; use oracle, recency or random"


def choose_for_chunk(layer: MLA, q: torch.Tensor, kv: torch.Tensor, chunk: Chunk, *, masked: bool) -> torch.Tensor:
    """Keys of every query of a prompt's chunk.

    Args:
        q: rotated queries, [s, h, nope + rope]. kv: cache rows up to and with the chunk, [t, width].
        masked: as a mask [s, t] bool for short contexts, else as ids [s, k] int32, ascending, -1 last.

    Peak memory beside the result: SCORE_BYTES, and for the oracle the absorbed queries.
    """
    attention = chunk.attention
    assert attention.topk is not None, "dense attention selects nothing"
    if attention.selector == "recency":
        if masked:
            return recency_mask(attention.topk, chunk.positions, chunk.stop)
        return recency_ids(attention.topk, chunk.positions)
    keys, scales, queries = kv, None, q
    if attention.selector == "oracle":
        queries = layer.absorb(q)
    elif attention.selector == "indexer":
        if chunk.scorer is None:
            raise ModelError(NO_INDEXER)
        keys, scales = chunk.scorer.keys(chunk.pages, chunk.stop)
        queries = chunk.scorer.queries
    pick = topk_mask if masked else topk
    cost = 4 * (RANDOM_TEMPORARIES if attention.selector == "random" else 1)
    step = max(64, SCORE_BYTES // (cost * chunk.stop) // 64 * 64)
    chosen = []
    for top in range(0, chunk.length, step):
        block = slice(top, min(top + step, chunk.length))
        positions = chunk.positions[block]
        if attention.selector == "random":
            scores = random_scores(attention.seed, layer.layer, positions, chunk.stop)
        elif attention.selector == "oracle":
            scores = attention_mass(
                queries[block], layer.layout.keys(keys), layer.config.softmax_scale, chunk.start + top
            )
        else:
            assert chunk.scorer is not None
            scores = index_scores(queries[block], keys, chunk.scorer.weights[block], chunk.start + top, scales)
        chosen.append(pick(scores, attention.topk, positions + 1))
    return torch.cat(chosen) if len(chosen) > 1 else chosen[0]


def choose_for_rows(layer: MLA, queries: torch.Tensor, rows: Rows, pages: LayerPages) -> torch.Tensor:
    """Keys of one new token a request: positions in the request, [R, k] int32, ascending, -1 last.

    Args:
        queries: absorbed queries, [R, h, width].
    """
    attention = rows.attention
    assert attention.topk is not None, "dense attention selects nothing"
    if attention.selector == "recency" or rows.num_keys <= attention.topk:
        return recency_ids(attention.topk, rows.lengths.long() - 1)  # up to k keys it names them all
    if attention.selector == "random":
        scores = random_scores(attention.seed, layer.layer, rows.positions, rows.num_keys)
    elif attention.selector == "oracle":
        scores = _oracle_scores(layer, queries, rows, pages)
    else:
        scores = _index_scores(rows)
    return topk(scores, attention.topk, rows.lengths)


def _index_scores(rows: Rows) -> torch.Tensor:
    """[R, num_keys] float32; the pages are read in place."""
    scorer = rows.scorer
    if scorer is None:
        raise ModelError(NO_INDEXER)
    return index_scores_paged(scorer.queries, scorer.store, scorer.weights, rows.tables, rows.lengths, rows.num_keys)


def _oracle_scores(layer: MLA, queries: torch.Tensor, rows: Rows, pages: LayerPages) -> torch.Tensor:
    """Dense attention mass, [R, num_keys] float32; packed rows are unpacked request by request."""
    scale = layer.config.softmax_scale
    if not pages.packed:
        return attention_mass_paged(queries, layer.layout.keys(pages.flat), scale, rows.tables, rows.lengths)
    out = torch.empty(len(rows.ids), rows.num_keys, dtype=torch.float32, device=queries.device)
    for i in range(len(rows.ids)):
        keys = layer.layout.keys(pages.rows(rows.tables[i]))
        one = slice(i, i + 1)
        out[one] = attention_mass(queries[one], keys, scale, rows.lengths[one] - 1)
    return out

"""The one seam where keys are chosen: a selector's scores go in, a set of at most k keys per query comes out.

The set is a mask here; `model.serving.choose` gives the same sets as ids as well, for the kernels that gather.
"""

from collections.abc import Callable

import numpy as np
import torch

from kernels.topk import topk_mask
from model.request import Attention, Selector

LOW = 0xFFFFFFFF
SINKS = 4  # first tokens that the recency selector always keeps


def recency_mask(k: int, positions: torch.Tensor, num_keys: int) -> torch.Tensor:
    """The first 4 and the latest k - 4 visible keys of each query, [s, num_keys] bool; all of them where n <= k."""
    rows = positions[:, None]
    cols = torch.arange(num_keys, device=positions.device)[None, :]
    sinks = min(SINKS, k)
    return (cols <= rows) & ((cols < sinks) | (cols > rows - (k - sinks)) | (rows < k))


def recency_ranks(k: int, positions: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Place of each key in the order in which the recency selector takes them, [s, num_keys] int32, k if beyond.

    `recency_ranks(k, ...) < j` equals `recency_mask(j, ...)` for every j up to k.
    """
    rows = positions[:, None]
    cols = torch.arange(num_keys, device=positions.device)[None, :]
    ranks = torch.where(cols < SINKS, cols, SINKS + rows - cols)
    return torch.where(cols <= rows, ranks.clamp_max(k), k).to(torch.int32)


def recency_ids(k: int, positions: torch.Tensor) -> torch.Tensor:
    """The same keys as ids, [s, k] int32, ascending, -1 last."""
    rows = positions[:, None]
    slots = torch.arange(k, device=positions.device)[None, :]
    ids = torch.where(slots < min(SINKS, k), slots, slots + (rows + 1 - k).clamp_min(0))
    return torch.where(slots <= rows, ids, -1).to(torch.int32)


def random_scores(seed: int, layer: int, positions: torch.Tensor, num_keys: int) -> torch.Tensor:
    """A fair score for each (query, key), a function of seed, layer and positions alone, [s, num_keys].

    24 random bits are exact in float32. Two xor-shift-multiply rounds modulo 2^32.
    """
    rows = (positions.long() * 0x85EBCA77 + layer * 0xC2B2AE3D + seed * 0x27D4EB2F) & LOW
    cols = (torch.arange(num_keys, device=positions.device) * 0x9E3779B1) & LOW
    if positions.device.type == "cpu":
        return _mixed_by_numpy(rows, cols)
    x = (rows[:, None] + cols) & LOW
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & LOW
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & LOW
    x = x ^ (x >> 16)
    return (x >> 8).to(torch.float32)


def _mixed_by_numpy(rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """The rounds of `random_scores` in uint32, which torch has no sums of: four times as fast on a CPU."""
    x = rows.numpy().astype(np.uint32)[:, None] + cols.numpy().astype(np.uint32)
    for _ in range(2):
        x ^= x >> 16
        x *= 0x45D9F3B
    x ^= x >> 16
    return torch.from_numpy((x >> 8).astype(np.float32))


def select(
    attention: Attention,
    layer: int,
    positions: torch.Tensor,
    num_keys: int,
    scores: Callable[[Selector], torch.Tensor],
) -> torch.Tensor:
    """Choose at most attention.topk keys for each query of one layer.

    Args:
        attention: the variant; topk is not None.
        layer: index of the layer, for the random selector.
        positions: of the queries, [s], int, ascending; query i sees n = positions[i] + 1 keys.
        num_keys: t, at least positions[-1] + 1.
        scores: gives [s, t] float32 for "indexer" or "oracle"; called only when that selector is asked for.

    Returns:
        Mask [s, t] bool, min(topk, n) keys in each row: by (score, then smaller index).
    """
    assert attention.topk is not None, "dense attention selects nothing"
    if attention.selector == "recency":
        return recency_mask(attention.topk, positions, num_keys)
    if attention.selector == "random":
        given = random_scores(attention.seed, layer, positions, num_keys)
    else:
        given = scores(attention.selector)
    return topk_mask(given, attention.topk, positions + 1)

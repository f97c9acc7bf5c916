"""The cache's memory: a pool of pages for each kind of storage that the variants ask for."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.request import Attention, IndexDtype
from model.serving.memory import plan_pages, prompt_bytes, working_bytes
from model.serving.pages import Pages
from model.serving.pool import PagePool, pool_page_bytes, takes_packed
from model.serving.prompter import GRAPH_CONTEXT
from model.serving.shape import Shape


class Lane(NamedTuple):
    """One kind of storage and who holds its pages."""

    pool: PagePool
    pages: Pages


def packs(attention: Attention, config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether a variant's latent rows lie in the FP8 cache."""
    return attention.cache_dtype == "fp8" and takes_packed(config, dtype)


def open_lanes(
    config: ModelConfig,
    attentions: Mapping[str, Attention],
    dtype: torch.dtype,
    device: torch.device,
    shape: Shape,
    cache_bytes: int | None,
    prompt_graphs: bool,
) -> dict[bool, Lane]:
    """Lanes by whether their rows are packed. A model with an indexer has room for index keys in every page, since
    recall may ask a dense variant for them.

    Raises ModelError where not even one page fits.
    """
    kinds: dict[bool, set[IndexDtype]] = {}
    for attention in attentions.values():
        asked = kinds.setdefault(packs(attention, config, dtype), set())
        if config.indexer is not None:
            asked.add(attention.index_dtype or config.indexer.dtype)
    index = {packed: tuple(sorted(asked)) for packed, asked in kinds.items()}
    sizes = [pool_page_bytes(config, dtype, packed, index[packed]) for packed in kinds]
    working = working_bytes(config, dtype.itemsize, shape.rows, shape.chunk, config.max_positions)
    if prompt_graphs:  # they keep what the largest of them needs
        working += prompt_bytes(config, dtype.itemsize, shape.chunk, min(GRAPH_CONTEXT, config.max_positions))
    counts = plan_pages(sizes, shape.rows, config.max_positions, working, device, cache_bytes)
    lanes = {}
    for packed, count in zip(kinds, counts, strict=True):
        pool = PagePool(config, count, dtype=dtype, packed=packed, index_dtypes=index[packed], device=device)
        lanes[packed] = Lane(pool, Pages(count))
    return lanes

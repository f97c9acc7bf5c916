"""What a request keeps of its context on a CPU: one latent row and one index key per token and layer."""

import torch

from model.config import ModelConfig
from model.request import IndexDtype

PREFILL_CHUNK = 256  # prompt tokens a step; prefixes are shared in these units, so that chunks never move


class LayerCache:
    """kv: [capacity, kv_width]; index: [capacity, d], or None where the layer has no indexer of its own."""

    __slots__ = ("index", "kv")

    def __init__(self, kv: torch.Tensor, index: torch.Tensor | None) -> None:
        self.kv = kv
        self.index = index


class Cache:
    """The context of one request: `length` tokens are filled. Bytes grow with capacity x layers, nothing else."""

    def __init__(
        self, config: ModelConfig, capacity: int, *, dtype: torch.dtype, index_dtype: IndexDtype | None
    ) -> None:
        """index_dtype None keeps no index keys: the variant never asks the indexer."""
        self.capacity = capacity
        self.indexed = index_dtype is not None
        self.length = 0
        self.layers: list[LayerCache] = []
        for i in range(config.num_layers):
            kv = torch.empty(capacity, config.kv_width, dtype=dtype)
            index = None
            if index_dtype is not None and config.indexer is not None and config.indexer.own[i]:
                index_type = torch.bfloat16 if index_dtype == "bfloat16" else torch.float32
                index = torch.empty(capacity, config.indexer.head_dim, dtype=index_type)
            self.layers.append(LayerCache(kv, index))

    def copy_prefix(self, other: "Cache", length: int) -> None:
        """Take the first `length` tokens of a cache of the same kind."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.kv[:length] = theirs.kv[:length]
            if mine.index is not None and theirs.index is not None:
                mine.index[:length] = theirs.index[:length]
        self.length = length

    @property
    def num_bytes(self) -> int:
        tensors = [t for layer in self.layers for t in (layer.kv, layer.index) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

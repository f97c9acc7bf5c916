"""The lightning indexer: a small attention without softmax that scores every past token for every query."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.fp8 import dequantize_e4m3
from kernels.index_rows import IndexNorm, IndexRope, index_keys, index_queries, write_index_keys
from model.config import IndexerConfig
from model.request import IndexDtype

Tables = tuple[torch.Tensor, torch.Tensor]


class Indexer(nn.Module):
    """Index queries from the normalised query latent (or the hidden state), one shared index key per token.

    Source: DeepSeek-V3.2, arXiv:2512.02556; deployed form with Hadamard rotation and FP8: its inference/model.py.
    """

    def __init__(self, config: IndexerConfig, hidden_size: int, query_size: int) -> None:
        super().__init__()
        self.config = config
        self.wq_b = nn.Linear(query_size, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(hidden_size, config.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(hidden_size, config.num_heads, bias=False)

    def keys(self, x: torch.Tensor, tables: Tables, dtype: IndexDtype) -> torch.Tensor:
        """Hidden states [n, hidden] -> index keys [n, d]; FP8 ones times their scales, in float32."""
        keys, scales = index_keys(self.wk(x), self._norm(), self._rope(tables), dtype)
        return keys if scales is None else dequantize_e4m3(keys, scales[:, None], self.config.head_dim)

    def write_keys(
        self, x: torch.Tensor, tables: Tables, dtype: IndexDtype, pages: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Index keys of hidden states [n, hidden] into slots [n] of a layer's pages (`write_index_keys`)."""
        write_index_keys(pages, slots, self.wk(x), self._norm(), self._rope(tables), dtype)

    def queries(
        self, latent: torch.Tensor, x: torch.Tensor, tables: Tables, dtype: IndexDtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query latents [n, r] and hidden states [n, hidden] -> index queries [n, h, d], head weights [n, h] float32.

        FP8 queries are float8_e4m3fn; the weights carry h^-1/2, d^-1/2 and the FP8 scale of their query.
        """
        config = self.config
        q = self.wq_b(latent).unflatten(-1, (config.num_heads, config.head_dim))
        w = F.linear(x.float(), self.weights_proj.weight.float()) * (config.num_heads * config.head_dim) ** -0.5
        return index_queries(q, w, self._rope(tables), dtype)

    def _norm(self) -> IndexNorm:
        return IndexNorm(self.k_norm.weight, self.k_norm.bias, self.k_norm.eps)

    def _rope(self, tables: Tables) -> IndexRope:
        return IndexRope(*tables, self.config.interleaved)

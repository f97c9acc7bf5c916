"""The lightning indexer: a small attention without softmax that scores every past token for every query."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.fp8 import quantize_e4m3, simulate_e4m3
from kernels.hadamard import hadamard
from model.config import IndexerConfig
from model.request import IndexDtype
from model.rope import rotate

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
        """Hidden states [n, hidden] -> index keys [n, d] as the cache holds them."""
        k = F.layer_norm(
            self.wk(x).float(), (self.config.head_dim,), self.k_norm.weight.float(), self.k_norm.bias.float(), 1e-6
        )
        k = self._rotate(k, tables)
        if dtype == "fp8":
            return simulate_e4m3(hadamard(k.to(torch.bfloat16)).float(), self.config.head_dim)
        return k.to(torch.bfloat16) if dtype == "bfloat16" else k

    def queries(
        self, latent: torch.Tensor, x: torch.Tensor, tables: Tables, dtype: IndexDtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query latents [n, r] and hidden states [n, hidden] -> index queries [n, h, d], head weights [n, h] float32.

        The weights carry h^-1/2, d^-1/2 and the FP8 scale of their query.
        """
        q = self.wq_b(latent).float().unflatten(-1, (self.config.num_heads, self.config.head_dim))
        q = self._rotate(q, tables)
        w = (
            F.linear(x.float(), self.weights_proj.weight.float())
            * (self.config.num_heads * self.config.head_dim) ** -0.5
        )
        if dtype == "fp8":
            values, scales = quantize_e4m3(hadamard(q.to(torch.bfloat16)).float(), self.config.head_dim)
            return values.float(), w * scales.squeeze(-1)
        return (q.to(torch.bfloat16) if dtype == "bfloat16" else q), w

    def _rotate(self, x: torch.Tensor, tables: Tables) -> torch.Tensor:
        """RoPE on the first rope_dim dims: the rope part comes first here, last in MLA."""
        rope, rest = x.split((self.config.rope_dim, self.config.head_dim - self.config.rope_dim), -1)
        return torch.cat((rotate(rope, *tables, interleaved=self.config.interleaved), rest), -1)

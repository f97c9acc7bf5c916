"""The transformer: DeepSeek-V3.2, GLM-5.x and converted grouped-query models are configurations of this one class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.attention import MLA
from model.config import ModelConfig
from model.indexer import Tables
from model.layers import MLP, MoE, RMSNorm
from model.rope import Rope, RopeConfig
from model.segment import Segment


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.moe is not None and config.moe.sparse[index]
        self.mlp: MoE | MLP
        if config.moe is not None and sparse:
            self.mlp = MoE(config, config.moe)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x: torch.Tensor, tables: Tables, index_tables: Tables, segments: list[Segment]) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables, index_tables, segments)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Transformer(nn.Module):
    """Token ids of a packed step in, logits of the asked rows out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rope, self.index_rope = self.tables(config)

    @staticmethod
    def tables(config: ModelConfig) -> tuple[Rope, Rope | None]:
        """RoPE of the model and, where its width differs, of the indexer (plain RoPE of its own width)."""
        index = None
        if config.indexer is not None and config.indexer.rope_dim != config.rope.dim:
            index = Rope(RopeConfig(dim=config.indexer.rope_dim, theta=config.rope.theta))
        return Rope(config.rope), index

    def blocks(self) -> list[Layer]:
        """The layers in order, with their own type."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, token_ids: torch.Tensor, segments: Sequence[Segment], rows: torch.Tensor | None) -> torch.Tensor:
        """Run one step and let every segment's cache grow.

        Args:
            token_ids: [n], int64. Rows outside all segments are padding.
            segments: which rows belong to which request, and where they stand in it.
            rows: rows whose logits are wanted, [m], int64; None for no logits.

        Returns:
            Logits [m, v], float32; [0, v] when rows is None.
        """
        positions = torch.zeros_like(token_ids)
        for segment in segments:
            positions[segment.rows] = segment.positions
        tables = self.rope(positions)
        index_tables = tables if self.index_rope is None else self.index_rope(positions)
        x: torch.Tensor = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x, tables, index_tables, list(segments))
        for segment in segments:
            segment.cache.length = segment.stop
        if rows is None:
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        logits: torch.Tensor = F.linear(self.norm(x[rows]), self.lm_head.weight).float()
        return logits

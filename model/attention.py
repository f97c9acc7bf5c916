"""Multi-head latent attention with a lightning indexer, dense or sparse, in each of its algebraically equal forms."""

import torch
from torch import nn

from kernels.attention_mass import attention_mass
from kernels.dense_mla import dense_mla
from kernels.fp8 import simulate_e4m3
from kernels.index_scores import index_scores
from kernels.layout import KvLayout
from kernels.rope import in_place, lay_rows, rotate, rotate_
from kernels.sparse_mla import sparse_mla
from kernels.topk import mask_to_ids
from model.cache import PREFILL_CHUNK
from model.config import ModelConfig
from model.errors import ModelError
from model.indexer import Indexer, Tables
from model.layers import RMSNorm
from model.request import IndexDtype, Selector
from model.segment import Segment
from model.selection import select

# a gathered element costs as much as this many multiply-adds of the masked form: on one core, 8 heads and k = 256, both
# forms take the same time near 16k keys
GATHER_COST = 400


class MLA(nn.Module):
    """One layer's attention. Source: DeepSeek-V2, arXiv:2405.04434 (MLA); DeepSeek-V3.2, arXiv:2512.02556 (DSA)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.layout = KvLayout(
            absorbed=config.absorbs, groups=config.groups, latent_dim=config.kv_lora_rank, rope_dim=config.rope_dim
        )
        queries = config.num_heads * config.query_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.qkv_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.kv_width, bias=config.qkv_bias)
        if config.latent_norm:
            self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, 1e-6)
        if config.absorbs:
            self.kv_b_proj = nn.Linear(
                config.kv_lora_rank, config.num_heads * (config.nope_dim + config.v_dim), bias=False
            )
        if config.qk_norm:
            self.q_norm = RMSNorm(config.query_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.query_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(config.num_heads * config.v_dim, config.hidden_size, bias=config.o_bias)
        self.indexer: Indexer | None = None
        if config.indexer is not None and config.indexer.own[layer]:
            self.indexer = Indexer(config.indexer, config.hidden_size, config.q_lora_rank or config.hidden_size)

    def forward(self, x: torch.Tensor, tables: Tables, index_tables: Tables, segments: list[Segment]) -> torch.Tensor:
        """Normalised hidden states of a packed step, [n, hidden] -> [n, hidden]; every segment's cache grows."""
        q, latent = self._queries(x, tables)
        rows = self._cache_rows(x, tables)
        out = torch.zeros(x.shape[0], self.config.num_heads * self.config.v_dim, dtype=x.dtype, device=x.device)
        index: dict[IndexDtype, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        # both changes of basis once for all answers of a step: for a row alone they cost as much as its attention
        answers = [segment for segment in segments if segment.decode]
        absorbed = self.absorb(q) if answers else q
        latents = q.new_zeros(*q.shape[:2], self.layout.latent_dim // self.layout.groups) if answers else q
        for segment in segments:
            cache = segment.cache.layers[self.layer]
            new = rows[segment.rows]
            if segment.attention.cache_dtype == "fp8":
                new = torch.cat((simulate_e4m3(new[:, : self.layout.latent_dim]), new[:, self.layout.latent_dim :]), -1)
            cache.kv[segment.start : segment.stop] = new
            if self.indexer is not None and cache.index is not None:
                dtype = segment.attention.index_dtype or self.indexer.config.dtype
                if dtype not in index:
                    keys = self.indexer.keys(x, index_tables, dtype)
                    queries, weights = self.indexer.queries(latent, x, index_tables, dtype)
                    # FP8 values are exact in float32
                    index[dtype] = (keys, queries.float() if dtype == "fp8" else queries, weights)
                keys, queries, weights = index[dtype]
                cache.index[segment.start : segment.stop] = keys[segment.rows]
                segment.scorer = (queries[segment.rows], cache.index[: segment.stop], weights[segment.rows])
            if segment.decode:
                latents[segment.rows] = self._attend(absorbed[segment.rows], segment)
            else:
                out[segment.rows] = self._attend(q[segment.rows], segment).flatten(1)
        if answers:
            heads = self.up_project(latents).flatten(1)
            for segment in answers:
                out[segment.rows] = heads[segment.rows]
        projected: torch.Tensor = self.o_proj(out)
        return projected

    def _queries(self, x: torch.Tensor, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, hidden] -> rotated queries [n, h, nope + rope] and the indexer's query input [n, r]."""
        config = self.config
        if config.q_lora_rank is None:
            latent, q = x, self.q_proj(x)
        else:
            latent = self.q_a_layernorm(self.q_a_proj(x))
            q = self.q_b_proj(latent)
        q = q.unflatten(-1, (config.num_heads, config.query_dim))
        if config.qk_norm:
            q = self.q_norm(q)
        nope, rope = q.split((config.nope_dim, config.query_dim - config.nope_dim), -1)
        if in_place(q):  # q is a product of its own, nobody else's
            rotate_(rope, *tables, interleaved=config.rope_interleaved)
            return q, latent
        return torch.cat((nope, rotate(rope, *tables, interleaved=config.rope_interleaved)), -1), latent

    def _cache_rows(self, x: torch.Tensor, tables: Tables) -> torch.Tensor:
        """[n, hidden] -> what the cache keeps of each token, [n, kv_width]: normalised latent, rotated rope key."""
        config = self.config
        rows: torch.Tensor = self.kv_a_proj_with_mqa(x)
        latent, rope = rows.split((config.kv_lora_rank, config.rope_dim), -1)
        slices = rope.unflatten(-1, (config.groups, config.rope_dim // config.groups))
        if in_place(rows):
            if config.latent_norm:
                self.kv_a_layernorm(latent, latent)
            if config.qk_norm:
                self.k_norm(slices, slices)
            rotate_(slices, *tables, interleaved=config.rope_interleaved)
            return rows
        if config.latent_norm:
            latent = self.kv_a_layernorm(latent)
        if config.qk_norm:
            slices = self.k_norm(slices)
        return torch.cat((latent, rotate(slices, *tables, interleaved=config.rope_interleaved).flatten(1)), -1)

    def _attend(self, q: torch.Tensor, segment: Segment) -> torch.Tensor:
        """Rotated queries [s, h, nope + rope] of one segment -> head outputs [s, h, v]; of an answer's token, both in
        the cache's basis: [1, h, c + rope] -> [1, h, c]."""
        kv = segment.cache.layers[self.layer].kv[: segment.stop]
        if segment.probe is not None:
            segment.probe.measure(self, q, kv, segment)
        attention = segment.attention
        if attention.topk is None or segment.stop <= attention.topk:
            segment.selection = None
            return self._read_all(q, kv, segment, None)
        if not (attention.selector == "indexer" and self.indexer is None and segment.selection is not None):
            segment.selection = select(
                attention, self.layer, segment.positions, segment.stop, lambda name: self.scores(name, q, kv, segment)
            )
        if segment.decode or self._gathers(attention.topk, segment.start):
            ids = mask_to_ids(segment.selection, attention.topk)
            queries = q if segment.decode else self.absorb(q)
            read = sparse_mla(queries, kv, ids, self.layout, self.config.softmax_scale, check_ids=False)
            return read if segment.decode else self.up_project(read)
        return self._read_all(q, kv, segment, segment.selection)

    def scores(self, selector: Selector, q: torch.Tensor, kv: torch.Tensor, segment: Segment) -> torch.Tensor:
        """What the indexer or the oracle thinks of every key, [s, t] float32, for queries at the segment's end."""
        if selector == "oracle":
            queries = q if segment.decode else self.absorb(q)
            return attention_mass(queries, self.layout.keys(kv), self.config.softmax_scale, segment.stop - q.shape[0])
        if segment.scorer is None:
            raise ModelError("selector indexer: this model has no trained indexer; use oracle, recency or random")
        return index_scores(*segment.scorer, segment.start)

    def _gathers(self, topk: int, position: int) -> bool:
        """Whether a prompt's queries at this position gather their keys or read all of them under a mask.

        A function of the chunk that the position falls in and of the config, so that the same row has the same bits.
        """
        keys = position // PREFILL_CHUNK * PREFILL_CHUNK
        config = self.config
        masked = keys * config.num_heads * (config.query_dim + config.v_dim)
        read = config.num_heads * (self.layout.width + self.layout.latent_dim) // config.groups
        return masked > topk * (read + GATHER_COST * self.layout.width)

    def _read_all(self, q: torch.Tensor, kv: torch.Tensor, segment: Segment, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention over all visible keys, or those in `mask`: [s, h, nope + rope] -> [s, h, v]."""
        scale, start = self.config.softmax_scale, segment.start
        if not self.config.absorbs:
            return dense_mla(q, self.layout.keys(kv), self.layout.values(kv), scale, start, mask)
        if segment.decode:
            rows = self.layout.keys(kv)  # the value is the row's latent: reading the whole row spares a copy
            return dense_mla(q, rows, rows, scale, start, mask)[..., : self.layout.latent_dim]
        keys, values = self.expand(kv)
        return dense_mla(q, keys, values, scale, start, mask)

    def _up_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK [h, nope, c] and W_UV [h, v, c], views of the checkpoint's kv_b_proj."""
        both = self.kv_b_proj.weight.unflatten(0, (self.config.num_heads, -1))
        w_uk, w_uv = both.split((self.config.nope_dim, self.config.v_dim), 1)
        return w_uk, w_uv

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [s, h, nope + rope] -> the cache's basis [s, h, c + rope]: W_UK moves from the keys to the query."""
        if not self.config.absorbs:
            return q
        nope, rope = q.split((self.config.nope_dim, self.config.rope_dim), -1)
        if in_place(q):
            c = self.layout.latent_dim
            out = torch.empty(*q.shape[:2], self.layout.width, dtype=q.dtype, device=q.device)
            torch.bmm(nope.transpose(0, 1), self._up_weights()[0], out=out[..., :c].transpose(0, 1))
            lay_rows(rope, out[..., c:])
            return out
        latent = torch.bmm(nope.transpose(0, 1), self._up_weights()[0]).transpose(0, 1)
        return torch.cat((latent, rope), -1)

    def up_project(self, out: torch.Tensor) -> torch.Tensor:
        """Latent outputs [s, h, c] -> head outputs [s, h, v]."""
        if not self.config.absorbs:
            return out
        w_uv = self._up_weights()[1].to(out.dtype)  # recall reads in float32 whatever the model's dtype
        if in_place(out):  # as o_proj reads it, without a copy
            heads = torch.empty(*out.shape[:2], self.config.v_dim, dtype=out.dtype, device=out.device)
            torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2), out=heads.transpose(0, 1))
            return heads
        return torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)

    def expand(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache rows [t, c + rope] -> the MHA form's keys [t, h, nope + rope] and values [t, h, v]."""
        latent, rope = kv.split((self.config.kv_lora_rank, self.config.rope_dim), -1)
        both = self.kv_b_proj(latent).unflatten(-1, (self.config.num_heads, -1))
        nope, values = both.split((self.config.nope_dim, self.config.v_dim), -1)
        return torch.cat((nope, rope[:, None].expand(-1, self.config.num_heads, -1)), -1), values

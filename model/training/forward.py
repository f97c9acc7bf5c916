"""The training forward pass: whole batches through the very modules that are evaluated, without a cache."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kernels.indexer_kl import indexer_kl
from model.attention import MLA
from model.indexer import Tables
from model.layers import MoE
from model.rope import Rope
from model.training.attention import dense_attention, select_ids, selected_attention
from model.training.moe import mixture
from model.transformer import Layer, Transformer

Seen = Callable[[int, "IndexView"], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexView:
    """What a layer's attention and its indexer look like, for the recall at checkpoints.

    index_q [b, l, h, d], index_k [b, l, d], index_w [b, l, h]; q [b, l, h, d], k [b, l, g, d] of the main attention.
    """

    index_q: torch.Tensor
    index_k: torch.Tensor
    index_w: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    scale: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """hidden: normalised states [b * l, hidden]. kl: one scalar a layer with an indexer, or empty. loads: rows of each
    expert, one [e] a mixture layer. residuals: largest |x| behind each layer, [layers]. excess: how far they are
    beyond the limit, a scalar with gradient (see `residual_excess`)."""

    hidden: torch.Tensor
    kl: dict[int, torch.Tensor]
    loads: dict[int, torch.Tensor]
    residuals: torch.Tensor
    excess: torch.Tensor


def before_attention(layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[n, hidden] -> normalised input, query latent, rotated q [n, h, d], k [n, g, d], v [n, g, d] (padded to d)."""
    attention: MLA = layer.self_attn
    inputs = layer.input_layernorm(x)
    q, latent = attention._queries(inputs, (cos, sin))
    rows = attention._cache_rows(inputs, (cos, sin))
    if attention.config.absorbs:
        k, v = attention.expand(rows)
    else:
        k, v = attention.layout.keys(rows), attention.layout.values(rows)
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (F.pad(each, (0, width - each.shape[-1])) for each in (q, k, v))
    return inputs, latent, q, k, v


def residual_excess(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Mean over rows of sum_j max(|x_j| / limit - 1, 0)^2: x [n, hidden] -> scalar.

    Norms hide the residual's size from the loss, so it grows until bfloat16 rounds coarsely; weight decay alone
    does not hold it.
    """
    return ((x.abs() / limit - 1.0).clamp_min(0.0)).square().sum() / x.shape[0]


def after_attention(
    layer: Layer, x: torch.Tensor, out: torch.Tensor, limit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual [n, hidden] and head outputs [n, h, v] -> (residual, expert loads [e] or [0], largest |residual|,
    residual's excess over the limit)."""
    x = x + layer.self_attn.o_proj(out.flatten(1))
    inputs = layer.post_attention_layernorm(x)
    load = x.new_zeros(0)
    if isinstance(layer.mlp, MoE):
        y, load = mixture(layer.mlp, inputs)
    else:
        y = layer.mlp(inputs)
    x = x + y
    return x, load, x.detach().abs().amax(), residual_excess(x, limit)


class TrainingForward:
    """Runs a Transformer's own parameters over batches [b, l].

    dtype: of the matrix products (autocast); parameters, residual, norms, router, indexer and losses are float32.
    plain_rope: leave YaRN out, for stages shorter than the original length.
    residual_limit: |x| beyond which `Output.excess` counts.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        plain_rope: bool = False,
        residual_limit: float = math.inf,
    ) -> None:
        self.model = model
        self.residual_limit = residual_limit
        self.dtype = dtype
        self.before: Callable[..., Any] = before_attention
        self.after: Callable[..., Any] = after_attention
        if compiled:
            self.before = torch.compile(before_attention, dynamic=False)
            self.after = torch.compile(after_attention, dynamic=False)
        self._tables: dict[tuple[int, int], tuple[Tables, Tables]] = {}
        self.plain_rope = plain_rope

    @property
    def plain_rope(self) -> bool:
        return self._plain

    @plain_rope.setter
    def plain_rope(self, plain: bool) -> None:
        config = self.model.config
        self._plain = plain
        self._tables.clear()
        rope = dataclasses.replace(config.rope, kind="default", attention_factor=1.0, softmax_factor=1.0)
        self._config = dataclasses.replace(config, rope=rope) if plain else config
        device = self.model.embed_tokens.weight.device
        self._rope = Rope(self._config.rope).to(device)
        self._index_rope = None if self.model.index_rope is None else self.model.index_rope

    def tables(self, b: int, length: int) -> tuple[Tables, Tables]:
        """Rotation tables of flat rows [b * l, d / 2], of the model and of the indexer."""
        if (b, length) not in self._tables:
            positions = torch.arange(length, device=self.model.embed_tokens.weight.device).repeat(b)
            own = self._rope(positions)
            self._tables[b, length] = own, own if self._index_rope is None else self._index_rope(positions)
        return self._tables[b, length]

    def __call__(
        self,
        token_ids: torch.Tensor,
        *,
        topk: int | None = None,
        frozen: bool = False,
        kl_rows: torch.Tensor | None = None,
        seen: Seen | None = None,
    ) -> Output:
        """Run a batch.

        Args:
            token_ids: [b, l], int64.
            topk: keys read by each query, chosen by the indexers; None is dense.
            frozen: the main model's parameters get no gradient (the indexer's warm-up).
            kl_rows: positions [b, r] whose indexer loss is computed, or None for none. The indexer's inputs are
                detached: its loss never reaches the main model, and the language-model loss never reaches it.
            seen: called with (layer, IndexView) for every layer with an indexer.
        """
        b, length = token_ids.shape
        sparse = topk is not None and length > topk
        indexed = sparse or kl_rows is not None or seen is not None
        (cos, sin), index_tables = self.tables(b, length)
        scale = self._config.softmax_scale
        kl: dict[int, torch.Tensor] = {}
        loads: dict[int, torch.Tensor] = {}
        residuals: list[torch.Tensor] = []
        excess: list[torch.Tensor] = []
        ids: torch.Tensor | None = None
        main = torch.is_grad_enabled() and not frozen
        with torch.autocast(token_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.set_grad_enabled(main):
                x = self.model.embed_tokens(token_ids.flatten()).float()
            for i, layer in enumerate(self.model.blocks()):
                with torch.set_grad_enabled(main):
                    inputs, latent, q, k, v = self.before(layer, x, cos, sin)
                q, k, v = (each.unflatten(0, (b, length)) for each in (q, k, v))
                if indexed and layer.self_attn.indexer is not None:
                    with torch.autocast(token_ids.device.type, enabled=False):
                        view = self._view(layer.self_attn, inputs, latent, q, k, index_tables, scale)
                        if sparse:
                            ids = select_ids(view.index_q, view.index_k, view.index_w, topk or 0)
                        if kl_rows is not None:
                            kl[i] = _loss(view, kl_rows, ids if sparse else None)
                        if seen is not None:
                            seen(i, view)
                with torch.set_grad_enabled(main):
                    out = self._attend(q, k, v, ids if sparse else None, scale)
                    heads = out[..., : self._config.v_dim].flatten(0, 1).contiguous()
                    x, load, largest, beyond = self.after(layer, x, heads, self.residual_limit)
                residuals.append(largest)
                excess.append(beyond)
                if load.numel():
                    loads[i] = load
            with torch.set_grad_enabled(main):
                hidden = self.model.norm(x)
        return Output(
            hidden=hidden, kl=kl, loads=loads, residuals=torch.stack(residuals), excess=torch.stack(excess).sum()
        )

    @staticmethod
    def _attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """q [b, l, h, d], k and v [b, l, g, d] -> [b, l, h, d]."""
        repeat = q.shape[2] // k.shape[2]
        if repeat > 1:
            k, v = (each.repeat_interleave(repeat, 2) for each in (k, v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = dense_attention(q, k, v, scale) if ids is None else selected_attention(q, k, v, ids, scale)
        return out.transpose(1, 2)

    @staticmethod
    def _view(
        attention: MLA, inputs: torch.Tensor, latent: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
        tables: Tables, scale: float,
    ) -> IndexView:  # fmt: skip
        """The indexer on detached inputs, in float32: gradients stop at the main model's hidden states."""
        indexer = attention.indexer
        assert indexer is not None, "asked for layers with an indexer only"
        inputs, latent = inputs.detach().float(), latent.detach().float()
        b, length = q.shape[:2]
        index_k = indexer.keys(inputs, tables, "float32").unflatten(0, (b, length))
        index_q, index_w = (
            each.unflatten(0, (b, length)) for each in indexer.queries(latent, inputs, tables, "float32")
        )
        return IndexView(index_q=index_q, index_k=index_k, index_w=index_w, q=q.detach(), k=k.detach(), scale=scale)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [b, r] of x [b, l, ...] -> [b, r, ...]."""
    index = rows.view(*rows.shape, *(1,) * (x.dim() - 2)).expand(*rows.shape, *x.shape[2:])
    return x.gather(1, index)


def _loss(view: IndexView, rows: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """KL of one layer on the given rows; with ids on the selected keys alone."""
    return indexer_kl(
        take_rows(view.index_q, rows), view.index_k, take_rows(view.index_w, rows), take_rows(view.q, rows), view.k,
        view.scale, rows, None if ids is None else take_rows(ids, rows),
    )  # fmt: skip

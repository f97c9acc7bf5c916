"""What one transformer class needs to know to be DeepSeek-V3.2, GLM-5.x or a converted grouped-query model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from model.errors import ModelError
from model.request import IndexDtype
from model.rope import RopeConfig

GQA_TYPES = ("llama", "qwen2", "qwen3", "mistral")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexerConfig:
    """The lightning indexer. own: per layer, True where the layer has an indexer and False where it reuses the last
    one's selection. interleaved: RoPE pairs (2i, 2i+1) instead of (i, i + d/2). dtype: precision of deployed scores."""

    num_heads: int
    head_dim: int
    rope_dim: int
    topk: int
    interleaved: bool
    own: tuple[bool, ...]
    dtype: IndexDtype = "float32"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Routed experts. sparse: per layer, True where the MLP is a mixture."""

    num_experts: int
    num_active: int
    num_shared: int
    intermediate_size: int
    num_groups: int
    num_active_groups: int
    normalise: bool
    scale: float
    sparse: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and switches of one checkpoint; sizes are in elements, lengths in tokens.

    groups: 1 for MLA; G for a converted model, whose rope part is G key heads and whose latent is G value heads side by
    side. latent_norm: RMSNorm on the latent. qkv_bias (Qwen2) and qk_norm (Qwen3) are per-slice fields.
    """

    architecture: Literal["deepseek_v32", "glm_moe_dsa", "mla_gqa"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    rope_interleaved: bool
    max_positions: int
    tied_embeddings: bool
    groups: int = 1
    latent_norm: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    indexer: IndexerConfig | None = None
    moe: MoeConfig | None = None

    @property
    def kv_width(self) -> int:
        return self.kv_lora_rank + self.rope_dim

    @property
    def absorbs(self) -> bool:
        """The cache's latent is part of the key (MLA), and W_UK may move to the query."""
        return self.architecture != "mla_gqa"

    @property
    def query_dim(self) -> int:
        """Width of one head's query as projected: nope and rope part, the rope part of its own group only."""
        return self.nope_dim + self.rope_dim // self.groups

    @property
    def softmax_scale(self) -> float:
        """d^-1/2 of the MHA form times YaRN's mscale squared: the same in every form."""
        return float(self.query_dim**-0.5) * self.rope.softmax_factor


def read_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """A checkpoint's config.json -> ModelConfig; `source` names the file in errors."""
    kind = raw.get("model_type")
    try:
        if kind in ("deepseek_v32", "glm_moe_dsa"):
            return _read_dsa(raw, kind, source)
        if kind in GQA_TYPES:
            return _read_gqa(raw)
        if kind == "mla_gqa":
            return dataclasses.replace(_read_gqa(raw), indexer=_read_indexer(raw, raw["num_hidden_layers"], source))
    except KeyError as error:
        raise ModelError(f"{source}: {kind} needs the key {error.args[0]!r}; the file does not have it") from None
    known = ", ".join(("deepseek_v32", "glm_moe_dsa", "mla_gqa", *GQA_TYPES))
    raise ModelError(f"{source}: expected model_type one of {known}; got {kind!r}")


def converted_config(raw: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """config.json of the written folder; dtype None keeps the source's."""
    config = {key: value for key, value in raw.items() if key not in ("quantization_config", "torch_dtype", "auto_map")}
    config["dtype"] = dtype or str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if raw["model_type"] in GQA_TYPES:
        config |= {"source_model_type": raw["model_type"], "model_type": "mla_gqa", "architectures": ["Transformer"]}
    return config


def _read_dsa(raw: Mapping[str, Any], kind: Literal["deepseek_v32", "glm_moe_dsa"], source: str) -> ModelConfig:
    layers = raw["num_hidden_layers"]
    return ModelConfig(
        architecture=kind,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_layers=layers,
        num_heads=raw["num_attention_heads"],
        q_lora_rank=raw["q_lora_rank"],
        kv_lora_rank=raw["kv_lora_rank"],
        nope_dim=raw["qk_nope_head_dim"],
        rope_dim=raw["qk_rope_head_dim"],
        v_dim=raw["v_head_dim"],
        intermediate_size=raw["intermediate_size"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope=RopeConfig.read(raw, raw["qk_rope_head_dim"], mscale_in_softmax=True),
        rope_interleaved=True,
        max_positions=raw["max_position_embeddings"],
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bool(raw.get("attention_bias", False)),
        o_bias=bool(raw.get("attention_bias", False)),
        indexer=_read_indexer(raw, layers, source),
        moe=_read_moe(raw, layers),
    )


def _read_moe(raw: Mapping[str, Any], layers: int) -> MoeConfig | None:
    types = raw.get("mlp_layer_types")
    dense = raw.get("first_k_dense_replace", 0)
    sparse = tuple(kind == "sparse" for kind in types) if types else tuple(i >= dense for i in range(layers))
    if not any(sparse):
        return None
    return MoeConfig(
        num_experts=raw["n_routed_experts"],
        num_active=raw["num_experts_per_tok"],
        num_shared=raw["n_shared_experts"],
        intermediate_size=raw["moe_intermediate_size"],
        num_groups=raw.get("n_group") or 1,
        num_active_groups=raw.get("topk_group") or 1,
        normalise=raw.get("norm_topk_prob", True),
        scale=raw["routed_scaling_factor"],
        sparse=sparse,
    )


def _read_indexer(raw: Mapping[str, Any], layers: int, source: str) -> IndexerConfig | None:
    if raw.get("index_n_heads") is None:
        return None
    for key in ("index_n_heads", "index_head_dim", "index_topk"):
        if type(raw[key]) is not int or raw[key] < 1:
            raise ModelError(f"{source}: {key}: expected a positive whole number, got {raw[key]!r}")
    rope_dim = raw.get("index_rope_dim", raw.get("qk_rope_head_dim", 0))
    if type(rope_dim) is not int or rope_dim % 2 or not 0 <= rope_dim <= raw["index_head_dim"]:
        raise ModelError(
            f"{source}: index_rope_dim: expected an even number from 0 to index_head_dim {raw['index_head_dim']}, "
            f"got {rope_dim!r}"
        )
    interleaved = raw.get("indexer_rope_interleave", raw["model_type"] == "glm_moe_dsa")
    quantised = (raw.get("quantization_config") or {}).get("quant_method") == "fp8"
    return IndexerConfig(
        num_heads=raw["index_n_heads"],
        head_dim=raw["index_head_dim"],
        rope_dim=rope_dim,
        topk=raw["index_topk"],
        interleaved=interleaved,
        own=_indexer_owners(raw, layers),
        # GLM's FP8 checkpoints leave the indexer unquantised; DeepSeek's score in FP8
        dtype="fp8" if quantised and raw["model_type"] == "deepseek_v32" else "float32",
    )


def _indexer_owners(raw: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers run an indexer; GLM-5.2 shares one between several. Source: IndexCache, arXiv:2603.12201."""
    types = raw.get("indexer_types") or raw.get("index_topk_pattern")
    if types:
        return tuple(kind in ("full", "F") for kind in types)
    frequency = max(raw.get("index_topk_freq") or 1, 1)
    offset = raw.get("index_skip_topk_offset", 2)
    return tuple(max(i - offset + 1, 0) % frequency == 0 for i in range(layers))


def _read_gqa(raw: Mapping[str, Any]) -> ModelConfig:
    heads = raw["num_attention_heads"]
    groups = raw.get("num_key_value_heads") or heads
    dim = raw.get("head_dim") or raw["hidden_size"] // heads
    source = raw.get("source_model_type", raw["model_type"])
    if raw.get("use_sliding_window") or (source == "mistral" and raw.get("sliding_window")):
        raise ModelError("config.json: sliding-window attention cannot be converted; expected full attention")
    return ModelConfig(
        architecture="mla_gqa",
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        q_lora_rank=None,
        kv_lora_rank=groups * dim,
        nope_dim=0,
        rope_dim=groups * dim,
        v_dim=dim,
        intermediate_size=raw["intermediate_size"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope=RopeConfig.read(raw, dim, mscale_in_softmax=False),
        rope_interleaved=False,
        max_positions=raw["max_position_embeddings"],
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        groups=groups,
        latent_norm=False,
        qkv_bias=raw.get("attention_bias", source == "qwen2") or source == "qwen2",
        o_bias=bool(raw.get("attention_bias", False)) and source == "llama",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=source == "qwen3",
    )

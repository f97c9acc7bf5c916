"""Small random checkpoints, saved by transformers itself, and our model run over a text in steps."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.cache import Cache
from model.checkpoint import load_model
from model.request import Attention
from model.segment import Segment
from model.transformer import Transformer

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "qk_nope_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "index_topk": 48,
    "index_head_dim": 32,
    "index_n_heads": 16,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="dsa-eval-tests-")


@functools.cache
def dsa_folder(kind: str = "deepseek", **changes: Any) -> Path:
    """A random DeepSeek-V3.2 or GLM checkpoint in transformers' format; weights large enough for sharp attention."""
    import transformers

    names = {"deepseek": "DeepseekV32", "glm": "GlmMoeDsa"}[kind]
    config_class = getattr(transformers, f"{names}Config")
    changed = {
        key: dict(value) if isinstance(value, tuple) and key == "rope_parameters" else value
        for key, value in changes.items()
    }
    config = config_class(**{**SMALL, **changed})
    torch.manual_seed(7)
    model = getattr(transformers, f"{names}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
    folder = Path(tempfile.mkdtemp(dir=_scratch().name))
    model.save_pretrained(folder)
    return folder


@functools.cache
def llama_folder(**changes: Any) -> Path:
    """A random Llama checkpoint with three heads a group, in transformers' format."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, **changes,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    folder = Path(tempfile.mkdtemp(dir=_scratch().name))
    model.save_pretrained(folder)
    return folder


def frozen(mapping: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A dict as a hashable argument of `dsa_folder`."""
    return tuple(mapping.items())


@functools.cache
def reference(folder: Path) -> Any:
    """transformers' own model of a folder, eager attention, float32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@functools.cache
def ours(folder: Path) -> Transformer:
    return load_model(str(folder), "float32")


def run(
    model: Transformer,
    ids: torch.Tensor,
    attention: Attention,
    steps: Sequence[int],
    index_dtype: str | None = "float32",
) -> torch.Tensor:
    """Logits [s, v] of a text that passes through in steps of the given sizes; a size of -1 is one decoded token."""
    dtype = model.embed_tokens.weight.dtype
    indexed = index_dtype if attention.topk is not None and attention.selector == "indexer" else None
    cache = Cache(model.config, len(ids), dtype=dtype, index_dtype=indexed)  # type: ignore[arg-type]
    out = []
    for size in steps:
        start, length = cache.length, abs(size)
        segment = Segment(
            cache=cache, attention=attention, start=start, length=length, rows=slice(0, length), decode=size < 0
        )
        with torch.inference_mode():
            out.append(model(ids[start : start + length], [segment], torch.arange(length)))
    assert cache.length == len(ids), "the steps cover the text"
    return torch.cat(out)

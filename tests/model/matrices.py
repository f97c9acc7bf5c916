"""Attention and index scores of a whole text as float64 matrices of tokens x tokens: what the probes are held against.

Written from the published formulas and tensor names; nothing here comes from model/ or kernels/.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Layer:
    """probabilities [h, n, n] dense and causal; values [n, h, v]; index scores [n, n], or None without an indexer."""

    logits: torch.Tensor
    values: torch.Tensor
    index: torch.Tensor | None

    @property
    def probabilities(self) -> torch.Tensor:
        return causal(self.logits).softmax(-1)


def open_folder(folder: Path) -> tuple[dict[str, Any], Weights]:
    """config.json and all tensors in float64 by their published names."""
    tensors = load_file(folder / "model.safetensors")
    return json.loads((folder / "config.json").read_text()), {name: t.double() for name, t in tensors.items()}


def causal(scores: torch.Tensor) -> torch.Tensor:
    n = scores.shape[-1]
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))


def rope(x: torch.Tensor, theta: float, interleaved: bool) -> torch.Tensor:
    """x [n, heads, d] rotated by its position, as complex numbers."""
    n, heads, d = x.shape
    angles = torch.arange(n).double()[:, None] * theta ** (-torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = x.view(n, heads, d // 2, 2) if interleaved else x.view(n, heads, 2, d // 2).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (turned if interleaved else turned.transpose(-1, -2)).reshape(n, heads, d)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def latent_layer(raw: dict[str, Any], weights: Weights, i: int, x: torch.Tensor) -> Layer:
    """One MLA layer in the MHA form; x: normalised hidden states [n, hidden]."""
    w = {k.removeprefix(f"model.layers.{i}.self_attn."): t for k, t in weights.items() if f".layers.{i}." in k}
    heads, nope, d_rope = raw["num_attention_heads"], raw["qk_nope_head_dim"], raw["qk_rope_head_dim"]
    theta = raw["rope_parameters"]["rope_theta"]
    x = x.double()
    n = len(x)
    q_latent = rms(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"])
    q = (q_latent @ w["q_b_proj.weight"].T).view(n, heads, nope + d_rope)
    both = x @ w["kv_a_proj_with_mqa.weight"].T
    latent = rms(both[:, : raw["kv_lora_rank"]], w["kv_a_layernorm.weight"])
    k_rope = rope(both[:, None, raw["kv_lora_rank"] :], theta, True)
    up = (latent @ w["kv_b_proj.weight"].T).view(n, heads, nope + raw["v_head_dim"])
    logits = torch.einsum("shd,thd->hst", q[..., :nope], up[..., :nope])
    logits += torch.einsum("shd,td->hst", rope(q[..., nope:], theta, True), k_rope[:, 0])
    index = None
    if "indexer.wk.weight" in w:
        index = index_scores(raw, {k.removeprefix("indexer."): t for k, t in w.items()}, q_latent, x, theta)
    return Layer(logits / math.sqrt(nope + d_rope), up[..., nope:], index)


def index_scores(
    raw: dict[str, Any], w: Weights, q_latent: torch.Tensor, x: torch.Tensor, theta: float
) -> torch.Tensor:
    """Lightning indexer: sum_j w_j relu(q_j . k), [n, n]; the rope part comes first."""
    heads, d, d_rope = raw["index_n_heads"], raw["index_head_dim"], raw["qk_rope_head_dim"]
    interleaved = raw["model_type"] == "glm_moe_dsa"
    k = x @ w["wk.weight"].T
    k = torch.nn.functional.layer_norm(k, (d,), w["k_norm.weight"], w["k_norm.bias"], 1e-6)[:, None]
    q = (q_latent @ w["wq_b.weight"].T).view(len(x), heads, d)
    q, k = (torch.cat((rope(y[..., :d_rope], theta, interleaved), y[..., d_rope:]), -1) for y in (q, k))
    weights = x @ w["weights_proj.weight"].T / math.sqrt(heads * d)
    return torch.einsum("shd,td->sht", q, k[:, 0]).relu().mul(weights[..., None]).sum(1)


def grouped_layer(raw: dict[str, Any], weights: Weights, i: int, x: torch.Tensor) -> Layer:
    """One grouped-query layer of a Llama checkpoint."""
    w = {k.removeprefix(f"model.layers.{i}.self_attn."): t for k, t in weights.items() if f".layers.{i}." in k}
    heads, groups, d = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]
    theta = raw["rope_parameters"]["rope_theta"]
    x = x.double()
    q, k, v = (
        (x @ w[f"{name}_proj.weight"].T).view(len(x), count, d)
        for name, count in (("q", heads), ("k", groups), ("v", groups))
    )
    k, v = (y.repeat_interleave(heads // groups, 1) for y in (rope(k, theta, False), v))
    return Layer(torch.einsum("shd,thd->hst", rope(q, theta, False), k) / math.sqrt(d), v, None)

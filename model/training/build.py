"""The model that training starts from: new random weights, a checkpoint, or a checkpoint that gets an indexer."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.checkpoint import fingerprint, load_model, read_raw_config, resolve
from model.config import converted_config, read_config
from model.errors import ModelError
from model.indexer_folder import Base
from model.transformer import Transformer

INIT = 0.6  # std x sqrt(fan in) of the projections


def new_model(raw: Mapping[str, Any], seed: int) -> Transformer:
    """A model of this config.json with random weights. Raises ModelError for what the config lacks."""
    config = read_config(raw, "model.new")
    if config.indexer is None:
        raise ModelError("model.new: expected index_n_heads, index_head_dim and index_topk: a new model has an indexer")
    model = Transformer(config)
    initialise(model, torch.Generator().manual_seed(seed), config.num_layers)
    return model


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator, num_layers: int) -> None:
    """Normal weights by fan in; what writes to the residual is divided by sqrt(2 layers); norms 1, biases 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        std = INIT * parameter.shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            std /= math.sqrt(2 * num_layers)
        elif name.endswith("gate.weight"):
            std = 0.02
        elif name == "embed_tokens.weight":
            std = 0.5
        elif name == "lm_head.weight":
            std = 0.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def start_from(path: str, indexer: Mapping[str, Any] | None, seed: int) -> tuple[Transformer, dict[str, Any], Path]:
    """A checkpoint in float32, its config.json and its folder; `indexer` (config keys) adds one where there is none.

    Raises:
        ModelError: no indexer and none asked for, or one asked for that is already there.
    """
    folder = resolve(path)
    raw = converted_config(read_raw_config(folder), None)
    if raw.get("index_n_heads") is not None or indexer is None:
        if indexer is not None:
            raise ModelError(f"model.indexer: {path} has an indexer of its own: remove the key")
        if raw.get("index_n_heads") is None:
            raise ModelError(f"model.start: {path} has no indexer: add model.indexer with its sizes")
        return load_model(path, "float32").requires_grad_(True), raw, folder
    raw |= indexer
    bare = load_model(path, "float32")
    model = Transformer(read_config(raw, "model.indexer"))
    generator = torch.Generator().manual_seed(seed)
    for layer in model.blocks():
        if layer.self_attn.indexer is not None:
            initialise(layer.self_attn.indexer, generator, num_layers=1)
    missing = model.load_state_dict(bare.state_dict(), strict=False).missing_keys
    assert all(".indexer." in name for name in missing), "only the indexer is new"
    return model, raw, folder


def base_of(path: str) -> Base:
    """What an indexer for this checkpoint must remember of it; a folder is known by its last name."""
    folder = resolve(path)
    return Base(name=folder.name if Path(path).expanduser().is_dir() else path, weights=fingerprint(folder))

"""From a checkpoint's published tensor names to our parameters; every tensor is accounted for."""

import math
import re

import torch

from kernels.fp8 import GROUP, dequantize_blocks
from model.config import ModelConfig
from model.errors import ModelError
from model.transformer import Transformer
from model.weights import Source

Region = tuple[int | slice, ...]
FLOAT32 = ("e_score_correction_bias", "indexer.weights_proj.weight", "indexer.k_norm.weight", "indexer.k_norm.bias")
SCALE = "_scale_inv"
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
PROJECTION = re.compile(r"(.*\.self_attn)\.(k_proj|v_proj)\.(weight|bias)")
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def place(config: ModelConfig, name: str) -> tuple[str, Region] | None:
    """Where a published tensor goes: (our parameter, the region of it that it fills), or None if it is not used.

    Not used: the multi-token-prediction layer behind the last one, a tied head, RoPE tables of old checkpoints.
    """
    layer = LAYER.match(name)
    if layer and int(layer[1]) >= config.num_layers:
        return None
    if name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight"):
        return None
    ours = name.removeprefix("model.")
    if config.moe is not None and (expert := EXPERT.fullmatch(ours)):
        stem, index, kind = expert[1], int(expert[2]), expert[3]
        size = config.moe.intermediate_size
        rows = {"gate_proj": slice(0, size), "up_proj": slice(size, 2 * size), "down_proj": slice(None)}[kind]
        return f"{stem}.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}", (index, rows)
    if config.architecture == "mla_gqa" and (projection := PROJECTION.fullmatch(ours)):
        stem, kind, part = projection[1], projection[2], projection[3]
        values = slice(0, config.kv_lora_rank)
        keys = slice(config.kv_lora_rank, config.kv_width)
        return f"{stem}.kv_a_proj_with_mqa.{part}", (values if kind == "v_proj" else keys,)
    return ours, ()


def published_names(config: ModelConfig, source: Source) -> dict[str, list[str]]:
    """Our parameters, each with the published tensors that fill it, scales left out."""
    parts: dict[str, list[str]] = {}
    for name in source:
        target = place(config, name)
        if target is not None and not name.endswith(SCALE):
            parts.setdefault(target[0], []).append(name)
    return parts


def _place_scale(config: ModelConfig, name: str) -> tuple[str, Region] | None:
    """Where block scales go if their weight is held as FP8: beside it, in the same region counted in blocks."""
    target = place(config, name.removesuffix(SCALE))
    if target is None:
        return None
    ours, region = target
    blocks = tuple(_in_blocks(part) if isinstance(part, slice) else part for part in region)
    return ours + SCALE, blocks


def _in_blocks(rows: slice) -> slice:
    return rows if rows.stop is None else slice(rows.start // GROUP, -(-rows.stop // GROUP))


def check_tensors(model: Transformer, source: Source, origin: str) -> dict[str, tuple[str, Region]]:
    """Where every tensor that is used goes, found from names, shapes and kinds alone: no weight is read.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape, or an FP8 weight has no block scales that cover
            it; missing and unexpected ones are counted, the first is named.
    """
    wanted = _wanted(model)
    filled: dict[str, int] = dict.fromkeys(wanted, 0)
    places: dict[str, tuple[str, Region]] = {}
    unexpected: list[str] = []
    names = set(source)
    for name in sorted(names):
        if name.endswith(SCALE) and name.removesuffix(SCALE) in names:
            scaled = _place_scale(model.config, name)
            if scaled is not None and scaled[0] in wanted:
                filled[scaled[0]] += math.prod(source.shape(name))  # its shape is checked with its weight
                places[name] = scaled
            continue
        target = place(model.config, name)
        if target is None:
            continue
        ours, region = target
        if ours not in wanted:
            unexpected.append(name)
            continue
        hole = wanted[ours][region] if region else wanted[ours]
        if source.shape(name) != tuple(hole.shape):
            raise ModelError(f"{origin}: {name}: expected shape {list(hole.shape)}, got {list(source.shape(name))}")
        if source.is_float8(name):
            _check_scales(source, name, names, origin)
        filled[ours] += hole.numel()
        places[name] = target
    missing = [name for name, count in filled.items() if count < wanted[name].numel()]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"{len(missing)} parameters are missing or incomplete, first model.{missing[0]}")
        if unexpected:
            parts.append(f"{len(unexpected)} tensors are unexpected, first {unexpected[0]}")
        raise ModelError(f"{origin}: {'; '.join(parts)}; is config.json of the same checkpoint?")
    return places


def load_weights(
    model: Transformer, source: Source, dtype: torch.dtype, origin: str, device: str | torch.device = "cpu"
) -> None:
    """Fill a model built on the meta device, tensor by tensor on `device`; `origin` names the checkpoint in errors.

    FP8 weights are multiplied by their block scales in float32, then cast, but for those that the model holds as FP8
    (`model.fp8.hold_fp8`): these and their scales are taken as they are. Router bias and index weights stay float32.

    Raises:
        ModelError: as `check_tensors`.
    """
    wanted = _wanted(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, (ours, region) in check_tensors(model, source, origin).items():
        held = wanted[ours].dtype == torch.float8_e4m3fn
        if ours not in tensors:
            kind = torch.float32 if ours.endswith((*FLOAT32, SCALE)) else wanted[ours].dtype if held else dtype
            tensors[ours] = torch.empty(wanted[ours].shape, dtype=kind, device=device)
        hole = tensors[ours][region] if region else tensors[ours]
        hole.copy_(_read(source, name, device, held))
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tied_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def _wanted(model: Transformer) -> dict[str, torch.Tensor]:
    wanted = dict(model.state_dict(keep_vars=True))
    if model.config.tied_embeddings:
        wanted.pop("lm_head.weight", None)
    return wanted


def _check_scales(source: Source, name: str, names: set[str], origin: str) -> None:
    if name + SCALE not in names:
        raise ModelError(
            f"{origin}: {name} is float8 but {name + SCALE} is missing; its {GROUP} x {GROUP} scales are needed"
        )
    expected = [-(-size // GROUP) for size in source.shape(name)]
    if list(source.shape(name + SCALE)) != expected:
        raise ModelError(
            f"{origin}: {name + SCALE}: expected scales {expected} for weight {list(source.shape(name))}, "
            f"got {list(source.shape(name + SCALE))}"
        )


def _read(source: Source, name: str, device: str | torch.device, held: bool) -> torch.Tensor:
    tensor = source.read(name)
    if held or not source.is_float8(name):
        return tensor
    return dequantize_blocks(tensor.to(device), source.read(name + SCALE).to(device))

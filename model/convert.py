"""Writing a checkpoint in our own form: grouped-query models become MLA, FP8 and GGUF become plain safetensors."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model.chat.gguf import end_ids, restore_split_rule
from model.checkpoint import gguf_file, load_model, pick_dtype, read_raw_config, resolve
from model.config import converted_config
from model.errors import ModelError
from model.transformer import Transformer
from model.weights import INDEX

SHARD_BYTES = 2 << 30
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
)  # fmt: skip


def convert_folder(source: str, destination: str, dtype: str = "auto", context: int | None = None) -> Path:
    """Read any checkpoint that `load_model` opens and write it as one folder of safetensors with our parameter names.

    A grouped-query model becomes `model_type: mla_gqa`: exactly the same function, its key heads side by side as the
    rope key and its value heads side by side as the latent. FP8 weights are written dequantised.

    Args:
        source: bundled name, folder, GGUF folder or hub id. destination: a folder that does not exist or is empty.
        dtype: "float32", "bfloat16" or "auto".
        context: tokens that the written model declares, None as the source; see `stretched`.

    Raises:
        ModelError: the destination holds files, the source cannot be read, or has that context already; nothing is
            left half written.
    """
    target = Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"convert: {target} exists and is not an empty folder; name a new one")
    folder = resolve(source)
    raw = read_raw_config(folder)
    if context is not None:
        raw = stretched(raw, context)
    model = load_model(source, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        kind = str(pick_dtype(raw, dtype)).removeprefix("torch.")
        (scratch / "config.json").write_text(json.dumps(converted_config(raw, kind), indent=2, sort_keys=True) + "\n")
        write_tokenizer(folder, scratch)
        write_shards(published_state(model), scratch, SHARD_BYTES)
        if target.exists():
            target.rmdir()
        scratch.chmod(0o777 & ~_umask())
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def stretched(raw: Mapping[str, Any], context: int) -> dict[str, Any]:
    """config.json of the same weights for `context` tokens: rotations stretched by YaRN (arXiv:2309.00071), untrained.

    Raises ModelError unless that is more than the config declares, and its rotations are plain or YaRN.
    """
    declared = int(raw["max_position_embeddings"])
    if context <= declared:
        raise ModelError(f"convert --context: expected more than the model's {declared} tokens, got {context}")
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = dict(raw.get(key) or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise ModelError(f"convert --context: expected a model with plain or YaRN rotations, got {kind!r}")
    original = int(rope.get("original_max_position_embeddings") or declared)
    rope |= {"rope_type": "yarn", "factor": context / original, "original_max_position_embeddings": original}
    return {**raw, "max_position_embeddings": context, key: rope}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tokenizer(folder: Path, target: Path) -> None:
    """Copy the tokenizer's files; out of a GGUF file they are made, with the split rule and the end that it names."""
    if (folder / "tokenizer.json").exists() or not any(folder.glob("*.gguf")):
        for name in TOKENIZER_FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, target / name)
        return
    from transformers import AutoTokenizer

    file = gguf_file(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    restore_split_rule(tokenizer.backend_tokenizer, file)
    for token in end_ids(file)[:1]:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    tokenizer.save_pretrained(target)


def published_state(model: Transformer) -> dict[str, torch.Tensor]:
    """Parameters and router biases under the names that checkpoints are published with."""
    state = {f"model.{name}" if not name.startswith("lm_head") else name: t for name, t in model.state_dict().items()}
    if model.config.tied_embeddings:
        state.pop("lm_head.weight")
    return dict(_split_experts(state, model))


def write_shards(state: dict[str, torch.Tensor], target: Path, shard_bytes: int) -> None:
    """Files of at most `shard_bytes` (or one tensor) in order of name, with the usual index when there are several."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name in sorted(state):
        num_bytes = state[name].numel() * state[name].element_size()
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = state[name].detach().cpu().contiguous().clone()
        size += num_bytes
    if len(shards) == 1:
        save_file(shards[0], target / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split_experts(state: dict[str, torch.Tensor], model: Transformer) -> list[tuple[str, torch.Tensor]]:
    """Stacked experts under the names that checkpoints are published with."""
    out = []
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                stem = f"{name.removesuffix('gate_up_proj')}{e}"
                out += [(f"{stem}.gate_proj.weight", gate), (f"{stem}.up_proj.weight", up)]
        elif name.endswith("experts.down_proj") and "shared" not in name:
            out += [(f"{name.removesuffix('down_proj')}{e}.down_proj.weight", down) for e, down in enumerate(tensor)]
        else:
            out.append((name, tensor))
    return out

"""Folders that a training leaves: a Hugging Face checkpoint each, with the optimiser's state beside it."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model.convert import published_state, write_shards, write_tokenizer
from model.errors import ModelError
from model.indexer_folder import Base, write_indexer
from model.placement import FLOAT32
from model.training.optim import Optimizer
from model.transformer import Transformer

SHARD_BYTES = 15 << 20  # parts stay below 16 MiB, header included
# in a folder of their own: whoever opens the checkpoint takes every safetensors file beside config.json for weights
STATE, TENSORS = "training/progress.json", "training/state.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.bfloat16}


@dataclasses.dataclass(slots=True, kw_only=True)
class Progress:
    """Where a training is. stage, step: next step of the stage at this index. seconds: trained in this stage.
    total_steps, tokens: over all stages."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    total_steps: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What every checkpoint of one training shares: config.json and where the tokenizer's files are.

    base, indexer: the model that got its indexer here, and the keys of config.json that describe it.
    """

    raw: Mapping[str, Any]
    tokenizer: Path | None
    base: Base | None = None
    indexer: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def write_indexer(self, model: Transformer, target: Path) -> None:
        """The indexer alone, where this training added one."""
        if self.base is not None:
            write_indexer(model, self.indexer, self.base, target)

    def write_model(self, model: Transformer, target: Path) -> None:
        """config.json, weights in parts below 16 MiB, tokenizer files: what `load_model` and transformers open."""
        kept = str(self.raw.get("dtype") or "bfloat16").removeprefix("torch.")
        dtype = DTYPES[kept]
        config = {**self.raw, "dtype": str(dtype).removeprefix("torch.")}
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        state = {
            name: t.float() if name.endswith(FLOAT32) else t.to(dtype) for name, t in published_state(model).items()
        }
        write_shards(state, target, SHARD_BYTES)
        if self.tokenizer is not None:
            write_tokenizer(self.tokenizer, target)


def save(folder: Folder, model: Transformer, optimizer: Optimizer | None, progress: Progress, target: Path) -> Path:
    """Write a checkpoint whole or not at all; without an optimiser it cannot be resumed."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    folder.write_model(model, scratch)
    if optimizer is not None:
        (scratch / TENSORS).parent.mkdir()
        masters = {f"master/{name}": t.detach().float().cpu().clone() for name, t in model.state_dict().items()}
        if model.config.tied_embeddings:
            masters.pop("master/lm_head.weight")
        moments = {name: t.cpu().contiguous() for name, t in optimizer.state().items()}
        save_file({**masters, **moments}, scratch / TENSORS)
        (scratch / STATE).write_text(json.dumps(dataclasses.asdict(progress), indent=1, sort_keys=True) + "\n")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(scratch, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def resume(folder: Path, model: Transformer, optimizer: Optimizer) -> Progress:
    """Fill model and optimiser from a checkpoint. Raises ModelError if it is not one, or of another model."""
    if not (folder / STATE).is_file() or not (folder / TENSORS).is_file():
        raise ModelError(f"{folder}: expected a checkpoint with {STATE} and {TENSORS}; start without --resume")
    tensors = load_file(folder / TENSORS)
    masters = {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if model.config.tied_embeddings:
        wanted.pop("lm_head.weight")
    different = sorted(name for name in wanted.keys() | masters.keys() if name not in masters or name not in wanted)
    different += sorted(n for n in wanted.keys() & masters.keys() if wanted[n] != tuple(masters[n].shape))
    if different:
        raise ModelError(
            f"{folder}: a checkpoint of another architecture: {len(different)} tensors differ, first {different[0]}"
        )
    model.load_state_dict(masters, strict=False)
    optimizer.load_state(tensors)
    return Progress(**json.loads((folder / STATE).read_text()))


def latest(out: Path) -> Path | None:
    """The checkpoint with the most steps in a training folder."""
    found = [p for p in (out / "checkpoints").glob("step-*") if (p / STATE).is_file()]
    return max(found, key=lambda p: p.name, default=None)

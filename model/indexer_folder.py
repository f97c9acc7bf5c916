"""An indexer in a folder of its own, trained for a model that was published without one, and joined to it at load."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model.config import converted_config
from model.errors import ModelError
from model.placement import FLOAT32
from model.transformer import Transformer
from model.weights import Weights

CONFIG, WEIGHTS = "indexer.json", "indexer.safetensors"
PART = ".indexer."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that an indexer belongs to. name: as users call it. weights: sha256 hex of config and weight files."""

    name: str
    weights: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexerFolder:
    """keys: what config.json of the model would say about the indexer. layers: of the model."""

    folder: Path
    base: Base
    layers: int
    keys: Mapping[str, Any]

    def weights(self) -> Weights:
        return Weights(self.folder)

    def join(self, raw: Mapping[str, Any], weights: str, path: str) -> dict[str, Any]:
        """config.json of the model with this indexer; raw, weights: the model's own config and hash, path: its name.

        Raises ModelError if the model is another one, or has an indexer.
        """
        if raw.get("index_n_heads") is not None:
            raise ModelError(f"model.indexer: {path} has an indexer of its own: remove the key")
        if raw.get("num_hidden_layers") != self.layers:
            raise ModelError(
                f"model.indexer: {self.folder.name} was trained for {self.layers} layers of {self.base.name}, "
                f"{path} has {raw.get('num_hidden_layers')}"
            )
        if weights != self.base.weights:
            raise ModelError(
                f"model.indexer: {self.folder.name} was trained on {self.base.name} with weights "
                f"{self.base.weights[:12]}…, {path} has {weights[:12]}…: an indexer serves these very weights only"
            )
        return converted_config(raw, None) | dict(self.keys)

    def check(self, model: Transformer) -> None:
        """Raise ModelError unless the file has exactly the indexer's tensors of a model (may be on meta)."""
        source = self.weights()
        found = {name: source.shape(name) for name in source}
        wanted = {f"model.{name}": tuple(t.shape) for name, t in model.state_dict().items() if PART in name}
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if wrong:
            name = wrong[0]
            raise ModelError(
                f"{self.folder / WEIGHTS}: {len(wrong)} tensors do not fit the model, first {name}: "
                f"expected {_told(wanted.get(name))}, got {_told(found.get(name))}"
            )


def _told(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else f"shape {list(shape)}"


def read_indexer(folder: Path) -> IndexerFolder:
    """Raises ModelError for a file that is missing or not as `write_indexer` writes it."""
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(f"model.indexer: expected {CONFIG} and {WEIGHTS} in {folder}; found no {CONFIG}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        base = Base(name=str(raw["base"]["name"]), weights=str(raw["base"]["weights"]))
        return IndexerFolder(folder=folder, base=base, layers=int(raw["base"]["layers"]), keys=dict(raw["config"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: expected JSON with base (name, weights, layers) and config ({error!r})") from None


def write_indexer(model: Transformer, keys: Mapping[str, Any], base: Base, target: Path) -> Path:
    """indexer.json and indexer.safetensors (bfloat16, head weights and norms float32); whole or not at all."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = {
        f"model.{name}": tensor.detach().to(torch.float32 if name.endswith(FLOAT32) else torch.bfloat16).cpu()
        for name, tensor in model.state_dict().items()
        if PART in name
    }
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, scratch / WEIGHTS, {"format": "pt"})
    about = {"base": {**dataclasses.asdict(base), "layers": model.config.num_layers}, "config": dict(keys)}
    (scratch / CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    return target

"""Reading a folder of safetensors: which tensors are there, in which shard, and each of them when asked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.errors import ModelError

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Weights:
    """Tensors of one checkpoint folder by name; nothing is read before it is asked for.

    An index may say `"stored_as": {"model.layers.4.": "model.layers.3."}`: tensors whose name begins with the left side
    are read under the right side, so that layers of equal weights lie on the disk once. weight_map lists all of them.

    Raises ModelError for a missing or truncated shard, a broken index, and pickle files in place of safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self.shard_of: dict[str, Path] = {}
        self._stored_as: dict[str, str] = {}
        index = folder / INDEX
        if index.exists():
            self._read_index(index)
            return
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
            if pickles:
                raise ModelError(
                    f"{folder}: pickle weights ({pickles[0]}) are refused, they can run code; "
                    "save the checkpoint as safetensors (save_pretrained does)"
                )
            raise ModelError(f"{folder}: expected model.safetensors or {INDEX}; found neither")
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118 (safe_open is no mapping)
                self.shard_of[name] = file

    def _read_index(self, index: Path) -> None:
        try:
            content = json.loads(index.read_text())
            table = dict(content["weight_map"])
            self._stored_as = dict(content.get("stored_as", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: expected JSON with a weight_map ({error!r}); download it again") from None
        for shard in sorted(set(table.values())):
            path = self.folder / shard
            if not path.exists():
                raise ModelError(f"{index}: shard {shard} is missing; download it again into {self.folder}")
            present = set(self._open(path).keys())
            absent = sorted(name for name, file in table.items() if file == shard and self._name(name) not in present)
            if absent:
                raise ModelError(
                    f"{path}: the index promises {len(absent)} tensors that the shard lacks, first {absent[0]}"
                )
        self.shard_of = {name: self.folder / shard for name, shard in table.items()}

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path}: not a whole safetensors file, {path.stat().st_size} bytes ({error}); download it again"
                ) from None
        return self._files[path]

    def _name(self, name: str) -> str:
        """Of a tensor in its file."""
        for prefix, stored in self._stored_as.items():
            if name.startswith(prefix):
                return stored + name.removeprefix(prefix)
        return name

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.shard_of))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self.shard_of[name]).get_slice(self._name(name)).get_shape())

    def is_float8(self, name: str) -> bool:
        return str(self._open(self.shard_of[name]).get_slice(self._name(name)).get_dtype()) == "F8_E4M3"

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._open(self.shard_of[name]).get_tensor(self._name(name))
        return tensor


class Joined:
    """Tensors of two sources as one."""

    def __init__(self, first: "Weights | StateDict", second: "Weights | StateDict") -> None:
        self._of = {**dict.fromkeys(first, first), **dict.fromkeys(second, second)}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._of))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of[name].shape(name)

    def is_float8(self, name: str) -> bool:
        return self._of[name].is_float8(name)

    def read(self, name: str) -> torch.Tensor:
        return self._of[name].read(name)


class StateDict:
    """The same questions asked of tensors in memory (a GGUF file that transformers has dequantised)."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def is_float8(self, name: str) -> bool:
        return self.tensors[name].dtype == torch.float8_e4m3fn

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


Source = Weights | StateDict | Joined

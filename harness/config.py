"""One YAML file describes one experiment: its schema and its digest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from harness.engine import SELECTORS, Attention, CacheDtype, IndexDtype, Selector
from harness.errors import HarnessError
from harness.yaml_errors import as_one_line, nearest, read_yaml

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
DIGEST_DIGITS = 10

Positive = Annotated[int, Field(gt=0)]
NonEmpty = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LocalModel(_Strict):
    """A checkpoint that this machine serves: bundled name, folder or hub id.

    indexer: bundled name or folder of one that was trained for this checkpoint, which has none of its own.
    chat_template: null takes the model's own, false writes plain text. thinking: default for all tasks, null theirs.
    """

    path: NonEmpty
    indexer: NonEmpty | None = None
    dtype: Annotated[str, Field(pattern="^(auto|float32|bfloat16|fp8)$")] = "auto"
    chat_template: bool | None = None
    thinking: bool | None = None

    @model_serializer(mode="wrap")
    def _no_indexer_no_key(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an indexer the model reads, and its run folder is named, as before there was the key."""
        fields: dict[str, Any] = inner(self)
        if fields.get("indexer") is None:
            fields.pop("indexer", None)
        return fields


class EndpointModel(_Strict):
    """An OpenAI-compatible server. tokenizer: folder that counts tokens; without one, counts are bytes."""

    endpoint: NonEmpty
    name: NonEmpty
    key_env: NonEmpty | None = None
    tokenizer: NonEmpty | None = None
    thinking: bool | None = None


class ScriptedModel(_Strict):
    """No model: answers with the gold text, with nothing, or with a well-formed wrong text. Proves the scorers."""

    scripted: Annotated[str, Field(pattern="^(gold|empty|wrong)$")]


ModelChoice = LocalModel | EndpointModel | ScriptedModel


def _kind(value: Any) -> str | None:
    """Which of the three a model is: the one key that only it has."""
    has = value.__contains__ if isinstance(value, Mapping) else lambda key: hasattr(value, key)
    keys = [key for key in ("path", "endpoint", "scripted") if has(key)]
    return keys[0] if len(keys) == 1 else None


_Model = Annotated[
    Annotated[LocalModel, Tag("path")]
    | Annotated[EndpointModel, Tag("endpoint")]
    | Annotated[ScriptedModel, Tag("scripted")],
    Discriminator(
        _kind,
        custom_error_type="model",
        custom_error_message="expected one of {path: …}, {endpoint: …, name: …} or {scripted: gold|empty|wrong}",
    ),
]


class Variant(_Strict):
    """How one variant reads its context; `topk: null` is dense. model: other weights than the experiment's."""

    topk: int | None = None
    selector: Selector = "indexer"
    index_dtype: IndexDtype | None = None
    cache_dtype: CacheDtype = "auto"
    model: _Model | None = None

    @field_validator("topk")
    @classmethod
    def _positive(cls, topk: int | None) -> int | None:
        if topk is not None and topk <= 0:
            raise ValueError("expected a positive number of keys, or null for dense")
        return topk

    @model_validator(mode="after")
    def _dense_has_no_selector(self) -> Self:
        for key in ("selector", "index_dtype"):
            if self.topk is None and key in self.model_fields_set:
                raise ValueError(f"{key} contradicts dense attention (topk: null reads every key): remove one of them")
        return self


class Generation(_Strict):
    """Overrides of a protocol's sampling; what is absent stays the protocol's."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Positive | None = None
    max_tokens: Positive | None = None
    stop: Annotated[tuple[NonEmpty, ...], Field(strict=False)] | None = None


class TaskEntry(BaseModel):
    """One line of the suite. Keys beyond these are the task's own options, checked against its YAML by the plan.

    name: of tables and files, the task's by default. samples: docs, or docs a cell for generated tasks; null is all.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    task: NonEmpty
    name: Annotated[str, Field(pattern=NAME)] | None = None
    samples: Positive | None = None
    data: NonEmpty | None = None
    repeats: Positive | None = None
    generation: Generation = Generation()
    thinking: bool | None = None

    @property
    def label(self) -> str:
        return self.name or self.task

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _repeats_differ(self) -> Self:
        if (self.repeats or 1) > 1 and self.generation.temperature == 0:
            raise ValueError(
                f"repeats: {self.repeats} greedy answers would all be the same: set generation.temperature above 0"
            )
        return self


class Recall(_Strict):
    """What is measured beside the answers. queries: prompt positions sampled. selectors: null is all the model has."""

    queries: Annotated[int, Field(ge=0)]
    ks: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]
    selectors: Annotated[tuple[Selector, ...], Field(strict=False, min_length=1)] | None = None

    @field_validator("ks", "selectors")
    @classmethod
    def _once_each(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if values is not None and len(set(values)) < len(values):
            raise ValueError("expected every value once")
        return values


class Compare(_Strict):
    """baseline: the variant that the others are compared with. margin: of equivalence, by task name or "default"."""

    baseline: NonEmpty
    margin: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}


class Config(_Strict):
    """The whole experiment; a field is here only if it may change a score or its verdict."""

    name: Annotated[str, Field(pattern=NAME)]
    model: _Model
    variants: Annotated[dict[Annotated[str, Field(pattern=NAME)], Variant], Field(min_length=1)]
    tasks: Annotated[tuple[TaskEntry, ...], Field(strict=False, min_length=1)]
    recall: Recall | None = None
    compare: Compare | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        seen: dict[str, int] = {}
        for index, entry in enumerate(self.tasks):
            if entry.label in seen:
                raise ValueError(
                    f"tasks.{index}: {entry.label!r} is tasks.{seen[entry.label]}'s name already: give one a `name:`"
                )
            seen[entry.label] = index
        if self.compare is not None and self.compare.baseline not in self.variants:
            hint = nearest(self.compare.baseline, self.variants)
            raise ValueError(f"compare.baseline: {self.compare.baseline!r} is not a variant{hint}")
        for name, variant in self.variants.items():
            model = self.model_of(name)
            if isinstance(model, EndpointModel) and variant.model_fields_set - {"model"}:
                key = sorted(variant.model_fields_set - {"model"})[0]
                raise ValueError(f"variants.{name}.{key}: attention cannot be set on an endpoint: remove the key")
            if isinstance(model, LocalModel) and "topk" not in variant.model_fields_set:
                raise ValueError(
                    f"variants.{name}.topk: expected a positive number of keys, or null for dense, got nothing"
                )
        return self

    def model_of(self, variant: str) -> ModelChoice:
        """The model that serves a variant."""
        return self.variants[variant].model or self.model

    def attention_of(self, variant: str) -> Attention:
        """The attention that a variant asks its engine for."""
        chosen = self.variants[variant]
        return Attention(
            topk=chosen.topk,
            selector=chosen.selector,
            index_dtype=chosen.index_dtype,
            cache_dtype=chosen.cache_dtype,
            seed=self.seed,
        )

    def engines(self) -> tuple[tuple[ModelChoice, dict[str, Attention]], ...]:
        """One (model, its variants) per distinct model, so that weights are loaded once for all their variants."""
        grouped: dict[ModelChoice, dict[str, Attention]] = {}
        for variant in self.variants:
            grouped.setdefault(self.model_of(variant), {})[variant] = self.attention_of(variant)
        return tuple(grouped.items())


def load_config(path: Path) -> Config:
    """Reads and checks a config. Raises HarnessError: file, key path, what came, what was expected, nearest name."""
    raw = read_yaml(Path(path))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise HarnessError(f"{path}: {as_one_line(error, Config)}") from None


def digest(config: Config) -> str:
    """Names the run folder: same name, model, variants and seed, whatever else grew since."""
    parts = config.model_dump(mode="json", include={"name", "model", "variants", "seed"}, exclude_defaults=False)
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]


__all__ = [
    "SELECTORS",
    "Compare",
    "Config",
    "EndpointModel",
    "Generation",
    "LocalModel",
    "ModelChoice",
    "Recall",
    "ScriptedModel",
    "TaskEntry",
    "Variant",
    "digest",
    "load_config",
]

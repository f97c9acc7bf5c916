"""One YAML file describes one training: its schema, and what the trainer and the corpus take from it."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.config import NAME
from harness.corpus.config import CorpusConfig, Phase, check_kinds
from harness.engine import LengthPhase, ModelError, OptimizerConfig, Schedule, StageConfig, TrainingConfig
from harness.errors import HarnessError
from harness.yaml_errors import as_one_line, read_yaml

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Start(_Strict):
    """What is trained. new: config.json of a model with random weights, and `tokenizer`, the folder of its tokenizer.

    start: a bundled name, folder or hub id instead; indexer: keys of config.json that add one where there is none.
    """

    new: dict[str, Any] | None = None
    tokenizer: Path | None = None
    start: NonEmpty | None = None
    indexer: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.new is None) == (self.start is None):
            raise ValueError("expected one of {new: …, tokenizer: …} or {start: …}")
        if (self.new is None) != (self.tokenizer is None):
            raise ValueError("expected tokenizer beside new, and not beside start: a checkpoint has its own")
        if self.new is not None and self.indexer is not None:
            raise ValueError("indexer contradicts new: write its keys into new")
        return self


class Rate(_Strict):
    """A learning rate over a stage: warm-up steps, constant until the share `hold`, then linear to `end` x peak."""

    peak: Annotated[float, Field(gt=0)]
    warm_steps: Annotated[int, Field(ge=0)] = 0
    hold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    end: Share = 0.0


class Stage(_Strict):
    """See model.training.config.StageConfig. lengths: {share of the stage from which on: {length: share of steps}}."""

    name: Annotated[str, Field(pattern=NAME)]
    kind: Literal["dense", "warmup", "sparse"]
    steps: Positive | None = None
    tokens: Positive | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None
    main: Rate | None = None
    indexer: Rate | None = None
    topk: Positive | None = None
    dense_share: Share = 0.0
    plain_rope: bool = False
    lengths: Annotated[dict[float, dict[int, float]], Field(min_length=1)]

    @model_validator(mode="after")
    def _topk_where_it_is_read(self) -> Self:
        if (self.topk is not None) != (self.kind == "sparse"):
            raise ValueError(f"topk belongs to stages of kind sparse, and to all of them; this one is {self.kind}")
        return self


class Optimizer(_Strict):
    """AdamW; see model.training.config.OptimizerConfig."""

    betas: tuple[Share, Share] = (0.9, 0.95)
    indexer_betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-10
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    bias_rate: Annotated[float, Field(ge=0)] = 5e-3


class Books(_Strict):
    """What rows are made of; see harness.corpus.config.CorpusConfig."""

    books: Path
    held_out_books: tuple[NonEmpty, ...] = ("pride_and_prejudice",)
    made_up: Share = 0.35
    dialogues: dict[str, float] | None = None

    @field_validator("dialogues")
    @classmethod
    def _kinds_are_known(cls, dialogues: dict[str, float] | None) -> dict[str, float] | None:
        return check_kinds(dialogues)


class Evaluation(_Strict):
    """Held-out rows of `tasks` (null is all) at each of `lengths`, every `every` steps and at the end of each stage.

    recall_topk: k of the indexer's recall, measured once it is trained.
    """

    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    rows: Positive = 64
    every: Positive | None = None
    tasks: tuple[NonEmpty, ...] | None = None
    recall_topk: Positive | None = None


class TrainConfig(_Strict):
    """The whole training. Fields without a note here are those of model.training.config.TrainingConfig."""

    name: Annotated[str, Field(pattern=NAME)]
    model: Start
    corpus: Books
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    batch_tokens: Positive
    optimizer: Optimizer = Optimizer()
    precision: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    rest_weight: Annotated[float, Field(ge=0)] = 0.2
    kl_rows: Positive = 256
    residual_limit: Annotated[float, Field(gt=0)] | None = None
    residual_weight: Annotated[float, Field(ge=0)] = 0.1
    log_every: Positive = 50
    checkpoint_every: Positive | None = None
    evaluation: Evaluation | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("stages")
    @classmethod
    def _stages_can_be_trained(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        for stage in stages:
            try:
                _stage(stage)
            except ModelError as error:
                raise ValueError(str(error)) from None
        return stages

    def training(self) -> TrainingConfig:
        """What the trainer takes. Raises ModelError where its parts contradict each other."""
        return TrainingConfig(
            stages=tuple(_stage(stage) for stage in self.stages),
            batch_tokens=self.batch_tokens,
            optimizer=OptimizerConfig(**self.optimizer.model_dump()),
            precision=self.precision,
            rest_weight=self.rest_weight,
            kl_rows=self.kl_rows,
            residual_limit=self.residual_limit,
            residual_weight=self.residual_weight,
            log_every=self.log_every,
            eval_every=self.evaluation.every if self.evaluation else None,
            checkpoint_every=self.checkpoint_every,
            recall_topk=self.evaluation.recall_topk if self.evaluation else None,
            compiled=self.compiled,
            seed=self.seed,
        )

    def corpus_config(self) -> CorpusConfig:
        """What the corpus takes: books, and the lengths of every stage by step."""
        return CorpusConfig(
            **self.corpus.model_dump(),
            tokens=self.batch_tokens,
            lengths={stage.name: _phases(_stage(stage), self.batch_tokens) for stage in self.stages},
        )


def _stage(stage: Stage) -> StageConfig:
    given = stage.model_dump(exclude={"lengths", "main", "indexer"})
    return StageConfig(
        **given,
        main=None if stage.main is None else Schedule(**stage.main.model_dump()),
        indexer=None if stage.indexer is None else Schedule(**stage.indexer.model_dump()),
        lengths=tuple(LengthPhase(start=start, shares=tuple(mix.items())) for start, mix in stage.lengths.items()),
    )


def _phases(stage: StageConfig, batch_tokens: int) -> tuple[Phase, ...]:
    """Shares of a stage -> steps; phases that would last no step are left out."""
    steps = stage.num_steps(batch_tokens)
    out: list[Phase] = []
    before = 0
    for phase, following in zip(stage.lengths, (*stage.lengths[1:], None), strict=True):
        mix = dict(phase.shares)
        if following is None:
            out.append(Phase(until=None, mix=mix))
            continue
        assert steps is not None, "lengths that change have a number of steps"
        until = round(following.start * steps)
        if until > before:
            out.append(Phase(until=until, mix=mix))
            before = until
    return tuple(out)


def load_train_config(path: Path) -> TrainConfig:
    """Reads and checks a training config. Raises HarnessError or ModelError with one line."""
    raw = read_yaml(path)
    try:
        config = TrainConfig.model_validate(raw)
        config.corpus_config()
    except ValidationError as error:
        raise HarnessError(f"{path}: {as_one_line(error, TrainConfig)}") from None
    try:
        config.training()
    except ModelError as error:
        raise HarnessError(f"{path}: {error}") from None
    return config

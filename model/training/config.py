"""How a model is trained: the stages, their budgets and schedules, the optimiser. No torch: the YAML edge reads it."""

import dataclasses
from typing import Literal

from model.errors import ModelError

StageKind = Literal["dense", "warmup", "sparse"]
Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LengthPhase:
    """Lengths and their relative shares, from the share `start` of a stage on. The corpus draws from them."""

    start: float
    shares: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A learning rate over a stage: linear warm-up, constant until the share `hold`, then linear to `end` x peak."""

    peak: float
    warm_steps: int = 0
    hold: float = 0.0
    end: float = 0.0

    def at(self, step: int, share: float) -> float:
        """step: 0-based; share: how much of the stage is done, 0..1."""
        warm = min(1.0, (step + 1) / self.warm_steps) if self.warm_steps else 1.0
        fall = 1.0 if share <= self.hold else self.end + (1 - self.end) * (1 - share) / (1 - self.hold)
        return self.peak * warm * fall


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One stretch of training.

    kind: dense (language model, every key read), warmup (main model frozen, indexer follows dense attention), sparse
    (the indexer's keys; both losses). steps or tokens end it; seconds end it too, whichever comes first.
    main, indexer: learning rates of the two parameter sets; None where the kind does not train one.
    topk: keys read in the sparse stage. dense_share: part of the sparse stage's steps that read every key.
    plain_rope: YaRN left out, for stages within the original length.
    """

    name: str
    kind: StageKind
    lengths: tuple[LengthPhase, ...]
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    main: Schedule | None = None
    indexer: Schedule | None = None
    topk: int | None = None
    dense_share: float = 0.0
    plain_rope: bool = False

    def __post_init__(self) -> None:
        if self.steps is None and self.tokens is None and self.seconds is None:
            raise ModelError(f"stages.{self.name}: expected steps, tokens or seconds, got none of them")
        if self.steps is not None and self.tokens is not None:
            raise ModelError(f"stages.{self.name}: steps and tokens contradict each other: remove one of them")
        if self.steps is None and self.tokens is None and len(self.lengths) > 1:
            raise ModelError(f"stages.{self.name}: lengths that change need steps or tokens beside seconds")
        starts = [phase.start for phase in self.lengths]
        if not starts or starts[0] != 0.0 or starts != sorted(starts) or starts[-1] >= 1.0:
            raise ModelError(f"stages.{self.name}.lengths: expected phases from 0 on, rising below 1, got {starts}")
        for name, trained in (("main", self.kind != "warmup"), ("indexer", self.kind != "dense")):
            if trained != (getattr(self, name) is not None):
                wanted = "a learning rate" if trained else "none: this kind does not train it"
                raise ModelError(f"stages.{self.name}.{name}: expected {wanted}, as kind {self.kind} asks")

    def num_steps(self, batch_tokens: int) -> int | None:
        """Steps of the stage, None if only seconds bound it."""
        return self.steps if self.tokens is None else -(-self.tokens // batch_tokens)

    @property
    def max_length(self) -> int:
        return max(length for phase in self.lengths for length, _ in phase.shares)

    def is_dense_step(self, step: int) -> bool:
        """Whether a step reads every key; dense steps are spread evenly over the sparse stage."""
        if self.kind != "sparse":
            return True
        return int((step + 1) * self.dense_share + 1e-9) > int(step * self.dense_share + 1e-9)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW; weight decay acts on matrices only. clip: largest gradient norm, of main model and indexer apart.

    bias_rate: step of the router's selection bias, scaled by the main learning rate's fall.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    indexer_betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-10
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_rate: float = 5e-3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Everything the loop needs beside model, data and folder.

    batch_tokens: tokens of a step over all GPUs, a multiple of every length. rest_weight: of the loss on tokens that
    are no answers. kl_rows: rows of each sequence in the indexer's loss, half answers, half uniform.
    residual_limit: |residual| beyond which residual_weight x its squared excess joins the loss; None never.
    log_every, eval_every, checkpoint_every: in steps of a stage; eval and checkpoint also happen at its end.
    """

    stages: tuple[StageConfig, ...]
    batch_tokens: int
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = "float32"
    rest_weight: float = 0.2
    kl_rows: int = 256
    residual_limit: float | None = None
    residual_weight: float = 0.1
    log_every: int = 50
    eval_every: int | None = None
    checkpoint_every: int | None = None
    recall_topk: int | None = None
    compiled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ModelError(f"stages: expected every name once, got {', '.join(names)}")
        for stage in self.stages:
            for phase in stage.lengths:
                for length, _ in phase.shares:
                    if self.batch_tokens % length:
                        raise ModelError(
                            f"stages.{stage.name}.lengths: batch_tokens {self.batch_tokens} is no multiple of {length}"
                        )

"""What a training reports while it runs."""

import dataclasses
from typing import Any, Literal

EventKind = Literal["stage", "step", "evaluation", "checkpoint"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEvent:
    """One thing to log. step: of the stage, steps: its length if steps bound it.

    values: JSON-ready, always with total_steps, tokens and seconds. stage: a stage began. step: means over an interval
    (loss_answer, loss_rest, loss_indexer, kl by layer, norms), and its largest residual. evaluation: accuracy by task.
    """

    kind: EventKind
    stage: str
    step: int
    steps: int | None
    values: dict[str, Any]

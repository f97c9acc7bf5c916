"""What a training step reads: token rows with the weight of predicting each token. A corpus makes them, the loop reads.

All three arrays are [b, l]: `weights[i, t]` and `is_answer[i, t]` describe token t of row i as a target, that is, its
prediction from tokens 0..t-1. Column 0 is never predicted, whatever its weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's rows, all of one length."""

    token_ids: NDArray[np.int32] | NDArray[np.int64]  # [b, l]
    weights: NDArray[np.float32]  # [b, l], weight of this token's cross-entropy; 0 = never predicted (padding)
    is_answer: NDArray[np.bool_]  # [b, l], answer tokens: their loss is averaged apart from the rest

    @property
    def tokens(self) -> int:
        return int(self.token_ids.size)


class Batches(Protocol):
    """Where batches come from: an endless stream a stage that can start at any step.

    Step n's batch depends on the seed, the stage's name and n alone. Closing the iterator frees what makes them.
    """

    def stream(self, stage: str, first_step: int) -> Iterator[Batch]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Rows of one task for the teacher-forced accuracy: a row counts when all its answer tokens are right."""

    task: str
    batch: Batch

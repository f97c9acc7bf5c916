"""What a training step reads: token rows with the weight of predicting each token. A corpus makes them, the loop reads.

All three arrays are [b, l]: `weights[i, t]` and `is_answer[i, t]` describe token t of row i as a target, that is, its
prediction from tokens 0..t-1. Column 0 is never predicted, whatever its weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which rows of every batch one process trains on: those of rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def of(self, b: int) -> range:
        """Its rows of b. Raises ModelError if they cannot be dealt out evenly."""
        if b % self.size:
            raise ModelError(
                f"batch_tokens: {b} rows a step cannot be dealt to {self.size} processes: change one of them"
            )
        each = b // self.size
        return range(self.rank * each, (self.rank + 1) * each)


ALL = Share()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's rows, or one process's share of them, all of one length."""

    token_ids: NDArray[np.int32] | NDArray[np.int64]  # [b, l]
    weights: NDArray[np.float32]  # [b, l], weight of this token's cross-entropy; 0 = never predicted (padding)
    is_answer: NDArray[np.bool_]  # [b, l], answer tokens: their loss is averaged apart from the rest
    first_row: int = 0  # where these rows begin in the whole batch

    @property
    def tokens(self) -> int:
        return int(self.token_ids.size)


class Batches(Protocol):
    """Where batches come from: an endless stream a stage that can start at any step.

    Step n's batch depends on the seed, the stage's name and n alone, and each of `share`'s rows is the whole batch's.
    Closing the iterator frees what makes them.
    """

    def stream(self, stage: str, first_step: int, share: Share) -> Iterator[Batch]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Rows of one task for the teacher-forced accuracy: a row counts when all its answer tokens are right."""

    task: str
    batch: Batch

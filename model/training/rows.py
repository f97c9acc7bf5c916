"""Which query rows the indexer's loss looks at: half of them right before an answer token, half anywhere."""

import numpy as np
from numpy.typing import NDArray

from model.training.batch import Batch


def loss_rows(batch: Batch, num_rows: int, seed: int, step: int) -> NDArray[np.int64]:
    """Positions [b, r] of queries; r = min(num_rows, l). Answer rows predict an answer token (the token after them).

    Rows without answers draw uniformly only. Retrieval happens on answer rows, a few percent of all: a uniform
    sample alone would train the indexer on rows where the latest keys suffice. A row's depend on seed, step, the row's
    tokens and its place in the whole batch.
    """
    b, length = batch.token_ids.shape
    count = min(num_rows, length)
    rows = np.empty((b, count), dtype=np.int64)
    for i in range(b):
        generator = np.random.default_rng((seed, step, batch.first_row + i))
        rows[i] = generator.integers(0, length, count)
        targets = np.flatnonzero(batch.is_answer[i, 1:] & (batch.weights[i, 1:] > 0))
        if len(targets):
            rows[i, : count // 2] = generator.choice(targets, count // 2)
    return rows

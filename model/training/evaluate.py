"""What the model can do at a checkpoint: teacher-forced answers on held-out rows, and what the indexer finds there."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.indexer_kl import head_mean_probabilities, index_logits, support_mask
from model.training.batch import Batch, HeldOut
from model.training.forward import IndexView, TrainingForward, take_rows
from model.training.losses import cross_entropy

MAX_ROWS = 64  # answer rows of each sequence whose recall is measured


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """accuracy: share of rows whose answer tokens are all the argmax, by task (equal to greedy decoding of the answer).
    mass, oracle_mass: dense attention mass on the indexer's and on the best k keys, by layer, over answer rows with
    more than 2 k keys; empty where there is none."""

    accuracy: dict[str, float]
    mass: dict[int, float]
    oracle_mass: dict[int, float]


class Recall:
    """Sums the attention mass that the indexer's k keys hold on answer rows."""

    def __init__(self, topk: int) -> None:
        self.topk = topk
        self.rows: torch.Tensor | None = None  # [b, r], and which of them count, [b, r]
        self.counts: torch.Tensor | None = None
        self.sums: dict[int, list[torch.Tensor]] = {}

    def __call__(self, layer: int, view: IndexView) -> None:
        rows, counts = self.rows, self.counts
        if rows is None or counts is None:
            return
        support = support_mask(rows, view.k.shape[1], None)
        p = head_mean_probabilities(take_rows(view.q, rows), view.k, view.scale, support)
        scores = index_logits(take_rows(view.index_q, rows), view.index_k, take_rows(view.index_w, rows))
        chosen = scores.masked_fill_(~support, float("-inf")).topk(self.topk, -1).indices
        mass, best = p.gather(-1, chosen).sum(-1), p.topk(self.topk, -1).values.sum(-1)
        parts = torch.stack((mass[counts].sum(), best[counts].sum(), counts.sum().float()))
        self.sums.setdefault(layer, []).append(parts)

    def table(self) -> tuple[dict[int, float], dict[int, float]]:
        mass, best = {}, {}
        for layer, parts in self.sums.items():
            kept, oracle, count = torch.stack(parts).sum(0).tolist()
            if count:
                mass[layer], best[layer] = kept / count, oracle / count
        return mass, best


def answer_rows(batch: Batch, topk: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Positions [b, r] of queries that predict an answer token and see more than 2 k keys, and which are real."""
    b = len(batch.token_ids)
    rows, counts = np.zeros((b, MAX_ROWS), dtype=np.int64), np.zeros((b, MAX_ROWS), dtype=bool)
    for i in range(b):
        found = np.flatnonzero(batch.is_answer[i, 1:] & (batch.weights[i, 1:] > 0))
        found = found[found >= 2 * topk]
        if len(found):
            kept = found[np.linspace(0, len(found) - 1, min(MAX_ROWS, len(found))).astype(int)]
            rows[i, : len(kept)], counts[i, : len(kept)] = kept, True
    return rows, counts


@torch.no_grad()
def evaluate(
    forward: TrainingForward, held_out: Sequence[HeldOut], *, topk: int | None, recall_topk: int | None,
    batch_tokens: int,
) -> Evaluation:  # fmt: skip
    """Score held-out rows, `batch_tokens` at a time.

    Args:
        topk: keys read by each query, None for dense. recall_topk: k of the indexer's recall on the same pass, None
            for no recall. Recall on a dense pass is the indexer's on the dense trajectory.
    """
    accuracy: dict[str, float] = {}
    recall = Recall(recall_topk) if recall_topk is not None else None
    device = forward.model.embed_tokens.weight.device
    for task in held_out:
        b, length = task.batch.token_ids.shape
        right = []
        step = max(1, batch_tokens // length)
        for top in range(0, b, step):
            rows = slice(top, top + step)
            part = Batch(
                token_ids=task.batch.token_ids[rows], weights=task.batch.weights[rows],
                is_answer=task.batch.is_answer[rows],
            )  # fmt: skip
            seen = None
            if recall is not None and length > recall.topk:
                found, counts = answer_rows(part, recall.topk)
                recall.rows, recall.counts = torch.from_numpy(found).to(device), torch.from_numpy(counts).to(device)
                seen = recall
            token_ids = torch.from_numpy(part.token_ids.astype(np.int64)).to(device)
            hidden = forward(token_ids, topk=topk, seen=seen).hidden
            wanted = torch.from_numpy(part.is_answer & (part.weights > 0)).to(device)
            targets = token_ids.roll(-1, 1)
            losses = cross_entropy(
                hidden, forward.model.lm_head.weight, targets.flatten(), torch.zeros_like(targets, dtype=torch.float32)
                .flatten(), forward.dtype,
            )  # fmt: skip
            correct = losses.correct.unflatten(0, targets.shape)
            right.append((correct[:, :-1] | ~wanted[:, 1:]).all(1))
        accuracy[task.task] = float(torch.cat(right).float().mean())
    mass, best = recall.table() if recall is not None else ({}, {})
    return Evaluation(accuracy=accuracy, mass=mass, oracle_mass=best)

"""Scores by question: the repeats of one document under one variant, put together."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.errors import HarnessError
from harness.estimates import mean
from harness.records import SampleScore


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One document of one variant. samples: its answered repeats in order. failed: repeats that ended in an error."""

    doc_id: str
    cluster: str
    group: Mapping[str, Any]
    samples: Sequence[SampleScore]
    failed: int

    def values(self, metric: str) -> list[float]:
        """The metric in every answered repeat that has it."""
        return [sample.metrics[metric] for sample in self.samples if metric in sample.metrics]

    def average(self, metric: str) -> float | None:
        """avg@n: mean over the answered repeats, None where none has the metric."""
        values = self.values(metric)
        return mean(values) if values else None


def questions(scores: Iterable[SampleScore]) -> list[Question]:
    """The questions behind scores of one (variant, task), by document id.

    Raises HarnessError for a repeat that is there twice, for scores that are not numbers, and for repeats of one
    document that saw different data: all would silently bend a mean.
    """
    by_doc: dict[str, dict[int, SampleScore]] = {}
    for score in scores:
        where = f"{score.variant}, {score.task}, doc {score.doc_id}"
        repeats = by_doc.setdefault(score.doc_id, {})
        if score.repeat in repeats:
            raise HarnessError(f"{where}: repeat {score.repeat} is there twice; every sample may count once")
        repeats[score.repeat] = score
        for metric, value in score.metrics.items():
            if not math.isfinite(value):
                raise HarnessError(f"{where}: metric {metric} is {value}; expected a finite number from the task")
        if score.error is None and score.headline not in score.metrics:
            raise HarnessError(f"{where}: no {score.headline} among the metrics {sorted(score.metrics)}")
    return [_question(doc_id, [repeats[index] for index in sorted(repeats)]) for doc_id, repeats in by_doc.items()]


def headlines(scores: Iterable[SampleScore]) -> dict[str, str]:
    """The headline metric of each task; HarnessError where a task has two."""
    found: dict[str, str] = {}
    for score in scores:
        if found.setdefault(score.task, score.headline) != score.headline:
            raise HarnessError(
                f"{score.task}: headline metric {found[score.task]} in one place and {score.headline} in another; "
                "score all samples with one version of the task (dsa-eval rescore)"
            )
    return found


def _question(doc_id: str, scores: Sequence[SampleScore]) -> Question:
    first, answered = scores[0], [score for score in scores if score.error is None]
    if len({(score.doc_hash, score.prompt_hash) for score in answered}) > 1:
        raise HarnessError(
            f"{first.variant}, {first.task}, doc {doc_id}: its repeats saw different documents or prompts; "
            "start a new run folder"
        )
    return Question(
        doc_id=doc_id, cluster=first.cluster, group=first.group, samples=answered, failed=len(scores) - len(answered)
    )

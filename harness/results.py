"""results.json: every score with its error bars, for whole tasks and for the values of their table fields."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from harness import recall
from harness.estimates import Estimate, estimate, majority, mean, pass_at_k, powers_of_two
from harness.questions import Question, headlines, questions
from harness.records import SampleScore

SCHEMA = 1
NEEDLE_CELL = ("length", "depth")


def results(
    scores: Sequence[SampleScore],
    *,
    header: Mapping[str, Any],
    variants: Sequence[str],
    tasks: Sequence[str],
    lowered: Collection[str] = (),
    probed: Collection[str] | None = None,
) -> dict[str, Any]:
    """The whole results.json of a run.

    Args:
        scores: all scored samples; those of variants or tasks not named below are left out.
        header: name, digest, commit, device, created.
        variants, tasks: names in table order.
        lowered: tasks whose token limit is under the protocol's.
        probed: variants whose samples must all carry probes; None asks it of a (variant, task) once one sample does.

    A task is tabled for every variant as soon as one has samples of it: n is 0 and mean None where none was answered.
    Raises HarnessError where `questions` or `recall.aggregate` do.
    """
    by_cell: dict[tuple[str, str], list[SampleScore]] = {}
    named = headlines(scores)
    for score in scores:
        by_cell.setdefault((score.variant, score.task), []).append(score)
    cells: list[dict[str, Any]] = []
    recall_rows: list[dict[str, Any]] = []
    recall_coverage: list[dict[str, Any]] = []
    active_shares: list[dict[str, Any]] = []
    for variant in variants:
        for task in tasks:
            if task not in named:
                continue
            members = by_cell.get((variant, task), [])
            head = {"variant": variant, "task": task}
            cells.extend({**head, **cell, "limit_lowered": task in lowered} for cell in _cells(members, named[task]))
            expected = None if probed is None else variant in probed
            recall_rows.extend(recall.aggregate(members, expected))
            if (covered := recall.coverage(members, expected)) is not None:
                recall_coverage.append(covered)
            if (share := recall.active_share(members, expected)) is not None:
                active_shares.append(share)
    return {
        "schema": SCHEMA,
        **header,
        "variants": list(variants),
        "tasks": list(tasks),
        "cells": cells,
        "recall": recall_rows,
        "recall_coverage": recall_coverage,
        "active_share": active_shares,
    }


def _cells(scores: Sequence[SampleScore], headline: str) -> Iterator[dict[str, Any]]:
    asked = questions(scores)
    for group, members in by_group(asked):
        counts = _counts(members)
        for metric, summary in _estimates(members, headline, needle_cell=len(group) > 1):
            yield {"group": group, "metric": metric, "headline": metric == headline, **summary, **counts}


def by_group(asked: Sequence[Question]) -> Iterator[tuple[dict[str, Any], list[Question]]]:
    """The whole task (group {}), then one part per value of each table field, then one per (length, depth) pair.

    Fields come by name, values in ascending order, numbers before texts. A question without a field is in none of the
    field's parts.
    """
    yield {}, list(asked)
    fields = sorted({field for question in asked for field in question.group})
    keys: list[tuple[str, ...]] = [(field,) for field in fields]
    if set(NEEDLE_CELL) <= set(fields):
        keys.append(NEEDLE_CELL)
    for key in keys:
        parts: dict[tuple[Any, ...], list[Question]] = {}
        for question in asked:
            if all(field in question.group for field in key):
                parts.setdefault(tuple(question.group[field] for field in key), []).append(question)
        for values in sorted(parts, key=lambda values: [_rank(value) for value in values]):
            yield dict(zip(key, values, strict=True)), parts[values]


def _rank(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _counts(asked: Sequence[Question]) -> dict[str, Any]:
    """Counts and token means over the responses that did not fail; failed ones are only counted."""
    samples = [sample for question in asked for sample in question.samples]

    def average(name: str) -> float | None:
        known = [value for sample in samples if (value := getattr(sample, name)) is not None]
        return mean(known) if known else None

    return {
        "unparsed": sum(sample.unparsed for sample in samples),
        "truncated": sum(sample.truncated for sample in samples),
        "errors": sum(question.failed for question in asked),
        "stopped": sum(sample.finish_reason == "stop" for sample in samples),
        "length": sum(sample.finish_reason == "length" for sample in samples),
        "responses": len(samples),
        "prompt_tokens_mean": average("prompt_tokens"),
        "completion_tokens_mean": average("completion_tokens"),
        "reasoning_tokens_mean": average("reasoning_tokens"),
        "answer_tokens_mean": average("answer_tokens"),
    }


def _estimates(asked: Sequence[Question], headline: str, needle_cell: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(metric, its summary): the headline first, then the other metrics by name, then pass@k and maj@n of repeats.

    Behind nats per token stands perplexity, exp of their mean: no mean over samples itself.
    """
    others = {metric for question in asked for sample in question.samples for metric in sample.metrics}
    repeats = max((len(question.samples) + question.failed for question in asked), default=0)
    for metric in (headline, *sorted(others - {headline})):
        averages = [(question.cluster, value) for question in asked if (value := question.average(metric)) is not None]
        summary = _summary(averages, repeats, needle_cell)
        yield metric, summary
        if metric == "nats_per_token":
            yield "perplexity", _exponential(summary)
    if repeats > 1 and all(value in (0, 1) for question in asked for value in question.values(headline)):
        for k in powers_of_two(repeats):
            yield (
                f"pass@{k}",
                _summary(
                    [
                        (question.cluster, pass_at_k(len(right), round(sum(right)), k))
                        for question in asked
                        if len(right := question.values(headline)) >= k
                    ],
                    repeats,
                    needle_cell,
                ),
            )
    if repeats > 1:
        yield (
            f"maj@{repeats}",
            _summary(
                [
                    (question.cluster, majority([sample.answer for sample in question.samples], right))
                    for question in asked
                    if len(right := question.values(headline)) == repeats
                ],
                repeats,
                needle_cell,
            ),
        )


def _summary(averages: Sequence[tuple[str, float]], repeats: int, needle_cell: bool) -> dict[str, Any]:
    if not averages:
        nothing = dict.fromkeys(("mean", "stderr", "low", "high", "interval"))
        return {**nothing, "n": 0, "clusters": 0, "repeats": repeats}
    found: Estimate = estimate(
        [value for _, value in averages], [cluster for cluster, _ in averages], needle_cell=needle_cell
    )
    return {
        "mean": found.mean,
        "stderr": found.stderr,
        "low": found.low,
        "high": found.high,
        "interval": found.interval,
        "n": found.n,
        "clusters": found.clusters,
        "repeats": repeats,
    }


def _exponential(summary: Mapping[str, Any]) -> dict[str, Any]:
    """exp of a mean and of its bounds; the standard error to first order."""
    ends = {key: None if summary[key] is None else math.exp(summary[key]) for key in ("mean", "low", "high")}
    stderr = None if ends["mean"] is None or summary["stderr"] is None else ends["mean"] * summary["stderr"]
    return {**summary, **ends, "stderr": stderr}

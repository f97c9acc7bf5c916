"""comparison.json: every variant against the baseline, question by question.

Two variants are compared on the documents that both answered, by the mean over each one's repeats. Documents and
prompts must be the same, by hash. Whole-task rows are one family for Holm's correction; the rows by table field
("by_group") are exploration and carry Benjamini-Hochberg's q instead.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.adjust import benjamini_hochberg, holm
from harness.errors import HarnessError
from harness.estimates import ALPHA, geometric_ratio, mean
from harness.paired import Paired, paired, poolable, pooled
from harness.pairing import Pair, losses, pairs_of, refuse_other_data, unpaired
from harness.questions import Question, headlines, questions
from harness.recall_link import recall_link
from harness.records import SampleScore
from harness.results import by_group
from harness.verdict import sentence

SCHEMA = 1
POOLED = "pooled"


def compare(
    scores: Sequence[SampleScore],
    *,
    baseline: str,
    margins: Mapping[str, float],
    variants: Sequence[str],
    tasks: Sequence[str],
) -> dict[str, Any]:
    """The whole comparison.json.

    Args:
        scores: scored samples of all variants; those of tasks or variants not named are left out.
        baseline: the variant that the others are held against. variants, tasks: names in table order.
        margins: largest difference that does not matter, 0..1, by task; "default" for the rest, "pooled" for the pool.

    Raises HarnessError where the baseline or a margin is missing, or variants saw other documents or prompts.
    """
    if baseline not in variants:
        raise HarnessError(f"compare: baseline {baseline} is not among the variants {', '.join(variants)}")
    metrics = headlines(scores)
    tasks = [task for task in tasks if task in metrics]
    by_cell: dict[tuple[str, str], list[SampleScore]] = {}
    for score in scores:
        by_cell.setdefault((score.variant, score.task), []).append(score)
    asked = {
        (variant, task): {question.doc_id: question for question in questions(by_cell.get((variant, task), []))}
        for variant in variants
        for task in tasks
    }
    others = [variant for variant in variants if variant != baseline]
    refuse_other_data(asked, others, baseline, tasks)

    rows: list[dict[str, Any]] = []
    by_field: list[dict[str, Any]] = []
    found: dict[str, list[tuple[str, Paired]]] = {variant: [] for variant in others}
    for variant in others:
        for task in tasks:
            ours, theirs = asked[variant, task], asked[baseline, task]
            pairs, margin = pairs_of(ours, theirs), margin_of(margins, task)
            head = {"variant": variant, "baseline": baseline, "task": task, "metric": metrics[task]}
            whole = _compared(pairs, metrics[task], margin)
            found[variant].append((task, whole))
            rows.append(
                head
                | {"group": {}, "result": whole, "where": task, "tokens": _tokens(pairs)}
                | {"unpaired": unpaired(ours, theirs, variant, baseline), **losses(ours, theirs)}
            )
            for group, part in _parts(pairs):
                where = f"{task} ({', '.join(f'{field} {value}' for field, value in group.items())})"
                result = _compared(part, metrics[task], margin)
                by_field.append(head | {"group": group, "result": result, "where": where, "tokens": _tokens(part)})
    finished = _finished(rows, "holm_p", holm)
    for variant in others:
        finished.extend(_pooled_rows(found[variant], variant, baseline, margins))
    return {
        "schema": SCHEMA,
        "baseline": baseline,
        "alpha": ALPHA,
        "rows": finished,
        "by_group": _finished(by_field, "q", benjamini_hochberg),
        "disagreements": _disagreements(asked, variants, tasks, metrics),
        "recall_link": [
            line for variant in variants for task in tasks for line in recall_link(by_cell.get((variant, task), []))
        ],
    }


def mark_weights(comparison: Mapping[str, Any], differs: Callable[[str], bool]) -> None:
    """Write into every row whether its two sides were served by different weights; differs: asked of a variant."""
    for row in (*comparison["rows"], *comparison["by_group"]):
        row["weights_differ"] = differs(row["variant"])
        if row["weights_differ"]:
            row["sentence"] += " The weights differ."


def margin_of(margins: Mapping[str, float], task: str) -> float:
    """The task's margin, or the default; a share strictly between 0 and 1."""
    margin = margins.get(task, margins.get("default"))
    if margin is None:
        raise HarnessError(f"compare.margin: no margin for {task} and no default; add one of them")
    if not 0 < margin < 1:
        raise HarnessError(f"compare.margin: expected a share between 0 and 1 (0.02 is two points), got {margin}")
    return margin


def _compared(pairs: Sequence[Pair], metric: str, margin: float) -> Paired:
    return paired(
        [mean(ours.values(metric)) for ours, _ in pairs],
        [mean(theirs.values(metric)) for _, theirs in pairs],
        [theirs.cluster for _, theirs in pairs],
        margin=margin,
        single=all(len(ours.samples) == len(theirs.samples) == 1 for ours, theirs in pairs),
    )


def _finished(
    rows: Sequence[dict[str, Any]], field: str, adjust: Callable[[Sequence[float]], list[float]]
) -> list[Any]:
    """Rows with their result's numbers, the p-value adjusted over all of them, and the sentence."""
    tested = [place for place, row in enumerate(rows) if row["result"].p is not None]
    adjusted = dict(zip(tested, adjust([rows[place]["result"].p for place in tested]), strict=True))
    finished = []
    for place, row in enumerate(rows):
        result, where = row.pop("result"), row.pop("where")
        said = sentence(
            result,
            variant=row["variant"],
            baseline=row["baseline"],
            where=where,
            num_unpaired=len({entry["doc_id"] for entry in row.get("unpaired", ())}),
            adjusted_p=adjusted.get(place),
        )
        finished.append({**row, **dataclasses.asdict(result), field: adjusted.get(place), "sentence": said})
    return finished


def _parts(pairs: Sequence[Pair]) -> list[tuple[dict[str, Any], list[Pair]]]:
    """The pairs by the value of each single table field."""
    by_doc = {theirs.doc_id: (ours, theirs) for ours, theirs in pairs}
    return [
        (group, [by_doc[question.doc_id] for question in members])
        for group, members in by_group([theirs for _, theirs in pairs])
        if len(group) == 1
    ]


def _pooled_rows(
    found: Sequence[tuple[str, Paired]], variant: str, baseline: str, margins: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for the mean of the tasks, none where fewer than two can be pooled."""
    pool = [(task, part) for task, part in found if poolable(part)]
    if len(pool) < 2:
        return []
    whole = pooled([part for _, part in pool], margin=margin_of(margins, POOLED))
    said = sentence(whole, variant=variant, baseline=baseline, where=f"the mean of {len(pool)} tasks")
    names = {
        "pooled_tasks": [task for task, _ in pool],
        "left_out_tasks": [task for task, part in found if not poolable(part)],
    }
    head = {"variant": variant, "baseline": baseline, "task": POOLED, "group": {}, "metric": "mean of tasks"}
    return [{**head, **dataclasses.asdict(whole), "holm_p": None, "tokens": None, **names, "sentence": said}]


def _tokens(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Geometric mean ratio of completion tokens, variant to baseline; None where nothing was generated."""
    logs = [(_log_tokens(ours), _log_tokens(theirs), theirs.cluster) for ours, theirs in pairs]
    known = [(math.exp(a), math.exp(b), cluster) for a, b, cluster in logs if a is not None and b is not None]
    if not known:
        return None
    ratio = geometric_ratio([a for a, _, _ in known], [b for _, b, _ in known], [cluster for _, _, cluster in known])
    return {"ratio": ratio.mean, "low": ratio.low, "high": ratio.high, "n": ratio.n}


def _log_tokens(question: Question) -> float | None:
    counts = [sample.completion_tokens for sample in question.samples]
    if any(sample.finish_reason == "scored" for sample in question.samples) or min(counts) < 1:
        return None
    return mean([math.log(count) for count in counts])


def _disagreements(
    asked: Mapping[tuple[str, str], Mapping[str, Question]],
    variants: Sequence[str],
    tasks: Sequence[str],
    metrics: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Samples on which the variants' headline scores are not all the same, with what was extracted from each."""
    lines = []
    for task in tasks:
        seen: dict[tuple[str, int], dict[str, SampleScore]] = {}
        for variant in variants:
            for question in asked[variant, task].values():
                for sample in question.samples:
                    seen.setdefault((question.doc_id, sample.repeat), {})[variant] = sample
        for (doc_id, repeat), samples in sorted(seen.items()):
            scores = {variant: sample.metrics[metrics[task]] for variant, sample in samples.items()}
            if len(set(scores.values())) > 1:
                answers = {variant: sample.answer for variant, sample in samples.items()}
                lines.append({"task": task, "doc_id": doc_id, "repeat": repeat, "scores": scores, "answers": answers})
    return lines

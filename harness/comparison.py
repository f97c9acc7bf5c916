"""comparison.json: every variant against the baseline, question by question.

Two variants are compared on the documents that both answered, by the mean over each one's repeats. Documents and
prompts must be the same, by hash. Whole-task rows are one family for Holm's correction; the rows by table field
("by_group") are exploration and carry Benjamini-Hochberg's q instead.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import HarnessError
from harness.estimates import geometric_ratio, mean
from harness.paired import Paired, paired, pooled
from harness.questions import Question, headlines, questions
from harness.recall_link import recall_link
from harness.records import SampleScore
from harness.results import by_group
from harness.verdict import sentence

SCHEMA = 1
POOLED = "pooled"
Pair = tuple[Question, Question]


def compare(
    scores: Sequence[SampleScore],
    *,
    baseline: str,
    margins: Mapping[str, float],
    variants: Sequence[str],
    tasks: Sequence[str],
    alpha: float = 0.05,
) -> dict[str, Any]:
    """The whole comparison.json.

    Args:
        scores: scored samples of all variants; those of tasks or variants not named are left out.
        baseline: the variant that the others are held against; variants, tasks: names in table order.
        margins: largest difference that does not matter, 0..1, by task; "default" for the rest, "pooled" for the pool.

    Raises HarnessError where the baseline or a margin is missing, or variants saw other documents or prompts.
    """
    if baseline not in variants:
        raise HarnessError(f"compare: baseline {baseline} is not among the variants {', '.join(variants)}")
    named = headlines(scores)
    tasks = [task for task in tasks if task in named]
    by_cell: dict[tuple[str, str], list[SampleScore]] = {}
    for score in scores:
        by_cell.setdefault((score.variant, score.task), []).append(score)
    asked = {
        (variant, task): {question.doc_id: question for question in questions(by_cell.get((variant, task), []))}
        for variant in variants
        for task in tasks
    }
    others = [variant for variant in variants if variant != baseline]
    _refuse_other_data(asked, others, baseline, tasks)

    rows: list[dict[str, Any]] = []
    exploration: list[dict[str, Any]] = []
    for variant in others:
        found: list[tuple[str, Paired]] = []
        for task in tasks:
            ours, theirs = asked[variant, task], asked[baseline, task]
            pairs = [(ours[doc], theirs[doc]) for doc in sorted(ours.keys() & theirs.keys())]
            pairs = [(mine, other) for mine, other in pairs if mine.samples and other.samples]
            unpaired = _unpaired(ours, theirs, variant, baseline)
            base = {"variant": variant, "baseline": baseline, "task": task, "metric": named[task]}
            margin = margin_of(margins, task)
            whole = _compared(pairs, named[task], margin, alpha)
            found.append((task, whole))
            rows.append(
                base
                | _row(whole, variant, baseline, task, len(unpaired))
                | {"group": {}, "tokens": _tokens(pairs), "unpaired": unpaired}
                | _losses(ours, theirs)
            )
            for group, part in _parts(pairs):
                part_result = _compared(part, named[task], margin, alpha)
                where = f"{task} ({', '.join(f'{field} {value}' for field, value in group.items())})"
                exploration.append(
                    base | _row(part_result, variant, baseline, where) | {"group": group, "tokens": _tokens(part)}
                )
        rows.extend(_pooled_row(found, variant, baseline, margins, alpha))
    _adjust([row for row in rows if row["task"] != POOLED], "holm_p", holm)
    _adjust(exploration, "q", benjamini_hochberg)
    return {
        "schema": SCHEMA,
        "baseline": baseline,
        "alpha": alpha,
        "rows": rows,
        "by_group": exploration,
        "disagreements": _disagreements(asked, variants, tasks, named),
        "recall_link": [
            line for variant in variants for task in tasks for line in recall_link(by_cell.get((variant, task), []))
        ],
    }


def margin_of(margins: Mapping[str, float], task: str) -> float:
    """The task's margin, or the default; a share strictly between 0 and 1."""
    margin = margins.get(task, margins.get("default"))
    if margin is None:
        raise HarnessError(f"compare.margin: no margin for {task} and no default; add one of them")
    if not 0 < margin < 1:
        raise HarnessError(f"compare.margin: expected a share between 0 and 1 (0.02 is two points), got {margin}")
    return margin


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given (Holm 1979): i-th smallest of m times m - i + 1, never falling."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """q-values in the order given (Benjamini and Hochberg 1995): i-th smallest of m times m / i, never rising above."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__, reverse=True)
    adjusted, most = [0.0] * len(p_values), 1.0
    for place, rank in zip(order, range(len(p_values), 0, -1), strict=True):
        most = min(most, len(p_values) / rank * p_values[place])
        adjusted[place] = most
    return adjusted


def _adjust(rows: Sequence[dict[str, Any]], field: str, rule: Any) -> None:
    tested = [row for row in rows if row["p"] is not None]
    for row in rows:
        row[field] = None
    for row, value in zip(tested, rule([row["p"] for row in tested]), strict=True):
        row[field] = value


def _refuse_other_data(
    asked: Mapping[tuple[str, str], Mapping[str, Question]], others: Sequence[str], baseline: str, tasks: Sequence[str]
) -> None:
    for variant in others:
        for task in tasks:
            ours, theirs = asked[variant, task], asked[baseline, task]
            shared = [doc for doc in sorted(ours.keys() & theirs.keys()) if ours[doc].samples and theirs[doc].samples]
            differing = [(doc, what) for doc in shared if (what := _differing(ours[doc], theirs[doc]))]
            if differing:
                doc, what = differing[0]
                raise HarnessError(
                    f"compare: {task}: {len(differing)} of {len(shared)} documents differ between {variant} and "
                    f"{baseline} (first: doc {doc}, its {what}); answers to other questions cannot be paired, so run "
                    "both variants on the same data and prompts"
                )


def _differing(ours: Question, theirs: Question) -> str:
    mine, other = ours.samples[0], theirs.samples[0]
    return " and ".join(
        f"{what} hash {a} against {b}"
        for what, a, b in (
            ("document", mine.doc_hash, other.doc_hash),
            ("prompt", mine.prompt_hash, other.prompt_hash),
        )
        if a != b
    )


def _unpaired(
    ours: Mapping[str, Question], theirs: Mapping[str, Question], variant: str, baseline: str
) -> list[dict[str, str]]:
    """Documents that cannot be paired, with who lacks an answer and why; one entry a document and side."""
    return [
        {"doc_id": doc, "variant": name, "reason": "error" if doc in side else "missing"}
        for doc in sorted(ours.keys() | theirs.keys())
        for name, side in ((variant, ours), (baseline, theirs))
        if doc not in side or not side[doc].samples
    ]


def _losses(ours: Mapping[str, Question], theirs: Mapping[str, Question]) -> dict[str, int]:
    """Failed and cut-off responses of both sides: reasons to doubt a difference, tokens of cut-off ones are censored."""
    return {
        f"{name}_{side}": sum(count(question) for question in asked.values())
        for side, asked in (("variant", ours), ("baseline", theirs))
        for name, count in (
            ("errors", lambda question: question.failed),
            ("truncated", lambda question: sum(sample.truncated for sample in question.samples)),
        )
    }


def _compared(pairs: Sequence[Pair], metric: str, margin: float, alpha: float) -> Paired:
    return paired(
        [mean(ours.values(metric)) for ours, _ in pairs],
        [mean(theirs.values(metric)) for _, theirs in pairs],
        [theirs.cluster for _, theirs in pairs],
        margin=margin,
        alpha=alpha,
        single=all(len(ours.samples) == len(theirs.samples) == 1 for ours, theirs in pairs),
    )


def _row(result: Paired, variant: str, baseline: str, where: str, num_unpaired: int = 0) -> dict[str, Any]:
    said = sentence(result, variant=variant, baseline=baseline, where=where, num_unpaired=num_unpaired)
    return {**dataclasses.asdict(result), "sentence": said}


def _parts(pairs: Sequence[Pair]) -> list[tuple[dict[str, Any], list[Pair]]]:
    """The pairs by the value of each single table field."""
    by_doc = {theirs.doc_id: (ours, theirs) for ours, theirs in pairs}
    return [
        (group, [by_doc[question.doc_id] for question in members])
        for group, members in by_group([theirs for _, theirs in pairs])
        if len(group) == 1
    ]


def _pooled_row(
    found: Sequence[tuple[str, Paired]], variant: str, baseline: str, margins: Mapping[str, float], alpha: float
) -> list[dict[str, Any]]:
    pool = [(task, part) for task, part in found if part.tost_p is not None and part.verdict != "SATURATED"]
    whole = pooled([part for _, part in pool], margin=margin_of(margins, POOLED), alpha=alpha)
    if whole is None:
        return []
    where = f"the mean of {len(pool)} tasks"
    return [
        {"variant": variant, "baseline": baseline, "task": POOLED, "group": {}, "metric": "mean of tasks"}
        | _row(whole, variant, baseline, where)
        | {
            "tokens": None,
            "unpaired": [],
            "pooled_tasks": [task for task, _ in pool],
            "left_out_tasks": [task for task, _ in found if task not in dict(pool)],
        }
    ]


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
    """Samples on which the variants' headline scores are not all the same."""
    lines = []
    for task in tasks:
        seen: dict[tuple[str, int], dict[str, float]] = {}
        for variant in variants:
            for question in asked[variant, task].values():
                for sample in question.samples:
                    score = sample.metrics[metrics[task]]
                    seen.setdefault((question.doc_id, sample.repeat), {})[variant] = score
        for (doc_id, repeat), by_variant in sorted(seen.items()):
            if len(set(by_variant.values())) > 1:
                lines.append({"task": task, "doc_id": doc_id, "repeat": repeat, "scores": by_variant})
    return lines

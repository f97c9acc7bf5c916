"""The samples on which variants disagree, side by side, and the samples that failed."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from harness import numbers
from harness.report_parts.run_data import RunData
from harness.report_parts.text import excerpt, visible

MAX_CARD_CHARS = 350_000
MAX_ERRORS = 200
Row = Mapping[str, Any]


def disagreement_view(run: RunData, room: float = 1.0) -> dict[str, Any]:
    """Cards in turn from every task until the page's share of text is spent; `total` counts all disagreements.

    room: share of MAX_CARD_CHARS that the cards may take.
    """
    rows = run.comparison["disagreements"] if run.comparison else []
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    taken: dict[str, list[dict[str, Any]]] = defaultdict(list)
    spent = 0
    for turn in zip_longest(*by_task.values()):
        for row in turn:
            if row is None or spent > room * MAX_CARD_CHARS:
                continue
            card = _card(run, row)
            spent += _size(card)
            taken[row["task"]].append(card)
    cards = [card for task in run.results["tasks"] for card in taken[task]]
    patterns = sorted({card["pattern"] for card in cards})
    return {
        "cards": cards,
        "total": len(rows),
        "tasks": [task for task in run.results["tasks"] if taken[task]],
        "patterns": patterns,
    }


def error_view(run: RunData) -> dict[str, Any]:
    """Failed samples in the journal's order, at most MAX_ERRORS of them."""
    failed = [sample for sample in run.samples if sample.error is not None]
    rows = [
        {
            "variant": sample.variant,
            "task": sample.task,
            "doc_id": visible(sample.doc_id),
            "repeat": sample.repeat,
            "error": excerpt(sample.error, head=300, tail=100, middle=600),
        }
        for sample in failed[:MAX_ERRORS]
    ]
    return {"rows": rows, "total": len(failed)}


def _card(run: RunData, row: Row) -> dict[str, Any]:
    doc = run.docs.get((row["task"], row["doc_id"]), {})
    shown = doc.get("shown") or {}
    scores = row["scores"]
    variants = [variant for variant in run.results["variants"] if variant in scores]
    best = max((s for s in map(numbers.finite, scores.values()) if s is not None), default=None)
    return {
        "task": row["task"],
        "doc_id": visible(row["doc_id"]),
        "repeat": row["repeat"],
        "group": visible(numbers.group_label(dict(doc.get("group") or {}))),
        "prompt": _prompt(shown),
        "target": excerpt(doc["target"], head=400, tail=200) if doc.get("target") is not None else None,
        "pattern": " · ".join(f"{variant} {numbers.percent(scores[variant], 0)}" for variant in variants),
        "variants": [_column(run, row, variant, scores[variant], best) for variant in variants],
    }


def _prompt(shown: Mapping[str, Any]) -> list[dict[str, str]]:
    """Pieces of the prompt in order. A tail shorter than the head follows it directly: nothing was left out."""
    head, needle, tail = (shown.get(part) or "" for part in ("head", "needle", "tail"))
    if head and len(tail) < len(head):
        return [{"label": "Prompt", "text": visible(head + tail)}]
    named = (("Prompt begins", head), ("Around the needle", needle), ("Prompt ends", tail))
    return [{"label": label, "text": visible(text)} for label, text in named if text]


def _column(run: RunData, row: Row, variant: str, score: object, best: float | None) -> dict[str, Any]:
    """One variant's answer: replies as they came, thought apart, and what the scorer extracted where that is known."""
    replies = run.responses.get((variant, (row["task"], row["doc_id"], row["repeat"])), ())
    extracted = row.get("answers")
    return {
        "variant": variant,
        "series": run.results["variants"].index(variant),
        "score": numbers.percent(score, 0),
        "right": best is not None and numbers.finite(score) == best,
        "has_extracted": extracted is not None,
        "extracted": _extracted(extracted, variant),
        "replies": [_reply(reply) for reply in replies if reply["logprob"] is None],
        "choices": [_choice(reply) for reply in replies if reply["logprob"] is not None],
    }


def _reply(reply: Row) -> dict[str, Any]:
    text, answer = reply["text"], reply["answer"]
    thought = text[: text.rfind(answer)] if answer and answer in text else text if text != answer else ""
    return {
        "answer": excerpt(answer, head=500, tail=300),
        "thought": excerpt(thought, head=300, tail=300) if thought.strip() else None,
        "empty": not answer.strip(),
        "finish_reason": reply["finish_reason"],
        "completion_tokens": numbers.count(reply["completion_tokens"]),
        "reasoning_tokens": numbers.count(reply["reasoning_tokens"]),
        "truncated_thought": reply["truncated_thought"],
    }


def _choice(reply: Row) -> dict[str, Any]:
    return {"logprob": f"{reply['logprob']:.3f}".replace("-", numbers.MINUS), "greedy": bool(reply["is_greedy"])}


def _extracted(answers: Any, variant: str) -> str | None:
    """The extracted answer, None where nothing could be parsed."""
    value = answers.get(variant) if isinstance(answers, Mapping) else None
    if value is None:
        return None
    shown = visible(value)
    return shown if len(shown) <= 300 else f"{shown[:300]} … ({len(shown):,} characters)"


def _size(value: Any) -> int:
    """Characters of all texts in a view, a little more for the markup around each."""
    if isinstance(value, str):
        return len(value) + 40
    if isinstance(value, Mapping):
        return sum(_size(item) for item in value.values())
    if isinstance(value, list):
        return sum(_size(item) for item in value)
    return _size([value.head, value.middle, value.tail]) if hasattr(value, "middle") else 20

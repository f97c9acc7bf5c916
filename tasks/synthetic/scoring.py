"""From answers to scores; gold and wrong answers for the scripted model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.metrics.boxed_answer import judge
from tasks.metrics.mmlu_pro_answer import LETTERS, official_answer
from tasks.metrics.tool_calls import score_reference
from tasks.tool_use.gold import gold_text, wrong_text

Scores = dict[str, float | str | None]


def score_sum(doc: Mapping[str, Any], results: Sequence[str]) -> Scores:
    """1 if the last box holds the value."""
    verdict = judge(results[0], doc["value"])
    return {"exact_match": float(verdict.correct), "answer": verdict.answer}


def gold_sum(doc: Mapping[str, Any]) -> str:
    return f"The answer is \\boxed{{{doc['value']}}}."


def wrong_sum(doc: Mapping[str, Any]) -> str:
    return f"The answer is \\boxed{{{int(doc['value']) + 1}}}."


def score_choice(doc: Mapping[str, Any], results: Sequence[str]) -> Scores:
    """1 if the letter is right; letters are found by MMLU-Pro's rules."""
    letter = official_answer(results[0])
    return {"exact_match": float(letter == doc["letter"]), "answer": letter}


def gold_choice(doc: Mapping[str, Any]) -> str:
    return f"The answer is ({doc['letter']})."


def wrong_choice(doc: Mapping[str, Any]) -> str:
    """The next option's letter."""
    letter = LETTERS[(LETTERS.index(doc["letter"]) + 1) % len(doc["options"])]
    return f"The answer is ({letter})."


def score_tools(doc: Mapping[str, Any], results: Sequence[str]) -> Scores:
    """1 if the call is right by BFCL's rules, see tasks/tool_use."""
    score = score_reference(results[0], doc)
    return {"accuracy": float(score.right), "decoded": float(score.decoded), "answer": score.answer}


def gold_tools(doc: Mapping[str, Any]) -> str:
    return gold_text(json.loads(doc["functions"]), json.loads(doc["answers"]), doc["category"], doc["mode"])


def wrong_tools(doc: Mapping[str, Any]) -> str:
    return wrong_text(doc["category"], doc["mode"])

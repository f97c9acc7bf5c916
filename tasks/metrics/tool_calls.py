"""Tool-call accuracy by BFCL's abstract-syntax rules: no function is ever run."""

import json
from collections.abc import Mapping
from typing import Any

from tasks.tool_use.score import CallScore, score_answer


def score_reference(text: str, reference: Mapping[str, Any]) -> CallScore:
    """Score one answer.

    Args:
        text: the answer behind the thought.
        reference: category, mode, functions and answers, the last two as JSON text or decoded.
    """
    functions, answers = (
        json.loads(reference[key]) if isinstance(reference[key], str) else reference[key]
        for key in ("functions", "answers")
    )
    return score_answer(text, functions, answers, reference["category"], reference["mode"])

"""The rules of `tool_calls` as an `evaluate` metric."""

import json
from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]
import evaluate  # type: ignore[import-untyped, unused-ignore]

from .tool_calls import score_reference

_DESCRIPTION = (
    """Is the text the right list of function calls? Rules of the official BFCL checker (bfcl-eval 2026.3.23)."""
)
_CITATION = """@inproceedings{patil2025bfcl,
  title = {The Berkeley Function Calling Leaderboard (BFCL)},
  author = {Patil, Shishir G. and Mao, Huanzhi and Yan, Fanjia and others},
  booktitle = {Forty-second International Conference on Machine Learning},
  year = {2025}
}"""
_INPUTS = """
Args:
    predictions: answers' texts; in native mode a JSON list of {"name", "arguments"}.
    references: per answer a JSON object with category, mode, functions and answers (BFCL's own formats).
Returns:
    accuracy and decoded: means of 0 or 1; answers: calls as one text or None; reasons: "" or the official error kind.
"""


class ToolCalls(evaluate.Metric):  # type: ignore[misc, unused-ignore]
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        scores = [
            score_reference(text, json.loads(reference))
            for text, reference in zip(predictions, references, strict=True)
        ]
        return {
            "accuracy": sum(score.right for score in scores) / len(scores),
            "decoded": sum(score.decoded for score in scores) / len(scores),
            "answers": [score.answer for score in scores],
            "reasons": [score.reason for score in scores],
        }

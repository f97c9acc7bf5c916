"""The rules of `boxed_answer` as an `evaluate` metric, which loads alone by its path."""

from typing import Any

import datasets
import evaluate

from .boxed_answer import judge
from .math_equivalence import equivalent

NEEDED = equivalent  # by boxed_answer: evaluate copies the files that this one names, and no others


class BoxedAnswer(evaluate.Metric):  # type: ignore[misc]
    """Share of right responses, of those that only math-verify found right, and of those with a box, 0..1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Value of the last boxed answer against a LaTeX reference; a response without a box is wrong.",
            citation="Balunovic et al. 2025, MathArena, arXiv:2505.23281",
            inputs_description="predictions: response texts; references: LaTeX answers.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        verdicts = [judge(text, gold) for text, gold in zip(predictions, references, strict=True)]
        return {
            "exact_match": sum(verdict.correct for verdict in verdicts) / len(verdicts),
            "math_verify_only": sum(verdict.by_math_verify for verdict in verdicts) / len(verdicts),
            "parsed": sum(verdict.answer is not None for verdict in verdicts) / len(verdicts),
        }

"""The rules of `mmlu_pro_answer` as an `evaluate` metric, which loads alone by its path."""

from typing import Any

import datasets
import evaluate

from .mmlu_pro_answer import chat_answer, official_answer


class MmluProAnswer(evaluate.Metric):  # type: ignore[misc]
    """Share of responses whose letter is the reference, 0..1, and the share in which a letter was found."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match of multiple-choice letters A to J; a response without a letter is wrong.",
            citation="Wang et al. 2024, MMLU-Pro, arXiv:2406.01574",
            inputs_description="predictions: response texts; references: letters; chat: use the last `Answer: X` only.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], chat: bool = False) -> dict[str, Any]:
        answers = [chat_answer(text) if chat else official_answer(text) for text in predictions]
        right = [answer == reference for answer, reference in zip(answers, references, strict=True)]
        return {
            "exact_match": sum(right) / len(right),
            "parsed": sum(answer is not None for answer in answers) / len(answers),
        }

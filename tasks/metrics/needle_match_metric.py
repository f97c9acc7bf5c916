"""The readings of `needle_match` as an `evaluate` metric, which loads alone by its path."""

from typing import Any

import datasets
import evaluate

from .needle_match import all_found, match_all, whole_words


class NeedleMatch(evaluate.Metric):  # type: ignore[misc]
    """The three readings, averaged over predictions; 0..1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Hsieh et al. 2024, RULER, arXiv:2404.06654",
            inputs_description="predictions: one text each; references: the list of values to find for each.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], **_: Any) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            rule.__name__: sum(rule(prediction, values) for prediction, values in pairs) / len(pairs)
            for rule in (match_all, all_found, whole_words)
        }

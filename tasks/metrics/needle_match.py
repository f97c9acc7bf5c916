"""How many of the hidden values does an answer repeat? RULER's `string_match_all` and two stricter readings."""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """The prediction as RULER reads it: stripped, control characters turned into line ends, stripped again.

    Source: NVIDIA/RULER, scripts/eval/evaluate.py, `postprocess_pred`.
    """
    return _CONTROL.sub("\n", prediction.strip()).strip()


def match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the prediction, 0..1; case is ignored.

    A reference also counts inside a longer word or number. Source: NVIDIA/RULER,
    scripts/eval/synthetic/constants.py, `string_match_all` (there 0..100 and averaged over predictions).
    Raises ValueError without references: that sample could not be scored.
    """
    _require(references)
    text = clean(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def all_found(prediction: str, references: Sequence[str]) -> float:
    """1.0 if every reference occurs in the prediction by the rule of `match_all`, else 0.0."""
    return float(match_all(prediction, references) == 1.0)


def whole_words(prediction: str, references: Sequence[str]) -> float:
    """Like `match_all`, but a reference must not touch a letter, digit or underscore: 1234567 is not in 12345678."""
    _require(references)
    text = clean(prediction).lower()
    return sum(bool(re.search(rf"(?<!\w){re.escape(r.lower())}(?!\w)", text)) for r in references) / len(references)


def _require(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("needle_match: expected at least one reference, got none")

"""Aggregations that several task files name."""

from collections.abc import Sequence


def share_parsed(answers: Sequence[str | None]) -> float:
    """Share of responses in which an answer was found, 0..1; lm-eval calls this with at least one response."""
    return sum(answer is not None for answer in answers) / len(answers)

"""Options of a needle task, checked: lists of lengths and depths, samples for each pair of them."""

from typing import Any, Literal

from tasks.errors import TaskError


def read_lengths(task: str, lengths: Any) -> list[int]:
    """A list of different positive numbers of tokens."""
    if (
        not isinstance(lengths, list | tuple)
        or not lengths
        or not all(_is_count(length) for length in lengths)
        or len(set(lengths)) < len(lengths)
    ):
        raise TaskError(f"{task}: lengths: expected a list of different numbers of tokens, got {lengths!r}")
    return list(lengths)


def read_depths(task: str, depths: Any) -> list[float]:
    """Percentages: those of a list, or as many as asked spread evenly over 0..100 (a single one is 50)."""
    if _is_count(depths):
        return [50.0] if depths == 1 else [round(100 * i / (depths - 1), 2) for i in range(depths)]
    if (
        not isinstance(depths, list | tuple)
        or not depths
        or not all(isinstance(d, int | float) and not isinstance(d, bool) and 0 <= d <= 100 for d in depths)
        or len({f"{d:g}" for d in depths}) < len(depths)
    ):
        raise TaskError(
            f"{task}: depths: expected how many, or a list of different percentages from 0 to 100, got {depths!r}"
        )
    return [float(depth) for depth in depths]


def read_samples(task: str, samples: Any) -> int:
    """A positive number of samples for each length and depth."""
    if not _is_count(samples):
        raise TaskError(f"{task}: samples: expected a positive number for each length and depth, got {samples!r}")
    return int(samples)


def read_words(task: str, words: Any) -> Literal["all", "held_out"]:
    """Which words keys and values are made of."""
    if words == "all":
        return "all"
    if words == "held_out":
        return "held_out"
    raise TaskError(f"{task}: words: expected all or held_out, got {words!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

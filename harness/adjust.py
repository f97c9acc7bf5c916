"""Many tests in one table: adjusted p-values."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given (Holm 1979): i-th smallest of m times m - i + 1, never falling."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """q-values in the order given (Benjamini and Hochberg 1995): i-th smallest of m times m / i, never rising above."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__, reverse=True)
    adjusted, most = [0.0] * len(p_values), 1.0
    for place, rank in zip(order, range(len(p_values), 0, -1), strict=True):
        most = min(most, len(p_values) / rank * p_values[place])
        adjusted[place] = most
    return adjusted

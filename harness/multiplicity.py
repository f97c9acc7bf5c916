"""Many comparisons in one table: which differences stay significant after Holm's correction."""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.numbers import finite


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given, each in 0..1; compare them with alpha.

    The i-th smallest of m is multiplied by m - i + 1 and never falls below the one before it.
    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    adjusted = [0.0] * len(p_values)
    floor = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = floor
    return adjusted


def difference_p(row: Mapping[str, Any]) -> float | None:
    """Two-sided p-value that a comparison row's difference is zero; None if there is nothing to test with.

    Exact McNemar where the row has it and samples are their own clusters, otherwise t with clusters - 1 degrees of
    freedom. A standard error of zero is tested with McNemar only: identical answers carry no evidence of a difference.
    """
    mcnemar = finite(row.get("mcnemar_p"))
    num_clusters = row.get("clusters") or row["n"]
    if mcnemar is not None and num_clusters == row["n"]:
        return mcnemar
    stderr, difference = finite(row.get("stderr")), finite(row.get("difference"))
    if not stderr or difference is None or num_clusters < 2:
        return mcnemar
    from scipy import stats  # type: ignore[import-untyped]

    return float(2 * stats.t.sf(abs(difference) / stderr, num_clusters - 1))


def holm_by_task(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Holm-adjusted p per (task, variant, metric) over the whole-task rows of a comparison, one family."""
    family = [(row, p) for row in rows if not row["group"] and (p := difference_p(row)) is not None]
    adjusted = holm([p for _, p in family])
    return {(row["task"], row["variant"], row["metric"]): p for (row, _), p in zip(family, adjusted, strict=True)}

"""Does recall go with right answers? Correlation of a sample's recall with its score."""

import math
from collections.abc import Sequence
from typing import Any

from harness.estimates import ROUNDING, mean
from harness.recall import over_layers
from harness.records import SampleScore

LINKED = ("mass", "needle_coverage")


def recall_link(scores: Sequence[SampleScore]) -> list[dict[str, Any]]:
    """Rows of one (variant, task): point-biserial correlation by measure, phase, selector and k, over all layers.

    The recall is that of the sample's own trajectory (the oracle's and other selectors' on the dense one included).
    n: samples. point_biserial: None where fewer than three samples or no spread on one side leave it undefined.
    A correlation, not a cause: long and hard prompts have low recall and low scores alike.
    """
    cells: dict[tuple[str, str, str, int], list[tuple[float, float]]] = {}
    trajectory = None
    for score in scores:
        if score.error is not None or score.recall is None:
            continue
        trajectory = score.recall["trajectory"]
        for row in over_layers(score.recall["rows"]):
            for measure in LINKED:
                if row[measure] is not None:
                    key = (measure, row["phase"], row["selector"], row["k"])
                    cells.setdefault(key, []).append((row[measure], score.metrics[score.headline]))
    return [
        {
            "variant": scores[0].variant,
            "trajectory": trajectory,
            "task": scores[0].task,
            "measure": measure,
            "phase": phase,
            "selector": selector,
            "k": size,
            "point_biserial": correlation([value for value, _ in pairs], [right for _, right in pairs]),
            "n": len(pairs),
        }
        for (measure, phase, selector, size), pairs in sorted(cells.items())
    ]


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation, which for a 0/1 side is the point-biserial one; None where it is undefined."""
    if len(first) < 3:
        return None
    centered = []
    for side in (first, second):
        center = mean(side)
        centered.append([value - center for value in side])
    if any(
        max(map(abs, away)) <= ROUNDING * max(map(abs, side))
        for away, side in zip(centered, (first, second), strict=True)
    ):
        return None
    products = math.fsum(a * b for a, b in zip(*centered, strict=True))
    squares = [math.fsum(away * away for away in side) for side in centered]
    return max(-1.0, min(1.0, products / math.sqrt(squares[0] * squares[1])))

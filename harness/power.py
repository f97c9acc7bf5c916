"""How many questions a comparison would have needed."""

import math
from typing import TYPE_CHECKING

from harness.estimates import ALPHA, normal_quantile
from harness.exact import FEW_DISCORDANT

if TYPE_CHECKING:
    from harness.paired import Paired

POWER = 0.8


def questions_needed(result: "Paired") -> int | None:
    """Questions at which the comparison would probably (power 0.8) be conclusive; None if there is nothing to go by.

    Those for equivalence, or where that is no more than was asked already, the observed difference is taken as true,
    and the smaller n of showing that it is within the margin or that it is not zero counts.
    """
    needed = needed_for_equivalence(result)
    if needed is None:
        return None
    if needed <= result.n:
        spread, at_margin = _spreads(result)
        size, power = abs(result.difference or 0.0), normal_quantile(POWER)
        choices = []
        if size:
            choices.append(((normal_quantile(1 - ALPHA / 2) + power) * spread / size) ** 2)
        if size < result.margin:
            within = normal_quantile(1 - ALPHA) * at_margin + power * spread
            choices.append((within / (result.margin - size)) ** 2)
        needed = min(choices)
    return max(result.n + 1, math.ceil(needed))


def needed_for_equivalence(result: "Paired") -> float | None:
    """Questions that would show equivalence with power 0.8 if the true difference were zero; None without an error.

    n = (z_{1-alpha} * s0 + z_{1-(1-power)/2} * s)^2 / margin^2, with s^2 = Var(d) = n * stderr^2, the effect of
    clusters included. s0 = s makes this 8.56 * Var(d) / margin^2; for independent 0/1 answers s0 is the spread at the
    margin that Tango's test uses, s0^2 = (s^2 + sqrt(s^4 + 4 * margin^2)) / 2: more than s where few answers differ.
    Where t is checked by the clusters that differ, at least as many questions as bring 10 of them.
    Where no two clusters differ: as many as bring the exact bound within the margin, ln(alpha) / ln(1 - margin)
    clusters for a difference of zero.
    """
    if result.stderr is None or result.difference is None or result.tost_p is None:
        return None
    if result.stderr == 0:
        size = abs(result.difference)
        if size >= result.margin:
            return None
        num_clusters = math.log(ALPHA) / math.log((1 - result.margin) / (1 - size))
        return num_clusters * result.n / result.clusters
    spread, at_margin = _spreads(result)
    shown = normal_quantile(1 - ALPHA) * at_margin + normal_quantile(1 - (1 - POWER) / 2) * spread
    few = at_margin == spread and result.discordant < FEW_DISCORDANT
    least = result.n * FEW_DISCORDANT / result.discordant if few and result.discordant else 0.0
    return max(least, (shown / result.margin) ** 2)


def _spreads(result: "Paired") -> tuple[float, float]:
    """s and s0 of `needed_for_equivalence`."""
    variance = result.n * (result.stderr or 0.0) ** 2
    if result.mcnemar_p is None or result.clusters < result.n:
        return math.sqrt(variance), math.sqrt(variance)
    return math.sqrt(variance), math.sqrt((variance + math.hypot(variance, 2 * result.margin)) / 2)

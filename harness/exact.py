"""Exact and score tests for few discordant pairs, where Student's t promises too much.

Sources: McNemar 1947; T. Tango 1998, Statistics in Medicine 17, 891-908; Clopper and Pearson 1934 (binomial bounds);
W. Hoeffding 1963, JASA 58, 13-30 (sums of bounded variables).
"""

import math
from collections.abc import Sequence

FEW_DISCORDANT = 10  # clusters that differ, below which t is checked against exact tests


def exact_mcnemar(variant_only: int, baseline_only: int) -> float:
    """Two-sided exact p that both sides win equally often: min(1, 2 * P(Binomial(b + c, 1/2) <= min(b, c))).

    1 if b + c = 0. The same number is the sign test over clusters, counted by the sign of their mean difference.
    """
    total = variant_only + baseline_only
    ways = choices = 1
    for i in range(min(variant_only, baseline_only)):
        choices = choices * (total - i) // (i + 1)
        ways += choices
    return min(1.0, ways / 2 ** (total - 1)) if total else 1.0


def tango_upper(variant_only: int, baseline_only: int, n: int, shift: float) -> float:
    """Score-test p of "true difference <= shift" against "> shift" for paired 0/1 answers (Tango 1998)."""
    b, c = variant_only, baseline_only
    linear = (2 * n - b + c) * shift - b - c
    root = math.sqrt(max(0.0, linear * linear + 8 * n * c * shift * (1 - shift)))
    chance = max(0.0, root - linear) / (4 * n)  # of baseline only, most likely under the shift
    variance = n * (2 * chance + shift * (1 - shift))
    z = (b - c - n * shift) / math.sqrt(variance)
    return 0.5 * math.erfc(z / math.sqrt(2))


def sign_bound(num_against: int, num_clusters: int, margin: float) -> float:
    """Exact p of "the true difference is a margin or more against us", from how many clusters went against us.

    For clusters of like size. With scores in 0..1 a mean loss of the margin needs a chance of at least the margin that
    a cluster loses, so P(Binomial(clusters, margin) <= observed losses) bounds p whatever the sizes of the losses are.
    """
    from scipy.special import bdtr

    return float(bdtr(num_against, num_clusters, margin)) if margin < 1 else 0.0


def loss_bound(losses: Sequence[float], margin: float) -> float:
    """Bound on p of "the true difference is a margin or more against us", from how much each cluster lost, 0..1 each.

    For scores with steps between 0 and 1, where `sign_bound` takes the loss of one needle in four for that of a whole
    answer. A mean loss of C clusters this small has at most the chance exp(-C KL(mean loss, margin)), KL between two
    coins (Hoeffding, theorem 1), whatever the distribution of the losses is.
    """
    lost = math.fsum(losses) / len(losses)
    if lost >= margin:
        return 1.0
    if margin >= 1:
        return 0.0
    kept = (1 - lost) * math.log((1 - lost) / (1 - margin))
    return math.exp(-len(losses) * (kept + (lost * math.log(lost / margin) if lost else 0.0)))


def constant_interval(difference: float, num_clusters: int, alpha: float) -> tuple[float, float]:
    """Interval of the true difference when every cluster shows the same one, for scores in 0..1.

    Other outcomes stayed unseen in C clusters, so their chance is below u = 1 - alpha^(1/C) (about 3/C, the rule of
    three), and each of them may be as far as 1 away: difference * (1 - u) -+ u.
    """
    unseen = 1 - alpha ** (1 / num_clusters)
    return difference * (1 - unseen) - unseen, difference * (1 - unseen) + unseen


def constant_tests(difference: float, num_clusters: int, margin: float) -> tuple[float, float]:
    """One-sided p against "<= -margin" and against ">= margin": the alpha at which the interval above ends there."""

    def against(gap: float) -> float:
        return 1.0 if gap <= -margin else max(0.0, min(1.0, (1 - margin) / (1 + gap))) ** num_clusters

    return against(difference), against(-difference)

"""Two variants on the same questions: the difference, its error, the tests, and what they allow one to say.

Sources: Miller 2024, arXiv:2411.00640 (paired differences, clustered errors); McNemar 1947; Schuirmann 1987 (two
one-sided tests); T. Tango 1998, Statistics in Medicine 17, 891-908 (score test for paired proportions).

Intervals are those of Student's t over clusters. A handful of discordant questions is far from normal, so no verdict
rests on t alone there: EQUIVALENT and NON-INFERIOR also need Tango's score test (independent 0/1 scores) or, with fewer
than 10 clusters that differ, a bound that holds for every distribution: the sign bound for clusters of 0/1 scores,
Hoeffding's for scores with steps between. DIFFERENT also needs McNemar's exact test or the sign test over those
clusters.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence

from harness.estimates import (
    ALPHA,
    by_cluster,
    clustered_standard_error,
    mean,
    t_interval,
    t_upper,
)
from harness.exact import (
    FEW_DISCORDANT,
    constant_interval,
    constant_tests,
    exact_mcnemar,
    loss_bound,
    sign_bound,
    tango_upper,
)
from harness.power import questions_needed

CEILING, FLOOR = 0.99, 0.01


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """What n paired questions say about variant minus baseline.

    stderr, p, tost_p, noninferior_p: None where one cluster or no question leaves nothing to test with.
    interval: "t", "clustered t", or "exact bound" where no two clusters differ. p: two-sided, of no difference.
    variant_only, baseline_only: questions in which that side scored higher. discordant: clusters with a difference.
    n_needed: questions that a conclusive answer would take.
    """

    n: int
    clusters: int
    mean_variant: float | None
    mean_baseline: float | None
    difference: float | None
    stderr: float | None
    low: float | None
    high: float | None
    interval: str | None
    variant_only: int
    baseline_only: int
    discordant: int
    mcnemar_p: float | None
    p: float | None
    margin: float
    noninferior_p: float | None
    tost_p: float | None
    verdict: str
    n_needed: int | None


def paired(
    variant: Sequence[float],
    baseline: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    margin: float,
    single: bool = True,
) -> Paired:
    """Compare question scores that are paired by place.

    margin: the largest difference that does not matter, in the scores' unit. single: one answer a question, so that 0/1
    scores are plain right and wrong and McNemar's test applies.
    """
    differences = [ours - theirs for ours, theirs in zip(variant, baseline, strict=True)]
    n, num_clusters = len(differences), len(set(clusters))
    variant_only, baseline_only = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    binary = single and all(score in (0, 1) for score in (*variant, *baseline))
    mcnemar_p = exact_mcnemar(variant_only, baseline_only) if binary and n else None
    means = (mean(variant), mean(baseline)) if n else (None, None)
    difference = mean(differences) if n else None
    stderr = clustered_standard_error(differences, clusters) if n else None
    low = high = p = below = above = None
    kind: str | None = None
    gains = [mean(members) for members in by_cluster(differences, clusters)]
    up, down = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    graded = any(0 < score < 1 for score in (*variant, *baseline))
    shares = all(0 <= score <= 1 for score in (*variant, *baseline))
    if difference is not None and stderr == 0:
        if shares:
            kind = "exact bound"
            low, high = constant_interval(difference, num_clusters, ALPHA)
            below, above = constant_tests(difference, num_clusters, margin)
            p = exact_mcnemar(num_clusters if difference > 0 else 0, num_clusters if difference < 0 else 0)
    elif difference is not None and stderr is not None:
        df = num_clusters - 1
        kind = "t" if num_clusters == n else "clustered t"
        low, high = t_interval(difference, stderr, df)
        if shares:  # no two shares are further apart
            low, high = max(low, -1.0), min(high, 1.0)
        p = 2 * t_upper(abs(difference) / stderr, df)
        below, above = t_upper((difference + margin) / stderr, df), t_upper((margin - difference) / stderr, df)
        if binary and num_clusters == n:
            below = max(below, tango_upper(variant_only, baseline_only, n, -margin))
            above = max(above, tango_upper(baseline_only, variant_only, n, -margin))
        elif up + down < FEW_DISCORDANT:
            if graded and shares:
                below = max(below, loss_bound([max(0.0, -gain) for gain in gains], margin))
                above = max(above, loss_bound([max(0.0, gain) for gain in gains], margin))
            else:
                below = max(below, sign_bound(down, num_clusters, margin))
                above = max(above, sign_bound(up, num_clusters, margin))
            p = max(p, exact_mcnemar(up, down))
    if binary and num_clusters == n and p is not None:
        p = mcnemar_p
    result = Paired(
        n=n,
        clusters=num_clusters,
        mean_variant=means[0],
        mean_baseline=means[1],
        difference=difference,
        stderr=stderr,
        low=low,
        high=high,
        interval=kind,
        variant_only=variant_only,
        baseline_only=baseline_only,
        discordant=up + down,
        mcnemar_p=mcnemar_p,
        p=p,
        margin=margin,
        noninferior_p=below,
        tost_p=None if below is None or above is None else max(below, above),
        verdict="",
        n_needed=None,
    )
    return conclude(result)


def conclude(result: Paired) -> Paired:
    """The same result with its verdict and, where that is INCONCLUSIVE, the n it would take.

    SATURATED: both sides at least 99 % or at most 1 %, and not shown to differ: such a task cannot tell them apart.
    """
    different = (
        result.p is not None
        and result.low is not None
        and result.high is not None
        and result.p <= ALPHA
        and (result.low > 0 or result.high < 0)
    )
    equivalent = result.tost_p is not None and result.tost_p <= ALPHA
    if different:
        verdict = "DIFFERENT, WITHIN MARGIN" if equivalent else "DIFFERENT"
    elif saturated(result):
        verdict = "SATURATED"
    elif equivalent:
        verdict = "EQUIVALENT"
    elif result.noninferior_p is not None and result.noninferior_p <= ALPHA:
        verdict = "NON-INFERIOR"
    else:
        verdict = "INCONCLUSIVE"
    needed = questions_needed(result) if verdict == "INCONCLUSIVE" else None
    return dataclasses.replace(result, verdict=verdict, n_needed=needed)


def saturated(result: Paired) -> bool:
    """Both means at the ceiling or both at the floor of the 0..1 scale."""
    if result.mean_variant is None or result.mean_baseline is None:
        return False
    low, high = sorted((result.mean_variant, result.mean_baseline))
    return CEILING <= low <= high <= 1 or 0 <= low <= high <= FLOOR


def poolable(part: Paired) -> bool:
    """Whether a task says anything about the mean of tasks: not saturated, and with an error to weigh."""
    return part.tost_p is not None and part.verdict != "SATURATED"


def pooled(parts: Sequence[Paired], *, margin: float) -> Paired:
    """Mean difference over two or more poolable tasks with equal weights, as a headline is a plain mean of tasks.

    Errors of tasks are taken as independent; degrees of freedom by Welch and Satterthwaite. A task in which no two
    clusters differ counts with the error of one discordant cluster, 1 / clusters: an error of zero would make tasks
    that show nothing look like proof.
    """
    errors = [part.stderr or 1 / part.clusters for part in parts]
    stderr = math.sqrt(math.fsum(error**2 for error in errors)) / len(parts)
    spread = math.fsum(error**4 / (part.clusters - 1) for error, part in zip(errors, parts, strict=True))
    df = math.fsum(error**2 for error in errors) ** 2 / spread
    difference = mean([part.difference for part in parts if part.difference is not None])
    low, high = t_interval(difference, stderr, df)
    if all(part.low is not None and part.low >= -1 and part.high is not None and part.high <= 1 for part in parts):
        low, high = max(low, -1.0), min(high, 1.0)
    below, above = t_upper((difference + margin) / stderr, df), t_upper((margin - difference) / stderr, df)
    result = Paired(
        n=sum(part.n for part in parts),
        clusters=sum(part.clusters for part in parts),
        mean_variant=mean([part.mean_variant for part in parts if part.mean_variant is not None]),
        mean_baseline=mean([part.mean_baseline for part in parts if part.mean_baseline is not None]),
        difference=difference,
        stderr=stderr,
        low=low,
        high=high,
        interval="t",
        variant_only=sum(part.variant_only for part in parts),
        baseline_only=sum(part.baseline_only for part in parts),
        discordant=sum(part.discordant for part in parts),
        mcnemar_p=None,
        p=2 * t_upper(abs(difference) / stderr, df),
        margin=margin,
        noninferior_p=below,
        tost_p=max(below, above),
        verdict="",
        n_needed=None,
    )
    return conclude(result)

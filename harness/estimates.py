"""Means with their uncertainty: clustered standard errors, intervals, and what several tries at one question give.

Pure functions of numbers. Sums are exactly rounded (`math.fsum`), so no result depends on the order of the samples.
Sources: E. Miller, Adding Error Bars to Evals, arXiv:2411.00640; E. B. Wilson 1927 (score interval); M. Chen et al.,
Evaluating Large Language Models Trained on Code, arXiv:2107.03374 (pass@k).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Sequence

CONFIDENCE = 0.95
ALPHA = 0.05  # 1 - CONFIDENCE
ROUNDING = 1e-12  # a relative spread below this is rounding, not spread
FEW = 100  # below this many independent 0/1 scores the normal approximation is not used


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over questions and how sure it is.

    stderr: None with one cluster, where nothing can be said about spread. low, high: 95 % interval, None where there is
    none to give. interval: "wilson", "t" or "clustered t". n: questions. clusters: groups that vary independently.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    interval: str | None
    n: int
    clusters: int


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; no values is a bug upstream, not a zero, and raises ValueError."""
    if not values:
        raise ValueError("mean: no values")
    return math.fsum(values) / len(values)


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float | None:
    """Standard error of the mean when values of one cluster move together; None with fewer than two clusters.

    sqrt(C / (C - 1) * sum over clusters of (sum of deviations in it)^2) / n. With one value a cluster (or clusters
    None) this is sd / sqrt(n). Exactly 0 where clusters differ by rounding only.
    Source: Miller 2024, appendix A, with the finite-sample factor C / (C - 1).
    """
    center = mean(values)
    sums = [math.fsum(value - center for value in members) for members in by_cluster(values, clusters)]
    count = len(sums)
    if count < 2:
        return None
    if max(map(abs, sums)) <= ROUNDING * max(map(abs, values)):
        return 0.0
    return math.sqrt(count / (count - 1) * math.fsum(total * total for total in sums)) / len(values)


def by_cluster(values: Sequence[float], clusters: Sequence[Hashable] | None) -> list[list[float]]:
    """The values of each cluster, clusters in order of appearance; clusters None gives every value its own."""
    members: dict[Hashable, list[float]] = {}
    for cluster, value in zip(range(len(values)) if clusters is None else clusters, values, strict=True):
        members.setdefault(cluster, []).append(value)
    return list(members.values())


def t_quantile(probability: float, df: float) -> float:
    """Where the cumulative Student distribution with df degrees of freedom reaches the probability."""
    from scipy.special import stdtrit

    return float(stdtrit(df, probability))


def t_upper(statistic: float, df: float) -> float:
    """P(T > statistic) for Student's T with df degrees of freedom."""
    from scipy.special import stdtr

    return float(stdtr(df, -statistic))


def normal_quantile(probability: float) -> float:
    """Where the cumulative standard normal distribution reaches the probability."""
    from scipy.special import ndtri

    return float(ndtri(probability))


def t_interval(center: float, stderr: float, df: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """center -+ t * stderr, two-sided."""
    width = t_quantile(0.5 + confidence / 2, df) * stderr
    return center - width, center + width


def wilson_interval(share: float, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a proportion observed in `trials` independent trials; stays within 0..1 and never closes."""
    if trials < 1 or not 0 <= share <= 1:
        raise ValueError(f"wilson_interval: expected a share in 0..1 of at least one trial, got {share} of {trials}")
    z2 = normal_quantile(0.5 + confidence / 2) ** 2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    width = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials * trials))) / (1 + z2 / trials)
    # rounding must not move the ends that are exact
    return 0.0 if share == 0 else max(0.0, center - width), 1.0 if share == 1 else min(1.0, center + width)


def estimate(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, needle_cell: bool = False
) -> Estimate:
    """Mean, standard error and 95 % interval of question scores.

    Wilson's interval serves 0/1 scores in needle cells, fewer than 100 independent 0/1 scores, and scores in 0..1
    without any spread between clusters (all right, all wrong, one cluster), where t would claim certainty. Its trials
    are the clusters: questions of one cluster may all fail together. Everything else gets t with clusters - 1 degrees
    of freedom, cut to 0..1 when all values lie there.
    """
    average, stderr = mean(values), clustered_standard_error(values, clusters)
    num_clusters = len(values) if clusters is None else len(set(clusters))
    bounded = all(0 <= value <= 1 for value in values)
    binary = all(value in (0, 1) for value in values)
    independent = num_clusters == len(values)
    low: float | None = None
    high: float | None = None
    kind: str | None = None
    if (binary and (needle_cell or (independent and len(values) < FEW))) or (bounded and not stderr):
        low, high = wilson_interval(average, num_clusters)
        kind = "wilson"
    elif stderr is not None:
        low, high = t_interval(average, stderr, num_clusters - 1)
        if bounded:
            low, high = max(0.0, low), min(1.0, high)
        kind = "t" if independent else "clustered t"
    return Estimate(
        mean=average, stderr=stderr, low=low, high=high, interval=kind, n=len(values), clusters=num_clusters
    )


def pass_at_k(num_tries: int, num_right: int, k: int) -> float:
    """Unbiased chance that at least one of k tries is right: 1 - C(n - c, k) / C(n, k). Exact integers inside."""
    if not 0 <= num_right <= num_tries or not 1 <= k <= num_tries:
        raise ValueError(f"pass_at_k: expected 0 <= c <= n and 1 <= k <= n, got n={num_tries}, c={num_right}, k={k}")
    return 1 - math.comb(num_tries - num_right, k) / math.comb(num_tries, k)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … not above the limit: the k of pass@k."""
    return [1 << exponent for exponent in range(limit.bit_length())]


def majority(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """maj@n: score of the most frequent answer; answers that tie share it evenly.

    None (nothing parsed) does not vote; no vote at all scores 0. An answer's score is the mean over its occurrences.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return mean([mean([score for a, score in zip(answers, scores, strict=True) if a == answer]) for answer in winners])


def geometric_ratio(
    counts: Sequence[float], base_counts: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """exp(mean log(count / base count)) over pairs of positive counts, with its 95 % t interval on the log scale.

    For heavy-tailed token counts. stderr is that of the mean log ratio; low and high are None with one cluster.
    """
    logs = [math.log(count / base) for count, base in zip(counts, base_counts, strict=True)]
    average, stderr = mean(logs), clustered_standard_error(logs, clusters)
    num_clusters = len(logs) if clusters is None else len(set(clusters))
    low: float | None = None
    high: float | None = None
    if stderr is not None:
        low, high = (math.exp(end) for end in t_interval(average, stderr, num_clusters - 1))
    return Estimate(
        mean=math.exp(average),
        stderr=stderr,
        low=low,
        high=high,
        interval=None if stderr is None else "t" if num_clusters == len(logs) else "clustered t",
        n=len(logs),
        clusters=num_clusters,
    )

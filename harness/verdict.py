"""A comparison as a sentence, with its numbers in points (hundredths of the 0..1 scale)."""

from harness.estimates import ALPHA, t_upper
from harness.paired import CEILING, Paired
from harness.power import needed_for_equivalence


def sentence(
    result: Paired, *, variant: str, baseline: str, where: str, num_unpaired: int = 0, adjusted_p: float | None = None
) -> str:
    """What the comparison allows one to say, in plain English.

    where: the task, or what was pooled. num_unpaired: documents without a partner. adjusted_p: after correction for the
    number of comparisons beside this one.
    """
    left_out = f" Left out: {_many(num_unpaired, 'sample')} failed or missing on one side." if num_unpaired else ""
    if result.difference is None:
        return f"{where}: no sample was answered by both {variant} and {baseline}; nothing can be compared.{left_out}"
    margin = f"within {_points(result.margin, result, sign=False)}"
    said = {
        "EQUIVALENT": f"{variant} and {baseline} are equivalent on {where} {margin}",
        "NON-INFERIOR": f"{variant} is not worse than {baseline} on {where} by as much as "
        f"{_points(result.margin, result, sign=False)}, though equivalence is not shown",
        "DIFFERENT": f"{variant} is {_direction(result)} than {baseline} on {where}",
        "DIFFERENT, WITHIN MARGIN": f"{variant} is {_direction(result)} than {baseline} on {where}, but {margin}",
        "SATURATED": f"{where} is uninformative: {_extreme(result)} for {variant} and {baseline} alike",
        "INCONCLUSIVE": f"{variant} against {baseline} on {where} is inconclusive",
    }[result.verdict]
    if result.verdict.startswith("DIFFERENT") and adjusted_p is not None and adjusted_p > ALPHA:
        left_out = f" Among this many comparisons it may be chance (adjusted p = {adjusted_p:.2g}).{left_out}"
    return f"{said}: {_evidence(result)}.{_advice(result)}{left_out}"


def _evidence(result: Paired) -> str:
    assert result.difference is not None
    parts = [f"difference {_points(result.difference, result)}"]
    if result.low is not None and result.high is not None:
        bound = " by an exact bound, as no two clusters differ," if result.interval == "exact bound" else ""
        parts.append(f"95 % interval{bound} {_number(result.low, result)} to {_number(result.high, result)}")
    counts = _many(result.n, "sample")
    parts.append(counts if result.clusters == result.n else f"{counts} in {_many(result.clusters, 'cluster')}")
    parts.append(f"{result.variant_only} better and {result.baseline_only} worse")
    if result.mcnemar_p is not None and result.clusters == result.n and result.discordant:
        parts.append(f"McNemar p = {result.mcnemar_p:.2g}")
    return ", ".join(parts).replace(",,", ",")


def _advice(result: Paired) -> str:
    if result.verdict != "INCONCLUSIVE":
        return ""
    if result.stderr is None:
        return " All samples share one cluster, so chance cannot be told from effect."
    reason = ""
    if result.low is not None and result.high is not None and (result.low > 0 or result.high < 0):
        reason = " The interval leaves out zero, but so few samples differ that the exact test does not."
    elif _close_by_t_alone(result):
        reason = " Student's t alone would show equivalence, but so few samples differ that exact tests do not agree."
    if result.n_needed is None:
        return reason
    first_choice = needed_for_equivalence(result)
    if first_choice is not None and first_choice > result.n:
        return f"{reason} If there is no true difference, about {result.n_needed:,} samples would show equivalence."
    return f"{reason} If the true difference is this one, about {result.n_needed:,} samples would be conclusive."


def _close_by_t_alone(result: Paired) -> bool:
    if not result.stderr or result.difference is None:
        return False
    return t_upper((result.margin - abs(result.difference)) / result.stderr, result.clusters - 1) <= ALPHA


def _direction(result: Paired) -> str:
    return "better" if result.difference is not None and result.difference > 0 else "worse"


def _extreme(result: Paired) -> str:
    high = result.mean_variant is not None and result.mean_variant >= CEILING
    return "at least 99 % right" if high else "at most 1 % right"


def _digits(result: Paired) -> int:
    """One decimal, or two where the standard error is below a tenth of a point."""
    return 2 if result.stderr and result.stderr < 0.001 else 1


def _number(value: float, result: Paired, sign: bool = True) -> str:
    digits = _digits(result)
    shown = round(100 * value, digits) + 0.0  # no "-0.0"
    return f"{shown:+.{digits}f}" if sign and shown else f"{shown:.{digits}f}"


def _points(value: float, result: Paired, sign: bool = True) -> str:
    return f"{_number(value, result, sign)} points"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"

"""Numbers as readers see them: percent, points, counts and p-values; what was not measured is an en dash."""

import math

NOT_MEASURED = "–"  # noqa: RUF001  an en dash, on purpose
MINUS = "−"  # noqa: RUF001  as wide as a plus sign, so that signs line up

# metrics that are no shares, with their unit; all of them are better when smaller
UNITS = {"nats_per_token": "nats", "perplexity": "", "bits_per_byte": "bits"}


def finite(value: object) -> float | None:
    """The number, or None for None, NaN and infinity. Booleans are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: object, digits: int = 1) -> str:
    """A share 0..1 in percent without its sign: 0.8333 -> "83.3"."""
    number = finite(value)
    return NOT_MEASURED if number is None else f"{round(100 * number, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def points(value: object, digits: int = 1) -> str:
    """A difference of shares in percentage points with its sign: 0.025 -> "+2.5"."""
    number = finite(value)
    if number is None:
        return NOT_MEASURED
    rounded = round(100 * number, digits) + 0.0  # adding zero turns -0.0 into 0.0
    return f"{rounded:+.{digits}f}".replace("-", MINUS) if rounded else f"{rounded:.{digits}f}"


def interval(low: object, high: object, digits: int = 1, signed: bool = False) -> str:
    """The bounds of a 95 % interval in percent (or signed points): "[74.1, 89.6]"."""
    if finite(low) is None or finite(high) is None:
        return NOT_MEASURED
    show = points if signed else percent
    return f"[{show(low, digits)}, {show(high, digits)}]"


def score(metric: object, value: object) -> str:
    """A score as its metric is read: percent of a share, else three decimals with the unit, 2.3456 -> "2.346 nats"."""
    if metric not in UNITS:
        return percent(value)
    number = finite(value)
    return NOT_MEASURED if number is None else f"{number:.3f} {UNITS[str(metric)]}".rstrip()


def score_interval(metric: object, low: object, high: object) -> str:
    """The bounds of a score's 95 % interval."""
    if metric not in UNITS:
        return interval(low, high)
    bounds = (finite(low), finite(high))
    return NOT_MEASURED if None in bounds else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def count(value: object) -> str:
    """A whole number with thousands separated by commas."""
    number = finite(value)
    return NOT_MEASURED if number is None else f"{round(number):,}"


def tokens(value: object) -> str:
    """A mean number of tokens: one decimal below 100, none above."""
    number = finite(value)
    if number is None:
        return NOT_MEASURED
    return f"{number:.1f}" if abs(number) < 100 else f"{number:,.0f}"


def probability(value: object) -> str:
    """A p-value with three decimals; below 0.001 only that."""
    number = finite(value)
    if number is None:
        return NOT_MEASURED
    return "<0.001" if number < 0.001 else f"{number:.3f}"


def ratio(value: object) -> str:
    """A factor with two decimals: 1.25 -> "×1.25"."""  # noqa: RUF002
    number = finite(value)
    return NOT_MEASURED if number is None else f"×{number:.2f}"  # noqa: RUF001


def group_label(group: dict[str, object]) -> str:
    """The cell of a sub-table in words: {"length": 4096, "depth": 50.0} -> "length 4,096, depth 50 %"."""
    parts = []
    for field, value in group.items():
        number = finite(value)
        text = str(value) if number is None else f"{number:,.10g}"
        parts.append(f"{field} {text} %" if field == "depth" else f"{field} {text}")
    return ", ".join(parts)

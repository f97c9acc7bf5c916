"""Verdicts and the forest plot: paired differences with their intervals against the band of equivalence."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness import numbers
from harness.multiplicity import holm_by_task
from harness.report_parts.svg import Scale, drawing, element, marker, ticks

Row = Mapping[str, Any]
WIDTH = 380
# a sign and a tone per verdict, so that colour is never the only carrier
TONES = {
    "EQUIVALENT": ("=", "good"),
    "NON-INFERIOR": ("≥", "good"),
    "DIFFERENT, WITHIN MARGIN": ("≈", "mixed"),
    "DIFFERENT": ("≠", "bad"),
}


def comparison_view(results: Row, comparison: Row) -> dict[str, Any]:
    """Whole-task rows (headline metric first) with verdicts and drawings, and the rows within groups.

    Returns a dict: baseline, alpha, rows, others (metrics beside the headline), groups, axis (drawing).
    """
    headlines = {(cell["task"], cell["metric"]) for cell in results["cells"] if cell["headline"]}
    whole = [row for row in comparison["rows"] if not row["group"]]
    leading = [row for row in whole if (row["task"], row["metric"]) in headlines]
    reach = _reach(leading)
    adjusted = holm_by_task(comparison["rows"])

    def view(row: Row) -> dict[str, Any]:
        return _view(row, results, comparison["alpha"], adjusted, reach)

    return {
        "baseline": comparison["baseline"],
        "alpha": numbers.percent(comparison["alpha"], 0),
        "rows": [view(row) for row in leading],
        "others": [view(row) for row in whole if (row["task"], row["metric"]) not in headlines],
        "groups": [view(row) for row in comparison["rows"] if row["group"]],
        "axis": _axis(reach),
    }


def tone(verdict: str) -> tuple[str, str]:
    """Sign and tone of a verdict; what is neither good nor bad news (inconclusive, saturated) is neutral."""
    return TONES.get(verdict, ("?" if verdict.startswith("INCONCLUSIVE") else "○", "neutral"))


def _view(row: Row, results: Row, alpha: float, adjusted: Mapping[Any, float], reach: float) -> dict[str, Any]:
    p = None if row["group"] else adjusted.get((row["task"], row["variant"], row["metric"]))
    spent = row.get("tokens") or {}
    sign, mood = tone(row["verdict"])
    digits = 2 if row["n"] >= 1000 else 1
    variants = list(results["variants"])
    series = variants.index(row["variant"]) if row["variant"] in variants else 0
    return {
        "task": row["task"],
        "metric": row["metric"],
        "group": numbers.group_label(row["group"]),
        "variant": row["variant"],
        "baseline": row["baseline"],
        "series": series,
        "n": numbers.count(row["n"]),
        "clusters": numbers.count(row["clusters"]),
        "mean_variant": numbers.percent(row["mean_variant"]),
        "mean_baseline": numbers.percent(row["mean_baseline"]),
        "difference": numbers.points(row["difference"], digits),
        "interval": numbers.interval(row["low"], row["high"], digits, signed=True),
        "variant_only": numbers.count(row["variant_only"]),
        "baseline_only": numbers.count(row["baseline_only"]),
        "mcnemar_p": numbers.probability(row["mcnemar_p"]),
        "holm_p": numbers.probability(p),
        "tost_p": numbers.probability(row["tost_p"]),
        "margin": numbers.percent(row["margin"]),
        "verdict": row["verdict"],
        "sentence": row["sentence"],
        "sign": sign,
        "tone": mood,
        "significant": p is not None and p < alpha,
        "n_needed": numbers.count(row["n_needed"]),
        "token_ratio": numbers.ratio(spent.get("ratio")),
        "token_interval": f"[{numbers.ratio(spent['low'])}, {numbers.ratio(spent['high'])}]" if spent else "",
        "drawing": forest_row(row, reach, series),
    }


def _reach(rows: Sequence[Row]) -> float:
    """Half-width of the forest's axis: every interval and margin inside, a little air, at least 2 points."""
    values = [numbers.finite(row[key]) for row in rows for key in ("difference", "low", "high", "margin")]
    return 1.08 * max([0.02, *(abs(value) for value in values if value is not None)])


def _scale(reach: float) -> Scale:
    return Scale(-reach, reach, 8.0, WIDTH - 8.0)


def forest_row(row: Row, reach: float, series: int) -> Markup:
    """One line of the forest: the margin band, the zero line, the 95 % interval and the difference."""
    scale = _scale(reach)
    difference, low, high, margin = (numbers.finite(row[key]) for key in ("difference", "low", "high", "margin"))
    parts = []
    if margin is not None:
        parts.append(
            element("rect", x=scale(-margin), y=0, width=scale(margin) - scale(-margin), height=34, class_="band")
        )
    parts.append(element("line", x1=scale(0.0), x2=scale(0.0), y1=0, y2=34, class_="zero"))
    if low is not None and high is not None:
        class_ = f"whisker s{series % 6}"
        parts.append(element("line", x1=scale(low), x2=scale(high), y1=17, y2=17, class_=class_))
        for end in (low, high):
            if abs(end) <= reach:
                parts.append(element("line", x1=scale(end), x2=scale(end), y1=12, y2=22, class_=class_))
    if difference is not None:
        parts.append(marker(series, scale(difference), 17.0, 5.2, f"mark s{series % 6}"))
    label = (
        f"{row['variant']} minus {row['baseline']} on {row['task']}: {numbers.points(difference)} points "
        f"{numbers.interval(low, high, signed=True)}, margin ±{numbers.percent(margin)}"
    )
    return drawing(WIDTH, 34, label, *parts, class_="inline forest")


def _axis(reach: float) -> Markup:
    scale = _scale(reach)
    parts = []
    for tick in ticks(-reach, reach, 6):
        parts.append(element("line", x1=scale(tick), x2=scale(tick), y1=0, y2=4, class_="axis"))
        parts.append(
            element("text", numbers.points(tick, 0 if reach > 0.04 else 1), x=scale(tick), y=16, class_="tick middle")
        )
    return drawing(WIDTH, 20, "axis in percentage points", *parts, class_="inline")

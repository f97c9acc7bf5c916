"""Verdicts and the forest plot: paired differences with their intervals against the band of equivalence."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness import numbers
from harness.report_parts.svg import Scale, drawing, element, marker, ticks
from harness.tables import is_significant, leading_rows

Row = Mapping[str, Any]
WIDTH, HEIGHT = 380, 34
# a sign and a tone per verdict, so that colour is never the only carrier
TONES = {
    "EQUIVALENT": ("=", "good"),
    "NON-INFERIOR": ("≥", "good"),
    "DIFFERENT, WITHIN MARGIN": ("≈", "mixed"),
    "DIFFERENT": ("≠", "bad"),
}
OVERVIEW_FROM = 10  # verdicts that are too many to be read one by one
SIGNS = "= equivalent, ≥ not inferior, ≈ different within the margin, ≠ worse, > better, ? inconclusive, ○ saturated"


def comparison_view(results: Row, comparison: Row) -> dict[str, Any]:
    """Whole-task rows with verdicts and drawings, other metrics, and the rows within groups, which are exploration.

    Returns a dict: baseline, alpha, rows, by_task (the same rows), overview (of many rows, else None), signs (its key),
    series (of each variant), others (metrics beside the headline), groups, axis.
    """
    leading = leading_rows(results, comparison["rows"])
    axis = _Axis(leading)

    def views(rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [_view(row, results, comparison, axis) for row in rows]

    rows = views(leading)
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    return {
        "by_task": list(by_task.values()),
        "overview": overview(rows) if len(rows) >= OVERVIEW_FROM else None,
        "signs": SIGNS,
        "series": {row["variant"]: row["series"] for row in rows},
        "baseline": comparison["baseline"],
        "alpha": numbers.percent(comparison["alpha"], 0),
        "rows": rows,
        "others": views([row for row in comparison["rows"] if not row["group"] and row not in leading]),
        "groups": views([*(row for row in comparison["rows"] if row["group"]), *comparison.get("by_group", ())]),
        "axis": axis.drawing(),
    }


def overview(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as a table: {"variants": names, "tasks": [(task, its rows by variant, None for none)]}."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    found = {(row["task"], row["variant"]): row for row in rows}
    tasks = dict.fromkeys(row["task"] for row in rows)
    return {"variants": variants, "tasks": [(task, [found.get((task, name)) for name in variants]) for task in tasks]}


def tone(verdict: str, difference: float | None) -> tuple[str, str]:
    """Sign and tone of a verdict; what is neither good nor bad news (inconclusive, saturated) is neutral."""
    if verdict == "DIFFERENT" and difference is not None and difference > 0:
        return ">", "good"
    return TONES.get(verdict, ("?" if verdict.startswith("INCONCLUSIVE") else "○", "neutral"))


def _view(row: Row, results: Row, comparison: Row, axis: "_Axis") -> dict[str, Any]:
    spent = row.get("tokens") or {}
    sign, mood = tone(row["verdict"], numbers.finite(row["difference"]))
    digits = 2 if (numbers.finite(row.get("stderr")) or 1.0) < 0.001 else 1
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
        "holm_p": numbers.probability(row.get("holm_p")),
        "q": numbers.probability(row.get("q")),
        "tost_p": numbers.probability(row["tost_p"]),
        "margin": numbers.percent(row["margin"]),
        "verdict": row["verdict"],
        "weights_differ": bool(row.get("weights_differ")),
        "sentence": row["sentence"],
        "sign": sign,
        "tone": mood,
        "significant": is_significant(row, comparison),
        "n_needed": numbers.count(row["n_needed"]),
        "token_ratio": numbers.ratio(spent.get("ratio")),
        "token_interval": _bounds(spent),
        "drawing": axis.row(row, series),
    }


def _bounds(spent: Row) -> str:
    """Bounds of a token ratio without their signs: "[0.97, 1.12]"; empty where there are none."""
    low, high = numbers.finite(spent.get("low")), numbers.finite(spent.get("high"))
    return "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


class _Axis:
    """The forest's common axis: every interval, every margin and zero are inside, with a little air."""

    def __init__(self, rows: Sequence[Row]) -> None:
        ends = [numbers.finite(row[key]) for row in rows for key in ("difference", "low", "high")]
        margins = [numbers.finite(row["margin"]) for row in rows]
        known = [end for end in ends if end is not None]
        known += [side * margin for margin in margins if margin is not None for side in (-1, 1)]
        low, high = min([-0.02, *known]), max([0.02, *known])
        air = 0.04 * (high - low)
        self.scale = Scale(low - air, high + air, 8.0, WIDTH - 8.0)

    def row(self, row: Row, series: int) -> Markup:
        """One line of the forest: the margin band, the zero line, the 95 % interval and the difference."""
        scale = self.scale
        difference, low, high, margin = (numbers.finite(row[key]) for key in ("difference", "low", "high", "margin"))
        colour = f"s{series % 6}"
        parts = []
        if margin is not None:
            width = scale(margin) - scale(-margin)
            parts.append(element("rect", x=scale(-margin), y=0, width=width, height=HEIGHT, class_="band"))
        parts.append(element("line", x1=scale(0.0), x2=scale(0.0), y1=0, y2=HEIGHT, class_="zero"))
        if low is not None and high is not None:
            parts.append(element("line", x1=scale(low), x2=scale(high), y1=17, y2=17, class_=f"whisker {colour}"))
            for end in (low, high):
                parts.append(element("line", x1=scale(end), x2=scale(end), y1=12, y2=22, class_=f"whisker {colour}"))
        if difference is not None:
            parts.append(marker(series, scale(difference), 17.0, 5.2, f"mark {colour}"))
        label = (
            f"{row['variant']} minus {row['baseline']} on {row['task']}: {numbers.points(difference)} points "
            f"{numbers.interval(low, high, signed=True)}, margin ±{numbers.percent(margin)}"
        )
        return drawing(WIDTH, HEIGHT, label, *parts, class_="inline")

    def drawing(self) -> Markup:
        parts = []
        digits = 0 if self.scale.high - self.scale.low > 0.08 else 1
        for tick in ticks(self.scale.low, self.scale.high, 6):
            x = self.scale(tick)
            parts.append(element("line", x1=x, x2=x, y1=0, y2=4, class_="axis"))
            parts.append(element("text", numbers.points(tick, digits), x=x, y=16, class_="tick middle"))
        return drawing(WIDTH, 20, "axis in percentage points", *parts, class_="inline")

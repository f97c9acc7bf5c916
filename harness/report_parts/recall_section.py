"""Recall by layer: what a selector keeps of the dense attention, per trajectory, selector and k."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness import numbers
from harness.report_parts.run_data import RunData
from harness.report_parts.svg import Scale, drawing, element, marker, ticks

Row = Mapping[str, Any]
SERIES = {"indexer": 0, "oracle": 1, "recency": 2, "random": 3}
METRICS = (
    ("mass", "Attention mass kept"),
    ("mass_share", "Share of the oracle's mass"),
    ("topk_recall", "Top-k recall"),
    ("output_error", "Output error"),
)
MAX_KS = 4
MAX_CHART_BYTES = 300_000
MAX_ROWS = 240
WIDTH, HEIGHT = 250, 140


def recall_view(run: RunData, room: float = 1.0) -> dict[str, Any]:
    """Blocks of charts and tables, dense trajectory first; what share was trivial; how often sparsity acted.

    room: share of the bytes that charts and tables may take. Blocks beyond it lose their charts first, then go whole;
    `without_charts` and `left_out` count them, their numbers are in recall.csv.
    """
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in run.results["recall"]:
        groups[row["trajectory"], row["variant"], row["task"], row["phase"]].append(row)
    order = {name: place for place, name in enumerate([*run.results["variants"], *run.results["tasks"]])}
    blocks, chart_bytes, num_rows, without_charts, left_out = [], 0, 0, 0, 0
    for key in sorted(groups, key=lambda key: (key[0] != "dense", order[key[1]], order[key[2]], key[3])):
        block = _block(*key, groups[key])
        size = sum(len(panel["drawing"]) for line in block["lines"] for panel in line["panels"])
        if num_rows + len(block["rows"]) > room * MAX_ROWS:
            left_out += 1
            continue
        if chart_bytes + size > room * MAX_CHART_BYTES:
            block["lines"] = []
            without_charts += 1
        else:
            chart_bytes += size
        num_rows += len(block["rows"])
        blocks.append(block)
    selectors = sorted({row["selector"] for row in run.results["recall"]}, key=_series)
    return {
        "blocks": blocks,
        "without_charts": without_charts,
        "left_out": left_out,
        "selectors": [{"name": name, "series": _series(name)} for name in selectors],
        "kept_apart": _kept_apart(run),
        "links": _links(run.comparison),
    }


def _block(trajectory: str, variant: str, task: str, phase: str, rows: Sequence[Row]) -> dict[str, Any]:
    ks = sorted({row["k"] for row in rows})
    shown = ks if len(ks) <= MAX_KS else [ks[round(i * (len(ks) - 1) / (MAX_KS - 1))] for i in range(MAX_KS)]
    layered = [row for row in rows if row["layer"] is not None]
    whole = sorted((row for row in rows if row["layer"] is None), key=lambda row: (row["k"], _series(row["selector"])))
    tops = {metric: _top(metric, layered) for metric, _ in METRICS}
    return {
        "trajectory": trajectory,
        "variant": variant,
        "task": task,
        "phase": phase,
        "lines": [{"k": numbers.count(k), "panels": _panels(k, layered, tops)} for k in shown if layered],
        "rows": [
            {
                "selector": row["selector"],
                "series": _series(row["selector"]),
                "k": numbers.count(row["k"]),
                "n": numbers.count(row["n"]),
                "queries": numbers.count(row.get("queries")),
                "mass": numbers.percent(row["mass"]),
                "mass_stderr": numbers.percent(row["mass_stderr"]),
                "oracle_mass": numbers.percent(row["oracle_mass"]),
                "mass_share": numbers.percent(row["mass_share"]),
                "topk_recall": numbers.percent(row["topk_recall"]),
                "output_error": numbers.percent(row["output_error"]),
                "needle_coverage": numbers.percent(row["needle_coverage"]),
            }
            for row in whole
        ],
    }


def _panels(k: int, rows: Sequence[Row], tops: Mapping[str, float]) -> list[dict[str, Any]]:
    mine = [row for row in rows if row["k"] == k]
    return [{"title": title, "drawing": layer_chart(metric, title, k, mine, tops[metric])} for metric, title in METRICS]


def _top(metric: str, rows: Sequence[Row]) -> float:
    """Upper end of the axis: 100 % for shares, the largest value for the output error."""
    if metric != "output_error":
        return 1.0
    values = [value for row in rows if (value := numbers.finite(row[metric])) is not None]
    return max([0.01, *values]) * 1.05


def layer_chart(metric: str, title: str, k: int, rows: Sequence[Row], top: float) -> Markup:
    """One line per selector over the layers; a layer without a value breaks the line."""
    layers = sorted({row["layer"] for row in rows})
    across = Scale(min(layers, default=0), max([1, *layers]), 36.0, WIDTH - 8.0)
    up = Scale(0.0, top, HEIGHT - 22.0, 8.0)
    parts = []
    for tick in ticks(0.0, top, 4):
        parts.append(element("line", x1=36, x2=WIDTH - 8, y1=up(tick), y2=up(tick), class_="grid"))
        parts.append(element("text", numbers.percent(tick, 0), x=31, y=up(tick) + 3.5, class_="tick end"))
    for tick in ticks(across.low, across.high, 5):
        if tick == int(tick):
            parts.append(element("text", str(int(tick)), x=across(tick), y=HEIGHT - 7, class_="tick middle"))
    by_selector: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_selector[row["selector"]].append(row)
    if metric == "mass" and "oracle" not in by_selector and rows:
        some = next(iter(by_selector.values()))
        parts += _line([(row["layer"], row["oracle_mass"]) for row in some], across, up, "curve bound", None)
    for name in sorted(by_selector, key=_series):
        series = _series(name)
        line = [(row["layer"], row[metric]) for row in by_selector[name]]
        parts += _line(line, across, up, f"curve s{series % 6} d{series % 4}", series, name)
    return drawing(WIDTH, HEIGHT, f"{title} by layer at k = {k}, in percent", *parts)


def _line(
    points: Sequence[tuple[int, object]], across: Scale, up: Scale, class_: str, series: int | None, name: str = ""
) -> list[Markup]:
    runs: list[list[str]] = [[]]
    last = None
    for layer, value in sorted(points, key=lambda point: point[0]):
        number = numbers.finite(value)
        if number is None:
            runs.append([])
            continue
        last = (across(layer), up(number))
        runs[-1].append(f"{last[0]:.1f},{last[1]:.1f}")
    titled = [element("title", name)] if name else []
    drawn = [element("polyline", *titled, points=" ".join(run), class_=class_) for run in runs if len(run) > 1]
    if series is not None and last is not None:
        drawn.append(marker(series, *last, 3.0, f"mark s{series % 6}"))
    return drawn


def _kept_apart(run: RunData) -> list[dict[str, Any]]:
    """Per variant and task: trivial rows, which are in no average, and the share of pairs in which sparsity acted."""
    trivial: dict[tuple[str, str], int] = defaultdict(int)
    trajectory = {}
    for sample in run.samples:
        if sample.trivial is not None:
            trivial[sample.variant, sample.task] += sample.trivial
            trajectory[sample.variant, sample.task] = sample.trajectory
    active = {(row["variant"], row["task"]): row for row in run.results["active_share"]}
    rows = []
    for variant in run.results["variants"]:
        for task in run.results["tasks"]:
            key = (variant, task)
            if key in trivial or key in active:
                share = active.get(key, {})
                rows.append(
                    {
                        "variant": variant,
                        "task": task,
                        "trajectory": trajectory.get(key) or numbers.NOT_MEASURED,
                        "trivial": numbers.count(trivial.get(key)),
                        "active": numbers.percent(share.get("mean")),
                        "n": numbers.count(share.get("n")),
                    }
                )
    return rows


def _links(comparison: Row | None) -> dict[str, Any]:
    """One block per variant and task: selector and k down, measure and queries across.

    undefined: blocks without any number, where all answers were right or all were wrong.
    """
    by_block: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in comparison.get("recall_link", []) if comparison else []:
        by_block[row["variant"], row["task"]].append(row)
    blocks, undefined = [], []
    for (variant, task), rows in by_block.items():
        if all(numbers.finite(row["point_biserial"]) is None for row in rows):
            undefined.append(f"{variant} on {task}")
            continue
        columns = list(dict.fromkeys((row.get("measure", "mass"), row.get("phase", "all")) for row in rows))
        cells = {(row["selector"], row["k"], row.get("measure", "mass"), row.get("phase", "all")): row for row in rows}
        lines = sorted({(row["selector"], row["k"]) for row in rows}, key=lambda line: (_series(line[0]), line[1]))
        blocks.append(
            {
                "variant": variant,
                "task": task,
                "columns": [f"{str(measure).replace('_', ' ')}, {phase}" for measure, phase in columns],
                "rows": [
                    {
                        "selector": selector,
                        "series": _series(selector),
                        "k": numbers.count(k),
                        "cells": [_correlation(cells.get((selector, k, *column))) for column in columns],
                    }
                    for selector, k in lines
                ],
            }
        )
    return {"blocks": blocks, "undefined": undefined}


def _correlation(row: Row | None) -> dict[str, str]:
    value = numbers.finite(row["point_biserial"]) if row else None
    return {
        "text": numbers.NOT_MEASURED if value is None else f"{value:+.2f}".replace("-", numbers.MINUS),
        "n": numbers.count(row["n"]) if row else numbers.NOT_MEASURED,
    }


def _series(selector: str) -> int:
    return SERIES.get(selector, len(SERIES))

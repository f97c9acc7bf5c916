"""The headline table, the other metrics and the sub-tables: estimates as rows with a small interval drawing."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness import numbers
from harness.report_parts.svg import Scale, drawing, element, marker
from harness.tables import significant_rows

Cell = Mapping[str, Any]
MAX_GROUP_TABLES = 40


def headline_blocks(results: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Per task its metric and one view per variant."""
    significant = significant_rows(comparison)
    blocks = []
    for task in results["tasks"]:
        cells = [cell for cell in _of_task(results, task) if cell["headline"] and not cell["group"]]
        if cells:
            rows = [cell_view(results, cell, significant) for cell in cells]
            blocks.append({"task": task, "metric": cells[0]["metric"], "rows": rows})
    return blocks


def other_metrics(results: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Metrics beside the headline, over whole tasks: pass@k and maj@k, the official number with its guesses, …"""
    significant = significant_rows(comparison)
    blocks = []
    for task in results["tasks"]:
        cells = [cell for cell in _of_task(results, task) if not cell["headline"] and not cell["group"]]
        for metric in dict.fromkeys(cell["metric"] for cell in cells):
            rows = [cell_view(results, cell, significant) for cell in cells if cell["metric"] == metric]
            blocks.append({"task": task, "metric": metric, "rows": rows})
    return blocks


def group_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Headline scores by one field (category, length, depth, …): a row per value, a column per variant."""
    tables = []
    for task in results["tasks"]:
        cells = [cell for cell in _of_task(results, task) if cell["headline"] and len(cell["group"]) == 1]
        for field in dict.fromkeys(next(iter(cell["group"])) for cell in cells):
            mine = [cell for cell in cells if field in cell["group"]]
            values = sorted({cell["group"][field] for cell in mine}, key=lambda value: (isinstance(value, str), value))
            rows = []
            for value in values:
                here = {cell["variant"]: cell for cell in mine if cell["group"][field] == value}
                views = [cell_view(results, here[v], set()) if v in here else None for v in results["variants"]]
                rows.append({"value": _value(field, value), "cells": views})
            tables.append({"task": task, "field": field, "rows": rows})
    return tables[:MAX_GROUP_TABLES]


def cell_view(results: Mapping[str, Any], cell: Cell, significant: set[tuple[str, str, str]]) -> dict[str, Any]:
    """One estimate in the words and the drawing that the page shows."""
    return {
        "variant": cell["variant"],
        "series": results["variants"].index(cell["variant"]),
        "mean": numbers.score(cell["metric"], cell["mean"]),
        "interval": numbers.score_interval(cell["metric"], cell["low"], cell["high"]),
        "interval_kind": cell["interval"],
        "stderr": numbers.NOT_MEASURED if cell["metric"] in numbers.UNITS else numbers.percent(cell["stderr"], 2),
        "n": numbers.count(cell["n"]),
        "clusters": numbers.count(cell["clusters"]),
        "repeats": numbers.count(cell["repeats"]),
        "unparsed": numbers.count(cell["unparsed"]),
        "truncated": numbers.count(cell["truncated"]),
        "errors": numbers.count(cell["errors"]),
        "stopped": numbers.count(cell["stopped"]),
        "length": numbers.count(cell["length"]),
        "reasoning_tokens": numbers.tokens(cell["reasoning_tokens_mean"]),
        "completion_tokens": numbers.tokens(cell["completion_tokens_mean"]),
        "prompt_tokens": numbers.tokens(cell["prompt_tokens_mean"]),
        "limit_lowered": cell["limit_lowered"],
        "significant": not cell["group"] and (cell["task"], cell["variant"], cell["metric"]) in significant,
        "drawing": interval_drawing(cell, results["variants"].index(cell["variant"])),
    }


def interval_drawing(cell: Cell, series: int) -> Markup:
    """Mean and 95 % interval on a track from 0 to 100 %; nothing for a metric that is no share."""
    if cell["metric"] in numbers.UNITS:
        return Markup("")
    scale = Scale(0.0, 1.0, 6.0, 134.0)
    mean, low, high = (numbers.finite(cell[key]) for key in ("mean", "low", "high"))
    parts = [element("line", x1=6, x2=134, y1=9, y2=9, class_="track")]
    parts += [element("line", x1=scale(t), x2=scale(t), y1=6, y2=12, class_="track") for t in (0.0, 0.5, 1.0)]
    if low is not None and high is not None:
        parts.append(element("line", x1=scale(low), x2=scale(high), y1=9, y2=9, class_=f"whisker s{series % 6}"))
    if mean is not None:
        parts.append(marker(series, scale(mean), 9.0, 4.2, f"mark s{series % 6}"))
    label = f"{numbers.percent(mean)} % {numbers.interval(low, high)} on a scale from 0 to 100 %"
    return drawing(140, 18, label, *parts, class_="inline")


def _of_task(results: Mapping[str, Any], task: str) -> Sequence[Cell]:
    order = {variant: place for place, variant in enumerate(results["variants"])}
    return sorted((cell for cell in results["cells"] if cell["task"] == task), key=lambda cell: order[cell["variant"]])


def _value(field: str, value: object) -> str:
    """A group's value without its field's name."""
    return numbers.group_label({field: value}).removeprefix(f"{field} ")

"""Needle heat maps: score by prompt length and needle depth, with Wilson bounds in every cell."""

from collections.abc import Mapping
from typing import Any

from harness import numbers

# cividis, made to look the same with and without red-green colour blindness (Nunez et al. 2018), five stops
_STOPS = ((0, 32, 77), (65, 77, 107), (124, 123, 120), (188, 175, 111), (255, 234, 70))


def needle_maps(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per task that has (length, depth) cells: lengths as columns, depths as rows, one map per variant."""
    maps = []
    for task in results["tasks"]:
        cells = {
            (cell["variant"], cell["group"]["length"], cell["group"]["depth"]): cell
            for cell in results["cells"]
            if cell["task"] == task and cell["headline"] and cell["group"].keys() == {"length", "depth"}
        }
        if not cells:
            continue
        lengths = sorted({length for _, length, _ in cells})
        depths = sorted({depth for _, _, depth in cells})
        variants = [variant for variant in results["variants"] if any(key[0] == variant for key in cells)]
        maps.append(
            {
                "task": task,
                "lengths": [numbers.count(length) for length in lengths],
                "maps": [
                    {
                        "variant": variant,
                        "series": results["variants"].index(variant),
                        "rows": [
                            {
                                "depth": f"{depth:.10g}",
                                "cells": [_view(cells.get((variant, length, depth))) for length in lengths],
                            }
                            for depth in depths
                        ],
                    }
                    for variant in variants
                ],
            }
        )
    return maps


def colour(share: float) -> str:
    """A share 0..1 as #rrggbb: dark blue is 0, yellow is 1, brightness rises evenly between."""
    place = min(1.0, max(0.0, share)) * (len(_STOPS) - 1)
    below = min(int(place), len(_STOPS) - 2)
    mixed = (round(a + (b - a) * (place - below)) for a, b in zip(_STOPS[below], _STOPS[below + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _ink(background: str) -> str:
    """Black or white, whichever contrasts more (WCAG relative luminance)."""
    channels = [int(background[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def _view(cell: Mapping[str, Any] | None) -> dict[str, str] | None:
    """What one cell shows; None where nothing was measured."""
    mean = numbers.finite(cell["mean"]) if cell else None
    if cell is None or mean is None:
        return None
    background = colour(mean)
    kind = "Wilson" if cell["interval"] == "wilson" else str(cell["interval"])
    bounds = numbers.interval(cell["low"], cell["high"])
    return {
        "mean": numbers.percent(mean).removesuffix(".0"),
        "low": numbers.percent(cell["low"], 0),
        "high": numbers.percent(cell["high"], 0),
        "title": f"{numbers.percent(mean)} %, 95 % {kind} {bounds}, n = {cell['n']}",
        "n": numbers.count(cell["n"]),
        "background": background,
        "ink": _ink(background),
    }

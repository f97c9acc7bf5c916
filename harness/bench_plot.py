"""Time, or a rate, against context as small panels in one SVG that stands alone: no style sheet, no script."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness.report_parts.svg import Scale, element, marker

COLUMNS, WIDTH, HEIGHT = 2, 470, 330
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 30, 104  # of a panel; below the axis stands the legend
LEGEND_LINE = 14
FAR = 50  # a floor this many times below its series is left out: it would flatten the panel
COLOURS = ("#1f5fbf", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#a16207")
PEERS = (("#444444", "7 3"), ("#777777", "3 2"), ("#999999", "8 2 2 2"), ("#777777", "12 4"))  # colour, dashes
Point = tuple[float, float]


def draw_panels(
    rows: Sequence[Mapping[str, Any]], unit: str = "ms", label: str = "time against context"
) -> Markup | None:
    """A panel for each `panel` of the rows, a line for each of its series; None where no measured row has a place.

    Both axes are logarithmic. Peers are dashed, the floor of each series is dotted. Designs that are compared have
    their place in the table alone: their lines would lie on one another.

    Args:
        rows: with "context", "series" and "value", or "ms" in its place.
        unit: of the values. label: for who cannot see the picture.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        drawn_as_line = "context" in row and "panel" in row and "design: " not in row.get("name", "")
        if ("ms" in row or "value" in row) and drawn_as_line:
            panels.setdefault(row["panel"], []).append(row)
    if not panels:
        return None
    width, height = COLUMNS * WIDTH, math.ceil(len(panels) / COLUMNS) * HEIGHT
    drawn = [
        element(
            "g",
            *_panel(title, found, unit),
            transform=f"translate({place % COLUMNS * WIDTH} {place // COLUMNS * HEIGHT})",
        )
        for place, (title, found) in enumerate(panels.items())
    ]
    return element(
        "svg",
        element("rect", width=width, height=height, fill="#ffffff"),
        *drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
        font_family="sans-serif",
        font_size=11,
    )


def _panel(title: str, rows: Sequence[Mapping[str, Any]], unit: str) -> Iterator[Markup]:
    lines, dashed, dotted = _series(rows)
    points = [point for line in (*lines.values(), *dashed.values(), *dotted.values()) for point in line]
    contexts = sorted({row["context"] for row in rows})
    across = Scale(math.log2(contexts[0]) - 0.2, math.log2(contexts[-1]) + 0.2, LEFT, WIDTH - RIGHT)
    low, high = (math.log10(pick(value for _, value in points)) for pick in (min, max))
    up = Scale(math.floor(low * 5 - 0.2) / 5, math.ceil(high * 5 + 0.2) / 5, HEIGHT - BOTTOM, TOP)
    yield element("text", title if unit == "ms" else f"{title}: {unit}", x=LEFT, y=18, font_weight="bold")
    for context in contexts:
        x = across(math.log2(context))
        yield element("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, stroke="#eeeeee")
        yield element("text", f"{context / 1024:g}k", x=x, y=HEIGHT - BOTTOM + 14, text_anchor="middle")
    for value in _round_values(up.low, up.high):
        y = up(math.log10(value))
        yield element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, stroke="#dddddd")
        label = f"{value:,g}" if unit != "ms" else f"{1000 * value:g} µs" if up.high < 0 else f"{value:,g} ms"
        yield element("text", label, x=LEFT - 4, y=y + 4, text_anchor="end")
    for name, line in dotted.items():
        colour = COLOURS[list(lines).index(name) % len(COLOURS)]
        yield _polyline(line, across, up, stroke=colour, stroke_width=1.0, stroke_dasharray="1 3")
    legend: list[tuple[str, str, str | None]] = []
    for place, (name, line) in enumerate(dashed.items()):
        colour, dashes = PEERS[place % len(PEERS)]
        yield _polyline(line, across, up, stroke=colour, stroke_width=1.4, stroke_dasharray=dashes)
        legend.append((name, colour, dashes))
    for place, (name, line) in enumerate(lines.items()):
        colour = COLOURS[place % len(COLOURS)]
        yield _polyline(line, across, up, stroke=colour, stroke_width=1.8)
        marks = [marker(place, across(math.log2(n)), up(math.log10(ms))) for n, ms in line]
        yield element("g", *marks, fill=colour)
        legend.insert(place, (name, colour, None))
    for place, (name, colour, dash) in enumerate(legend):
        y = HEIGHT - BOTTOM + 30 + place // 2 * LEGEND_LINE
        x = LEFT - 40 + place % 2 * (WIDTH // 2)
        yield element("line", x1=x, x2=x + 18, y1=y - 4, y2=y - 4, stroke=colour, stroke_width=2, stroke_dasharray=dash)
        yield element("text", name, x=x + 22, y=y, font_size=9)


def _series(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, list[Point]], dict[str, list[Point]], dict[str, list[Point]]]:
    """Ours by series, peers by name (the same peer of two series is drawn once), floors by series; by context."""
    lines: dict[str, list[Point]] = {}
    dashed: dict[str, dict[float, float]] = {}
    dotted: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        lines.setdefault(row["series"], []).append((row["context"], row["ms"] if "ms" in row else row["value"]))
        if row.get("floor_ms", 0.0) * FAR > row.get("ms", 0.0):
            dotted.setdefault(row["series"], []).append((row["context"], row["floor_ms"]))
        for peer, ms in row.get("peer_ms", {}).items():
            dashed.setdefault(peer, {})[row["context"]] = ms
    return lines, {peer: list(found.items()) for peer, found in dashed.items()}, dotted


def _round_values(low: float, high: float) -> Iterator[float]:
    """1, 2 and 5 times each power of ten between 10^low and 10^high."""
    for power in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5):
            if low <= math.log10(factor) + power <= high:
                yield factor * 10.0**power


def _polyline(line: Sequence[Point], across: Scale, up: Scale, **style: object) -> Markup:
    at = " ".join(f"{across(math.log2(n)):.1f},{up(math.log10(ms)):.1f}" for n, ms in line)
    return element("polyline", points=at, fill="none", **style)

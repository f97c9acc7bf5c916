"""How long the answers were: one box per task and variant, with every sample as a dot where there are few."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harness import numbers
from harness.report_parts.run_data import RunData, Sample
from harness.report_parts.svg import Scale, drawing, element, ticks

WIDTH = 420
MAX_DOTS = 120


def token_blocks(run: RunData) -> list[dict[str, Any]]:
    """Per task and kind of token (completion, reasoning): one row per variant on a shared axis.

    Reasoning appears only for tasks where some variant has a thinking marker; scored choices are not answers.
    """
    by_task: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in run.samples:
        if sample.error is None and sample.finish_reason != "scored":
            by_task[sample.task][sample.variant].append(sample)
    blocks = []
    for task in run.results["tasks"]:
        for kind in ("completion", "reasoning"):
            values = {variant: _values(by_task[task][variant], kind) for variant in run.results["variants"]}
            if any(values.values()):
                blocks.append({"task": task, "kind": kind, **_block(values, run.results["variants"])})
    return blocks


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between order statistics; `values` are sorted and not empty."""
    place = share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def _values(samples: Sequence[Sample], kind: str) -> list[tuple[float, bool]]:
    """(tokens, cut off by the limit) of every sample that has this kind of token, sorted."""
    pairs = []
    for sample in samples:
        spent = sample.completion_tokens if kind == "completion" else sample.reasoning_tokens
        if spent is not None:
            pairs.append((float(spent), sample.finish_reason == "length"))
    return sorted(pairs)


def _block(values: Mapping[str, list[tuple[float, bool]]], variants: Sequence[str]) -> dict[str, Any]:
    everything = [value for pairs in values.values() for value, _ in pairs]
    axis = _Axis(min(everything), max(everything))
    rows = []
    for series, variant in enumerate(variants):
        pairs = values[variant]
        spent = [value for value, _ in pairs]
        rows.append(
            {
                "variant": variant,
                "series": series,
                "n": numbers.count(len(pairs)),
                "median": numbers.tokens(quantile(spent, 0.5) if spent else None),
                "mean": numbers.tokens(math.fsum(spent) / len(spent) if spent else None),
                "p95": numbers.tokens(quantile(spent, 0.95) if spent else None),
                "largest": numbers.count(spent[-1] if spent else None),
                "truncated": numbers.count(sum(cut for _, cut in pairs)),
                "drawing": _box(pairs, axis, series, variant) if spent else None,
            }
        )
    return {"rows": rows, "axis": axis.drawing(), "logarithmic": axis.logarithmic}


class _Axis:
    """Tokens to pixels; logarithmic where the data span more than a factor of 20."""

    def __init__(self, low: float, high: float) -> None:
        self.logarithmic = high > 20 * max(1.0, low)
        start, end = self._inner(max(1.0, low) if self.logarithmic else 0.0), self._inner(high)
        self.scale = Scale(start, max(end, start + (0.5 if self.logarithmic else 1.0)), 10.0, WIDTH - 14.0)

    def _inner(self, value: float) -> float:
        return math.log10(max(1.0, value)) if self.logarithmic else value

    def __call__(self, value: float) -> float:
        return self.scale(self._inner(value))

    def drawing(self) -> Markup:
        if self.logarithmic:
            powers = range(math.floor(self.scale.low), math.ceil(self.scale.high) + 1)
            steps = (1, 2, 5) if self.scale.high - self.scale.low < 2.5 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
            values = [value for value in values if self.scale.low - 1e-9 <= math.log10(value) <= self.scale.high + 1e-9]
        else:
            values = ticks(self.scale.low, self.scale.high, 5)
        parts = []
        for value in values:
            parts.append(element("line", x1=self(value), x2=self(value), y1=0, y2=4, class_="axis"))
            parts.append(element("text", numbers.count(value), x=self(value), y=16, class_="tick middle"))
        return drawing(WIDTH, 20, "axis in tokens", *parts, class_="inline")


def _box(pairs: Sequence[tuple[float, bool]], axis: _Axis, series: int, variant: str) -> Markup:
    spent = [value for value, _ in pairs]
    p5, p25, p50, p75, p95 = (quantile(spent, share) for share in (0.05, 0.25, 0.5, 0.75, 0.95))
    colour = f"s{series % 6}"
    parts = [element("line", x1=axis(p5), x2=axis(p95), y1=11, y2=11, class_=f"whisker thin {colour}")]
    width = max(1.5, axis(p75) - axis(p25))
    parts.append(element("rect", x=axis(p25), y=4, width=width, height=14, rx=2, class_=f"box {colour}"))
    parts.append(element("line", x1=axis(p50), x2=axis(p50), y1=2, y2=20, class_=f"median {colour}"))
    step = max(1, math.ceil(len(pairs) / MAX_DOTS))
    for place, (value, cut) in enumerate(pairs[::step]):
        y = 26.0 + (place * 5 % 8)  # spread below the box so that equal lengths stay countable
        parts.append(element("circle", cx=axis(value), cy=y, r=2, class_=f"{'hollow' if cut else 'dot'} {colour}"))
    label = (
        f"{variant}: median {numbers.tokens(p50)}, middle half {numbers.tokens(p25)} to {numbers.tokens(p75)} tokens"
    )
    return drawing(WIDTH, 38, label, *parts, class_="inline")

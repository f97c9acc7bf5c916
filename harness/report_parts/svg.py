"""Small charts as inline SVG: an element builder that escapes, scales, and round tick values."""

import dataclasses
import math

from markupsafe import Markup, escape

from harness.report_parts.text import visible


def element(tag: str, /, *children: object, **attributes: object) -> Markup:
    """An SVG element; children and attribute values are escaped unless they are elements themselves.

    Attribute names are written with underscores (`stroke_width`; `class_` for class); None leaves one out.
    """
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(child if isinstance(child, Markup) else str(escape(visible(child))) for child in children)
    return Markup(f"<{tag}{named}>{inner}</{tag}>" if inner else f"<{tag}{named}/>")


def drawing(width: int, height: int, title: str, *children: Markup, class_: str = "chart") -> Markup:
    """A whole chart with a title that screen readers speak; it keeps its shape and shrinks with its box."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        class_=class_,
        role="img",
        aria_label=title,
    )


def _attribute(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else visible(value)


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """Straight map from data [low, high] to pixels [start, end]; values outside are held at the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) inside [low, high], roughly `about` of them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if raw <= power * factor * 1.0001)
    return [step * place for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def marker(kind: int, x: float, y: float, size: float = 4.0, class_: str = "") -> Markup:
    """A filled mark whose shape follows the series (circle, square, triangle, diamond), so colour is never alone."""
    if kind % 4 == 0:
        return element("circle", cx=x, cy=y, r=size, class_=class_)
    if kind % 4 == 1:
        return element("rect", x=x - size * 0.9, y=y - size * 0.9, width=size * 1.8, height=size * 1.8, class_=class_)
    corners = (
        [(0.0, -1.2), (1.1, 0.9), (-1.1, 0.9)] if kind % 4 == 2 else [(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)]
    )
    shape = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return element("polygon", points=shape, class_=class_)

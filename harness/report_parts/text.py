"""Model text made safe to look at: nothing invisible stays invisible, nothing long stays long."""

import dataclasses
import re

_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"]
# directional overrides, isolates and marks: they could reorder the text around them
_DIRECTIONS = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
_VISIBLE = {code: f"⟨U+{code:04X}⟩" for code in (*_CONTROLS, *_DIRECTIONS)}
_SURROGATES = re.compile("[\ud800-\udfff]")


def visible(text: object) -> str:
    """The text with control and direction characters named (⟨U+202E⟩) and lone surrogates as U+FFFD.

    Line feeds and tabs stay; a carriage return before a line feed goes. The outcome can always be encoded as UTF-8.
    """
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", str(text).replace("\r\n", "\n")).translate(_VISIBLE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """A text in pieces: head, a middle that opens on demand, tail.

    A text that is short enough is all head. hidden: characters between head and tail, in `middle` or left out of it.
    """

    head: str
    middle: str = ""
    tail: str = ""
    hidden: int = 0


def excerpt(text: object, head: int = 700, tail: int = 400, middle: int = 2400) -> Excerpt:
    """Cut a text into an Excerpt of at most head + middle + tail characters; a little over is shown whole.

    When even the middle is too long its own middle is left out, marked by an ellipsis on a line of its own.
    """
    shown = visible(text)
    if len(shown) <= head + tail + 200:
        return Excerpt(head=shown)
    inner = shown[head:-tail]
    left_out = max(0, len(inner) - middle)
    if left_out:
        inner = (
            f"{inner[: middle // 2]}\n… {left_out:,} more characters, in the run's journal …\n{inner[-(middle // 2) :]}"
        )
    return Excerpt(head=shown[:head], middle=inner, tail=shown[-tail:], hidden=len(shown) - head - tail)

"""What the page is built of: visible text, excerpts, charts, colours, quantiles, rows of settings."""

import itertools
import re

import pytest
from fixtures.published_run import HOSTILE

from harness.report_parts import comparison_section, needle_section, svg, text, token_section
from harness.report_parts.manifest_section import flat_rows


@pytest.mark.parametrize("raw", HOSTILE)
def test_visible_text_can_be_encoded_and_has_no_hidden_signs(raw: str) -> None:
    shown = text.visible(raw)
    shown.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)


def test_visible_text_keeps_what_people_write() -> None:
    plain = "tab\tline\nשלום 🧪 e\u0301 <b>"  # noqa: RUF001
    assert text.visible(plain) == plain
    assert text.visible("a\r\nb\rc") == "a\nb⟨U+000D⟩c"


@pytest.mark.parametrize("length", [0, 1, 1300, 1301, 3499, 3500, 3501, 100_000])
def test_excerpts_lose_nothing_silently(length: int) -> None:
    raw = "".join(chr(97 + i % 26) for i in range(length))
    piece = text.excerpt(raw, head=700, tail=400, middle=2400)
    assert len(piece.head) + piece.hidden + len(piece.tail) == length
    assert raw.startswith(piece.head) and raw.endswith(piece.tail)
    if piece.hidden <= 2400:
        assert piece.head + piece.middle + piece.tail == raw
    else:
        assert f"… {piece.hidden - 2400:,} more characters" in piece.middle and len(piece.middle) < 2500


def test_svg_text_and_attributes_are_escaped() -> None:
    drawn = str(svg.element("text", HOSTILE[1], class_=HOSTILE[2]))
    assert "<img" not in drawn and "<svg" not in drawn and "</script" not in drawn
    assert drawn.count('"') == 2


@pytest.mark.parametrize(("low", "high"), [(-0.7, 0.05), (0.0, 1.0), (3.0, 4096.0), (-0.02, 0.02)])
def test_ticks_are_round_ascending_and_inside(low: float, high: float) -> None:
    values = svg.ticks(low, high)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(values)}
    assert 2 <= len(values) <= 9 and len(steps) == 1
    assert low - 1e-9 <= values[0] and values[-1] <= high + 1e-9
    assert f"{steps.pop():.0e}"[0] in "125"


def test_heat_map_colours_grow_brighter_with_the_score() -> None:
    def luminance(share: float) -> float:
        code = needle_section.colour(share)
        return sum(w * int(code[i : i + 2], 16) for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))

    values = [luminance(i / 20) for i in range(21)]
    assert values == sorted(values) and values[-1] > 6 * values[0]
    assert needle_section.colour(0.0) == "#00204d" and needle_section.colour(1.0) == "#ffea46"


def test_quantiles_are_linear_between_order_statistics() -> None:
    assert token_section.quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert token_section.quantile([7.0], 0.95) == 7.0
    assert token_section.quantile([0.0, 10.0], 0.25) == 2.5


def test_manifest_rows_name_the_path_and_bound_long_values() -> None:
    rows = flat_rows({"a": {"b": [1, 2], "c": None}, "d": [{"e": True}], "f": "x" * 5000, "g": list(range(100))})
    assert rows[:3] == [("a.b", "1, 2"), ("a.c", "null"), ("d[0].e", "true")]
    assert rows[3][1].endswith("… (5,000 characters)") and rows[4][1].endswith("… (100 in all)")


def test_an_overview_has_a_cell_for_each_task_and_variant_also_where_nothing_was_compared() -> None:
    rows = [
        {"task": "aime", "variant": "sparse"},
        {"task": "aime", "variant": "recency"},
        {"task": "niah", "variant": "recency"},
    ]
    made = comparison_section.overview(rows)
    assert made["variants"] == ["sparse", "recency"]
    assert made["tasks"] == [("aime", rows[:2]), ("niah", [None, rows[2]])]

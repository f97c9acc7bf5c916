import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.published_run import HOSTILE, VARIANTS, build

from harness.report import render_report, write_report
from harness.report_parts import comparison_section, needle_section, svg, text, token_section
from harness.report_parts.manifest_section import flat_rows
from harness.report_parts.run_data import read_run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_report(read_run(build(tmp_path_factory.mktemp("nice"), layers=4)))


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build(tmp_path_factory.mktemp("hostile"), hostile=True, layers=30))


def test_verdict_sentences_come_before_every_table(page: str) -> None:
    sentence = "recency scores -62.2 points against dense on niah_single_2"
    assert 0 < page.index(sentence) < page.index("<table")


def test_page_has_every_section(page: str) -> None:
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == [
        "verdicts", "scores", "differences", "needles", "recall", "tokens", "disagreements", "errors", "made",
    ]  # fmt: skip
    assert set(re.findall(r'href="#(\w+)"', page)) <= {*sections, "content"}


def test_needle_cells_show_wilson_bounds(page: str) -> None:
    # 7 of 8 found: Wilson gives 52.9 to 97.8, worked out by hand with z = 1.96
    assert 'title="87.5 %, 95 % Wilson [52.9, 97.8], n = 8"' in page
    assert "<b>87.5</b><small>53–98" in page  # noqa: RUF001


def test_recall_says_what_the_oracle_bounds_and_what_was_kept_apart(page: str) -> None:
    assert "It bounds the mass that a selector can keep; it does not bound the accuracy." in page
    assert "dense trajectory of dense" in page and "sparse trajectory of recency" in page
    assert '<td class="num">4,320</td>' in page  # 36 trivial rows in each of 120 samples


def test_what_was_not_measured_is_a_dash_that_says_so(page: str) -> None:
    assert '<span class="none" title="not measured">–</span>' in page  # noqa: RUF001
    assert ">None<" not in page and ">nan<" not in page


def test_only_significant_scores_are_bold(page: str) -> None:
    assert re.findall(r'<td class="num strong"[^>]*>([^<]+)<', page)[:1] == ["34.5"]
    assert len(re.findall(r'class="num strong"', page)) == 2  # the score and its difference


def test_scored_choices_are_no_token_distribution(page: str) -> None:
    tokens = page[page.index('id="tokens"') : page.index('id="disagreements"')]
    assert "arc_easy" not in tokens
    assert tokens.count("reasoning tokens") >= 1 and "mmlu_pro" in tokens


def test_journal_lines_of_older_settings_are_passed_over(page: str) -> None:
    assert "stale" not in page
    assert "732 samples" in page  # 244 docs and repeats x 3 variants; cut and stale lines do not count


@pytest.mark.parametrize("name", ["lm_eval/arc_easy", "lm_eval__arc_easy"])
def test_docs_of_a_task_with_a_slash_are_found(tmp_path: Path, name: str) -> None:
    folder = build(tmp_path, layers=2)
    (folder / "docs" / "lm_eval" / "arc_easy.jsonl").rename(folder / "docs" / "moved")
    (folder / "docs" / name).parent.mkdir(exist_ok=True)
    (folder / "docs" / "moved").rename(folder / "docs" / f"{name}.jsonl")
    assert any(task == "lm_eval/arc_easy" for task, _ in read_run(folder).docs)


@pytest.mark.parametrize(
    ("verdict", "difference", "sign", "mood"),
    [
        ("DIFFERENT", -0.1, "≠", "bad"),
        ("DIFFERENT", 0.1, ">", "good"),
        ("EQUIVALENT", 0.0, "=", "good"),
        ("INCONCLUSIVE", None, "?", "neutral"),
        ("SATURATED", 0.0, "○", "neutral"),
    ],
)
def test_verdicts_carry_a_sign_beside_their_colour(
    verdict: str, difference: float | None, sign: str, mood: str
) -> None:
    assert comparison_section.tone(verdict, difference) == (sign, mood)


def test_errors_are_listed_with_their_reason(page: str) -> None:
    assert page[page.index('id="errors"') :].count("CUDA out of memory") == 2


def test_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = read_run(build(tmp_path, layers=2))
    assert render_report(run) == render_report(run)


def test_page_is_self_contained_and_below_a_megabyte(hostile_file: Path) -> None:
    html = hostile_file.read_text(encoding="utf-8")
    assert hostile_file.stat().st_size < 1_000_000
    assert not re.findall(r"<(?:link|iframe|object|embed|img|base)\b", html)
    assert not re.findall(r"<[^>]+\s(?:src|srcset|action)=", html)
    assert "default-src 'none'" in html.replace("&#39;", "'")


def test_hostile_text_is_only_text(hostile_file: Path) -> None:
    html = hostile_file.read_text(encoding="utf-8")
    assert html.count("<script>") == html.count("</script>") == 1
    assert "&lt;script&gt;window.hacked" in html and "&lt;/script&gt;&lt;/style&gt;" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", html)
    assert "⟨U+202E⟩" in html and "⟨U+0000⟩" in html
    assert "{{ 7 * 7 }}" in html and "&amp;lt;b&amp;gt;" in html


def test_many_recall_blocks_keep_the_page_small(tmp_path: Path) -> None:
    folder = build(tmp_path, layers=60)
    results = json.loads((folder / "results.json").read_text())
    tasks = [f"niah_{i}" for i in range(12)]
    results["recall"] = [
        {**row, "task": task} for task in tasks for row in results["recall"] if row["task"] != "mmlu_pro"
    ]
    (folder / "results.json").write_text(json.dumps({**results, "tasks": results["tasks"] + tasks}))
    html = render_report(read_run(folder))
    assert len(html.encode()) < 1_000_000
    said = re.search(r"(\d+) blocks come without charts and (\d+) were left out; recall.csv has every number", html)
    assert said
    assert int(said[2]) + html.count('<span class="trajectory">') == 12 * 6


def test_many_disagreements_are_cut_by_size_and_taken_from_every_task(tmp_path: Path) -> None:
    folder = build(tmp_path, samples=60, hostile=True, layers=2)
    html = render_report(read_run(folder))
    found = re.search(
        r"([\d,]+) samples were scored differently by at least two variants; (\d+) of them are here", html
    )
    assert found
    assert int(found[2]) < int(found[1].replace(",", ""))
    assert len(html.encode()) < 1_000_000
    assert set(re.findall(r'<details class="sample" data-task="([^"]+)"', html)) >= {
        "niah_single_2",
        "lm_eval/arc_easy",
    }


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


def test_a_failed_page_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path, layers=2)
    path = write_report(folder)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> int:
        raise OSError("disk")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk"):
        write_report(folder)
    assert path.read_bytes() == before and not list(folder.glob(".report*"))


# The page in a real browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    usual = Path("/usr/bin/chromium")
    path = str(usual) if usual.exists() else shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium: neither /usr/bin/chromium nor `chromium` on the PATH")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """An open page and everything that went wrong or over the wire in it."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light", script: bool = True) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: self.trouble.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_from_disk_quietly_and_fits(browser: Any, hostile_file: Path, width: int, scheme: str) -> None:
    with Visit(browser, hostile_file, width, scheme) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        visit.page.wait_for_timeout(100)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        assert visit.requests == [hostile_file.as_uri()]
        assert visit.trouble == []
        assert visit.page.evaluate("window.hacked") is None
        assert visit.page.title() == "smollm2: dsa-eval report"
        dark = visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
        assert dark == (scheme == "dark")


def test_only_scroll_boxes_and_text_are_wider_than_a_phone(browser: Any, hostile_file: Path) -> None:
    with Visit(browser, hostile_file, 400) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        outside = visit.page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('.unseen') &&"
            " e.getBoundingClientRect().right > 401).map(e => e.outerHTML.slice(0, 120))"
        )
        assert outside == []


def test_no_element_came_out_of_hostile_text(browser: Any, hostile_file: Path) -> None:
    with Visit(browser, hostile_file, 1200) as visit:
        assert visit.page.evaluate("document.scripts.length") == 1
        assert visit.page.evaluate("document.querySelectorAll('img, iframe, object, embed, form, base').length") == 0
        handlers = (
            "[...document.querySelectorAll('*')].filter(e => e.getAttributeNames().some(n => n.startsWith('on')))"
        )
        assert visit.page.evaluate(f"{handlers}.length") == 0
        shown = visit.page.locator(".target .text").all_text_contents()
        assert any(HOSTILE[0] in target for target in shown)


def test_policy_stops_script_that_was_not_ours(browser: Any, hostile_file: Path) -> None:
    with Visit(browser, hostile_file, 1200) as visit:
        visit.page.evaluate(
            "() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
            " document.body.append(s);"
            " const d = document.createElement('div'); d.innerHTML = '<img src=x onerror=\"window.hacked = 2\">';"
            " document.body.append(d); }"
        )
        visit.page.wait_for_timeout(100)
        assert visit.page.evaluate("window.hacked") is None
        assert any("Content Security Policy" in line for line in visit.trouble)


def test_samples_unfold_and_are_filtered_from_the_keyboard(browser: Any, hostile_file: Path) -> None:
    with Visit(browser, hostile_file, 1200) as visit:
        samples = visit.page.locator("details.sample")
        second = samples.nth(1)
        assert second.get_attribute("open") is None
        second.locator("> summary").focus()
        visit.page.keyboard.press("Enter")
        assert second.get_attribute("open") is not None
        assert second.locator(".column").count() == len(VARIANTS)
        visit.page.get_by_role("button", name="Close all").press("Enter")
        assert visit.page.locator("details.sample[open]").count() == 0
        total = samples.count()
        visit.page.locator("#by-task").select_option("lm_eval/arc_easy")
        shown = visit.page.locator("details.sample:visible").count()
        assert 0 < shown < total
        assert visit.page.locator("#shown-count").text_content() == f"{shown} shown"
        visit.page.get_by_role("button", name="Open all").press("Enter")
        assert visit.page.locator("details.sample[open]").count() == shown


def test_long_texts_show_head_and_tail_and_open_in_place(browser: Any, hostile_file: Path) -> None:
    with Visit(browser, hostile_file, 400) as visit:
        more = visit.page.locator("details.more").filter(has_text="99,").first
        visit.page.evaluate("document.querySelectorAll('details.sample').forEach(d => d.open = true)")
        closed = more.bounding_box()
        more.locator("summary").click()
        opened = more.bounding_box()
        assert closed and opened and opened["height"] > 3 * closed["height"] and opened["width"] <= 400
        assert "more characters, in the run's journal" in (more.text_content() or "")


def test_page_reads_without_script(browser: Any, hostile_file: Path) -> None:
    with Visit(browser, hostile_file, 1200, script=False) as visit:
        assert visit.page.locator("#verdicts .card").count() == 10
        assert not visit.page.locator(".tools").is_visible()
        visit.page.locator("details.sample > summary").nth(1).click()
        assert visit.page.locator("details.sample").nth(1).locator(".columns").is_visible()


def test_every_scroll_box_is_reached_by_keyboard_and_named(browser: Any, hostile_file: Path) -> None:
    with Visit(browser, hostile_file, 400) as visit:
        boxes = visit.page.locator(".scroll")
        assert boxes.count() > 10
        wrong = visit.page.locator(".scroll:not([tabindex='0'][aria-label][role='region'])")
        assert wrong.count() == 0
        unnamed = visit.page.locator("svg:not([aria-label]):not([aria-hidden])")
        assert unnamed.count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser: Any, hostile_file: Path, scheme: str) -> None:
    with Visit(browser, hostile_file, 1200, scheme) as visit:
        worst = visit.page.evaluate(CONTRAST)
        assert worst["ratio"] >= 4.5, worst


def test_paper_takes_every_table_whole(browser: Any, hostile_file: Path) -> None:
    width = 1030  # A4 landscape less margins, in CSS pixels
    with Visit(browser, hostile_file, width) as visit:
        visit.page.emulate_media(media="print")
        visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert visit.page.locator("details.fold:not([open])").count() == 0
        wide = "[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > innerWidth + 1)"
        assert visit.page.evaluate(f"{wide}.map(t => t.closest('section').id + t.innerText.slice(0, 80))") == []


CONTRAST = """() => {
  const channels = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => {
    const f = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  let worst = { ratio: 99 };
  const texts = "p, th, td, summary, h2, h3, .verdict, .text, small, .series, .quiet, label";
  for (const e of document.querySelectorAll(texts)) {
    if (!e.textContent.trim() || e.closest(".gap")) continue;
    const [a, b] = [luminance(channels(getComputedStyle(e).color)), luminance(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst.ratio) worst = { ratio, text: e.textContent.slice(0, 40), tag: e.className || e.tagName };
  }
  return worst;
}"""

"""The page in a real browser: quiet, safe, readable by keyboard, on a phone and on paper."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.published_run import HOSTILE, VARIANTS, build

from harness.report import write_report


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build(tmp_path_factory.mktemp("hostile"), hostile=True, layers=30))


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

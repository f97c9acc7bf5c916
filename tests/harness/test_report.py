"""The page as a file: every section is there, says what it must, stays small, and text in it stays text."""

import json
import re
from pathlib import Path

import pytest
from fixtures.published_run import build

from harness.report import render_report, write_report
from harness.report_parts import comparison_section
from harness.report_parts.run_data import read_run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_report(read_run(build(tmp_path_factory.mktemp("nice"), layers=4)))


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build(tmp_path_factory.mktemp("hostile"), hostile=True, layers=30))


def test_verdict_sentences_come_before_every_table_but_their_own(page: str) -> None:
    sentence = "recency scores -62.2 points against dense on niah_single_2"
    tables = re.findall(r'<table class="(\w+)"', page[: page.index(sentence)])
    assert tables == ["overview"]


def test_many_verdicts_stand_in_one_table_of_signs_and_differences(page: str) -> None:
    table = page[page.index('<table class="overview"') : page.index("</table>")]
    assert "−62.2" in table and ">≠<" in table and "DIFFERENT" in table  # noqa: RUF001
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table, re.DOTALL)
    variants = table.count('<th scope="col">') - 1
    assert rows and all(cells.count("<td>") == variants for _, cells in rows)


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
    assert int(said[2]) + html.count(' queries <span class="trajectory">') == 12 * 6


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

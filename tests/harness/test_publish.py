import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from fixtures.published_run import TASKS, VARIANTS, build

import harness.publish
from harness.errors import HarnessError
from harness.publish import publish

STAMP = "results_2026-11-21T23-40-11-00-00.json"
FILES = {
    "README.md", "cells.csv", "comparison.csv", "recall.csv", "report.html", "table.csv", "table.json", "table.tex",
    *(f"lm_eval/{variant}/{STAMP}" for variant in VARIANTS),
}  # fmt: skip


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return build(tmp_path / "runs" / "smollm2-3f9c51d07a", layers=2)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_publication_holds_every_file_and_names_them(run_folder: Path, tmp_path: Path) -> None:
    written = publish(run_folder, tmp_path / "results")
    assert {str(path.relative_to(tmp_path / "results" / "smollm2")) for path in written} == FILES
    assert all(path.stat().st_size > 0 for path in written)
    assert set(_tree(tmp_path / "results")) == {f"smollm2/{name}" for name in FILES}


def test_publishing_twice_gives_the_same_bytes(run_folder: Path, tmp_path: Path) -> None:
    publish(run_folder, tmp_path / "results")
    first = _tree(tmp_path / "results")
    publish(run_folder, tmp_path / "results")
    assert _tree(tmp_path / "results") == first


def test_readme_says_verdicts_tables_settings_and_how_it_was_made(run_folder: Path, tmp_path: Path) -> None:
    publish(run_folder, tmp_path)
    text = (tmp_path / "smollm2" / "README.md").read_text()
    assert text.index("## Verdicts") < text.index("## Scores") < text.index("## Paired differences")
    assert text.index("Difference from `dense` in points: = equivalent") < text.index("<summary>In words</summary>")
    assert "- **DIFFERENT.** oracle scores -5.0 points against dense on niah_single_2" in text
    assert "| niah_single_2 | recency | **34.5** | [26.5, 43.4] | 119 |" in text
    assert "not the accuracy. 26,352 rows of queries with n ≤ k" in text  # 36 in each of 244 samples x 3 variants
    assert '"selector": "recency"' in text
    for fact in ("3f9c51d07a", "a8ecce085cb2", "cpu: 2 cores", "| versions.torch | 2.11.0 |"):
        assert fact in text


def test_comparison_and_recall_tables_carry_the_numbers(run_folder: Path, tmp_path: Path) -> None:
    publish(run_folder, tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "smollm2" / "comparison.csv").read_text(), newline="")))
    first = json.loads((run_folder / "comparison.json").read_text())["rows"][0]
    assert float(rows[0]["difference"]) == first["difference"]
    assert rows[0]["verdict"] == first["verdict"]
    recall = list(csv.DictReader(io.StringIO((tmp_path / "smollm2" / "recall.csv").read_text(), newline="")))
    assert len(recall) == len(json.loads((run_folder / "results.json").read_text())["recall"])


def test_a_run_without_comparison_or_recall_is_published_without_them(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "comparison.json").unlink()
    results = json.loads((run_folder / "results.json").read_text())
    (run_folder / "results.json").write_text(json.dumps({**results, "recall": [], "active_share": []}))
    written = {path.name for path in publish(run_folder, tmp_path)}
    assert "report.html" in written
    assert not written & {"comparison.csv", "recall.csv"}
    assert "Verdicts" not in (tmp_path / "smollm2" / "report.html").read_text()


def test_a_task_that_nobody_answered_is_published_as_not_measured(run_folder: Path, tmp_path: Path) -> None:
    results = json.loads((run_folder / "results.json").read_text())
    nothing = dict.fromkeys(
        ("mean", "stderr", "low", "high", "interval", "completion_tokens_mean", "prompt_tokens_mean")
    )
    for cell in results["cells"]:
        if cell["task"] == "aime25":
            cell.update(nothing, n=0, clusters=0)
    comparison = json.loads((run_folder / "comparison.json").read_text())
    unknown = ("difference", "low", "high", "stderr", "p", "holm_p", "tost_p", "mean_variant", "mean_baseline")
    for row in comparison["rows"]:
        if row["task"] == "aime25":
            row.update(dict.fromkeys(unknown), n=0, clusters=0, verdict="INCONCLUSIVE")
    (run_folder / "results.json").write_text(json.dumps(results))
    (run_folder / "comparison.json").write_text(json.dumps(comparison))
    publish(run_folder, tmp_path)
    assert "| aime25 | dense | – | – | 0 |" in (tmp_path / "smollm2" / "README.md").read_text()  # noqa: RUF001
    made = json.loads((tmp_path / "smollm2" / "lm_eval" / "dense" / STAMP).read_text())
    assert set(made["results"]) == set(TASKS) - {"aime25"}


@pytest.mark.parametrize("broken", ["readme", "render_report", "lm_eval_results"])
def test_a_failure_while_making_the_files_leaves_nothing(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("half-way")

    monkeypatch.setattr(harness.publish, broken, fail)
    with pytest.raises(RuntimeError, match="half-way"):
        publish(run_folder, tmp_path / "results")
    assert not (tmp_path / "results").exists() or not _tree(tmp_path / "results")


def test_a_failure_while_writing_keeps_the_earlier_publication(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run_folder, tmp_path / "results")
    before = _tree(tmp_path / "results")
    write, calls = Path.write_bytes, []

    def fail_at_third(path: Path, data: bytes) -> int:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail_at_third)
    with pytest.raises(HarnessError, match="smollm2: No space left on device; nothing was published"):
        publish(run_folder, tmp_path / "results")
    assert len(calls) == 3
    assert _tree(tmp_path / "results") == before


def test_a_failure_while_swapping_puts_the_earlier_publication_back(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run_folder, tmp_path / "results")
    before = _tree(tmp_path / "results")
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError("interrupted")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(HarnessError, match="interrupted; nothing was published"):
        publish(run_folder, tmp_path / "results")
    assert _tree(tmp_path / "results") == before


def test_files_of_others_are_never_lost(run_folder: Path, tmp_path: Path) -> None:
    publish(run_folder, tmp_path)
    (tmp_path / "smollm2" / "notes.txt").write_text("mine")
    with pytest.raises(HarnessError, match=r"holds 1 files that publish does not write, first 'notes\.txt'"):
        publish(run_folder, tmp_path)
    assert (tmp_path / "smollm2" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../elsewhere", "", ".", "a/b"])
def test_a_name_that_leaves_the_folder_is_refused(run_folder: Path, tmp_path: Path, name: str) -> None:
    results = json.loads((run_folder / "results.json").read_text())
    (run_folder / "results.json").write_text(json.dumps({**results, "name": name}))
    with pytest.raises(HarnessError, match="expected a plain folder name"):
        publish(run_folder, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_an_unfinished_run_is_refused_with_what_to_do(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "results.json").unlink()
    with pytest.raises(HarnessError, match=r"results\.json: no such file; make it with `dsa-eval rescore "):
        publish(run_folder, tmp_path / "results")


def test_a_run_with_fast_is_refused_and_an_earlier_publication_stays(run_folder: Path, tmp_path: Path) -> None:
    publish(run_folder, tmp_path / "results")
    before = _tree(tmp_path / "results")
    manifest = json.loads((run_folder / "manifest.json").read_text())
    tags = dict.fromkeys(VARIANTS, "cuda-paged-5") | {"recency": "cuda-paged-5-fast"}
    (run_folder / "manifest.json").write_text(json.dumps({**manifest, "numerics": tags}))
    with pytest.raises(HarnessError, match=r"^\S+: was made with --fast, .* without --fast, then publish$"):
        publish(run_folder, tmp_path / "results")
    assert _tree(tmp_path / "results") == before


def test_another_schema_is_refused(run_folder: Path, tmp_path: Path) -> None:
    results = json.loads((run_folder / "results.json").read_text())
    (run_folder / "results.json").write_text(json.dumps({**results, "schema": 7}))
    with pytest.raises(HarnessError, match="expected schema 1, got 7"):
        publish(run_folder, tmp_path / "results")


def test_hostile_text_is_published_as_valid_utf8(tmp_path: Path) -> None:
    run_folder = build(tmp_path / "run", hostile=True, layers=2)
    for path in publish(run_folder, tmp_path / "results"):
        path.read_bytes().decode()


def test_the_run_folder_is_not_touched(run_folder: Path, tmp_path: Path) -> None:
    before = _tree(run_folder)
    publish(run_folder, tmp_path / "results")
    assert _tree(run_folder) == before


def test_a_publication_needs_no_journal(run_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_folder / "journal")
    shutil.rmtree(run_folder / "docs")
    assert "No response in the journal." in _report(publish(run_folder, tmp_path))


def _report(written: list[Path]) -> str:
    return next(path for path in written if path.name == "report.html").read_text()

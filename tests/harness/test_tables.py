import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from fixtures.published_run import DEVICE, METRIC, TASKS, VARIANTS, build

from harness import numbers, tables
from harness.lm_eval_format import lm_eval_results
from harness.report_parts.run_data import RunData, read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(build(tmp_path_factory.mktemp("run"), layers=3))


def test_headline_rows_are_tasks_times_variants_in_the_runs_order(run: RunData) -> None:
    rows = tables.headline_rows(run.results, run.comparison)
    assert [(row["task"], row["variant"]) for row in rows] == [(task, v) for task in TASKS for v in VARIANTS]
    assert all(row["metric"] == METRIC[row["task"]] for row in rows)


def test_every_row_says_where_it_comes_from(run: RunData) -> None:
    assert run.comparison is not None
    for rows in (
        tables.score_rows(run.results),
        tables.comparison_rows(run.results, run.comparison),
        tables.recall_rows(run.results),
    ):
        assert rows
        assert {(row["digest"], row["commit"], row["device"]) for row in rows} == {
            ("3f9c51d07a", "a8ecce085cb2", DEVICE)
        }
        assert all(row["n"] > 0 for row in rows)


def test_only_differences_that_survive_holm_are_bold(run: RunData) -> None:
    assert run.comparison is not None
    rows = tables.comparison_rows(run.results, run.comparison)
    bold = {(row["task"], row["variant"]) for row in rows if row["significant"]}
    assert bold == {("niah_single_2", "recency")}
    oracle = next(row for row in rows if (row["task"], row["variant"]) == ("niah_single_2", "oracle"))
    assert oracle["mcnemar_p"] < 0.05 < oracle["holm_p"]
    markdown = tables.to_markdown(tables.HEADLINE_COLUMNS, tables.headline_rows(run.results, run.comparison))
    assert [line.split("|")[2].strip() for line in markdown.splitlines() if "**" in line] == ["recency"]


def test_groups_and_rows_without_adjusted_p_are_never_bold(run: RunData) -> None:
    assert run.comparison is not None
    rows = tables.comparison_rows(run.results, run.comparison)
    grouped = [row for row in rows if row["group"]]
    assert {row["group"] for row in grouped} == {f'{{"length": {n}}}' for n in (1024, 2048, 4096)}
    assert not any(row["significant"] for row in rows if row["group"] or row["task"] == "pooled")


def test_leading_rows_go_by_task_and_end_with_the_pool(run: RunData) -> None:
    assert run.comparison is not None
    rows = tables.leading_rows(run.results, run.comparison["rows"])
    assert [row["task"] for row in rows] == [task for task in (*TASKS, "pooled") for _ in VARIANTS[1:]]


def test_csv_gives_back_what_went_in(run: RunData) -> None:
    rows = tables.score_rows(run.results, run.comparison)
    read = list(csv.DictReader(io.StringIO(tables.to_csv(rows), newline="")))
    assert len(read) == len(rows)
    for before, after in zip(rows, read, strict=True):
        for key, value in before.items():
            if value is None:
                assert after[key] == ""
            elif isinstance(value, float):
                assert float(after[key]) == value
            else:
                assert after[key] == str(value)


def test_csv_is_read_by_pandas_with_missing_values_missing(run: RunData) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(io.StringIO(tables.to_csv(tables.headline_rows(run.results, run.comparison))))
    assert list(frame["reasoning_tokens_mean"].isna()) == [task != "aime25" for task in TASKS for _ in VARIANTS]
    assert frame["mean"].between(0, 1).all()


def test_csv_quotes_commas_quotes_and_line_breaks() -> None:
    awkward = 'a,"b"\nc'
    assert list(csv.DictReader(io.StringIO(tables.to_csv([{"x": awkward, "y": 1}]), newline=""))) == [
        {"x": awkward, "y": "1"}
    ]


def test_json_rows_keep_null_and_numbers(run: RunData) -> None:
    rows = tables.headline_rows(run.results, run.comparison)
    assert json.loads(tables.to_json(rows)) == rows


def test_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        tables.to_json([{"mean": math.nan}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("niah_single_2", r"niah\_single\_2"),
        ("100 % & #1 $x$", r"100 \% \& \#1 \$x\$"),
        (r"\input{x}", r"\textbackslash{}input\{x\}"),
        ("~^<>", r"\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}"),
        ("−2.5 [−3, –]", r"$-$2.5 {[}$-$3, --{]}"),  # noqa: RUF001
        ("two\nlines", "two lines"),
    ],
)
def test_latex_escape_prints_text_as_it_is(text: str, expected: str) -> None:
    assert tables.latex_escape(text) == expected


def test_latex_rows_all_have_the_same_number_of_columns(run: RunData) -> None:
    rows = tables.headline_rows(run.results, run.comparison)
    rows[0] = {**rows[0], "task": r"bad & task \\ \end{tabular} 50%"}
    latex = tables.to_latex(tables.HEADLINE_COLUMNS, rows, caption="all_of 100 %", label="a_b c")
    body = [line for line in latex.splitlines() if line.endswith(r" \\")]
    assert len(body) == len(rows) + 1
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(tables.HEADLINE_COLUMNS) - 1}
    assert latex.count(r"\end{tabular}") == 1
    assert r"\toprule" in latex and r"\midrule" in latex and r"\bottomrule" in latex
    assert r"\textbf{34.5}" in latex
    assert not re.search(r"(?<!\\)%", latex.split("\n", 1)[1])


def test_markdown_cells_cannot_break_the_table() -> None:
    column = tables.Column("Name", lambda row: str(row["name"]))
    markdown = tables.to_markdown([column], [{"name": "a|b\n<script>*x*[y](z)"}])
    assert markdown.splitlines()[2] == r"| a\|b &lt;script&gt;\*x\*[y\](z) |"


def test_terminal_table_shows_every_headline_row(run: RunData) -> None:
    from rich.console import Console

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(tables.terminal_table(run.results, run.comparison))
    text = console.export_text()
    assert sum(line.count(task) for line in text.splitlines() for task in TASKS) == len(TASKS) * len(VARIANTS)
    assert "35.7†" in text and "† token limit below the protocol's" in text
    assert "[91.7, 98.7]" in text


def test_terminal_table_prints_markup_in_names_as_text(run: RunData) -> None:
    from rich.console import Console

    results = {**run.results, "name": "[bold]x[/bold] [/nonsense]"}
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(tables.terminal_table(results))
    assert "[bold]x[/bold] [/nonsense]" in console.export_text()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.percent(0.8333), "83.3"),
        (numbers.percent(None), "–"),  # noqa: RUF001
        (numbers.percent(math.nan), "–"),  # noqa: RUF001
        (numbers.points(-0.025), "−2.5"),  # noqa: RUF001
        (numbers.points(0.025), "+2.5"),
        (numbers.points(-0.0001), "0.0"),
        (numbers.interval(0.741, 0.896), "[74.1, 89.6]"),
        (numbers.interval(None, 0.896), "–"),  # noqa: RUF001
        (numbers.probability(0.0004), "<0.001"),
        (numbers.probability(0.25), "0.250"),
        (numbers.count(12032), "12,032"),
        (numbers.group_label({"length": 4096, "depth": 50.0}), "length 4,096, depth 50 %"),
    ],
)
def test_numbers_read_as_in_print(shown: str, expected: str) -> None:
    assert shown == expected


def test_lm_evals_own_table_reads_our_results(run: RunData) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    made = lm_eval_results(run.results, "dense", run.manifest, run.settings)
    table = utils.make_table(json.loads(json.dumps(made)))
    row = next(line for line in table.splitlines() if line.startswith("|mmlu_pro"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["mmlu_pro", "1", "none", "5", "official_accuracy"]
    strict = next(line for line in table.splitlines() if "strict_accuracy" in line)
    assert "0.3571" in strict and "↑" in strict


def test_lm_eval_results_hold_samples_settings_and_no_group_cells(run: RunData) -> None:
    made = lm_eval_results(run.results, "recency", run.manifest, run.settings)
    assert made["n-samples"]["mmlu_pro"] == {"original": 56, "effective": 56}
    assert made["configs"]["mmlu_pro"]["generation"] == {"max_tokens": 512}
    assert made["config"]["model_args"] == {"variant": "recency", "topk": 256, "selector": "recency"}
    assert made["model_name"] == "smollm2/recency"
    assert set(made["results"]["niah_single_2"]) == {"name", "alias", "sample_len", "found,none", "found_stderr,none"}


def test_lm_eval_results_write_an_unknown_error_as_lm_eval_does(run: RunData) -> None:
    cells: list[dict[str, Any]] = [{**cell, "stderr": None} for cell in run.results["cells"]]
    made = lm_eval_results({**run.results, "cells": cells}, "dense", {}, None)
    assert made["results"]["mmlu_pro"]["strict_accuracy_stderr,none"] == "N/A"


def test_tables_import_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, harness.tables, harness.report, harness.publish;"
        "heavy = {'torch', 'ray', 'lm_eval', 'transformers', 'plotly', 'pandas', 'scipy', 'rich', 'jinja2'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

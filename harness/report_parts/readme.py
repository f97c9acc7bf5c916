"""The README.md of a publication: verdicts, tables, settings and how it was made."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from harness import numbers, tables
from harness.report_parts.comparison_section import OVERVIEW_FROM, SIGNS, overview, tone
from harness.report_parts.manifest_section import flat_rows
from harness.report_parts.run_data import RunData
from harness.report_parts.text import visible

FILES = (
    ("report.html", "the whole report on one page; opens from disk"),
    ("table.csv, table.json, table.tex", "headline scores; shares are 0..1 in CSV and JSON"),
    ("cells.csv", "every estimate: all metrics, all groups"),
    ("comparison.csv", "paired differences, tests and verdicts"),
    ("recall.csv", "recall by trajectory, task, phase, selector, k and layer"),
    ("lm_eval/", "results of each variant in lm-eval's format"),
)


def readme(run: RunData) -> str:
    """Markdown that says what came out before how; every table carries n and intervals."""
    results, comparison = run.results, run.comparison
    rows = tables.headline_rows(results, comparison)
    parts = [f"# {_plain(results['name'])}", _origin(run)]
    if comparison is not None:
        leading = tables.leading_rows(results, tables.comparison_rows(results, comparison))
        parts += ["## Verdicts", *_verdicts(leading, comparison["baseline"])]
    parts += ["## Scores", tables.to_markdown(tables.HEADLINE_COLUMNS, rows)]
    if any(row["limit_lowered"] for row in rows):
        parts.append("† The token limit was set below the protocol's; scores may be lower for that reason alone.")
    if comparison is not None:
        alpha = numbers.percent(comparison["alpha"], 0)
        parts.append(f"Bold: differs from `{comparison['baseline']}` after Holm's correction at {alpha} %.")
    others = [r for r in tables.score_rows(results, comparison) if not r["headline"] and not r["group"]]
    if others:
        metric = tables.Column("Metric", lambda row: str(row["metric"]), right=False)
        columns = (*tables.HEADLINE_COLUMNS[:2], metric, *tables.HEADLINE_COLUMNS[2:6])
        parts += ["### Other metrics", tables.to_markdown(columns, others)]
    if comparison is not None:
        parts += ["## Paired differences", tables.to_markdown(tables.COMPARISON_COLUMNS, leading)]
    parts += _recall(run)
    parts += ["## Settings", _settings(run), "## How it was made", _made(run)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _verdicts(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    """A sentence each; many of them folded, below a table of differences in points."""
    sentences = "\n".join(f"- **{_plain(row['verdict'])}.** {_plain(row['sentence'])}" for row in rows)
    if len(rows) < OVERVIEW_FROM:
        return [sentences]
    table = overview(rows)
    names = " | ".join(map(_plain, table["variants"]))
    lines = [f"| Task | {names} |", "|:---|" + "---:|" * len(table["variants"])]
    for task, found in table["tasks"]:
        cells = [_short(row) if row else "" for row in found]
        lines.append(f"| {_plain(task)} | {' | '.join(cells)} |")
    legend = f"Difference from `{baseline}` in points: {SIGNS}."
    return ["\n".join(lines), legend, f"<details><summary>In words</summary>\n\n{sentences}\n\n</details>"]


def _short(row: Mapping[str, Any]) -> str:
    sign, _ = tone(row["verdict"], numbers.finite(row["difference"]))
    return f"{sign} {numbers.points(row['difference'], 1)}"


def _origin(run: RunData) -> str:
    results = run.results
    facts = (
        f"{numbers.count(len(run.samples))} samples",
        f"config `{_plain(results['digest'])}`",
        f"commit `{_plain(results['commit'])}`",
        _plain(results["device"]),
        _plain(results["created"]),
    )
    return " · ".join(facts)


def _recall(run: RunData) -> list[str]:
    rows = [row for row in tables.recall_rows(run.results) if row["layer"] is None]
    if not rows:
        return []
    trivial = sum(sample.trivial or 0 for sample in run.samples)
    rows.sort(key=lambda row: (row["trajectory"] != "dense", row["variant"], row["task"], row["phase"], row["k"]))
    return [
        "## Recall, mean over layers",
        "The oracle reads the k keys with the largest dense attention mass: it bounds the mass that a selector can "
        f"keep, not the accuracy. {numbers.count(trivial)} rows of queries with n ≤ k visible keys are trivial and "
        "kept apart.",
        tables.to_markdown(tables.RECALL_COLUMNS, rows),
    ]


def _settings(run: RunData) -> str:
    if run.settings is None:
        return "The run folder holds no config.yaml."
    return _fenced(json.dumps(run.settings, indent=2, ensure_ascii=True, default=str), "json")


def _made(run: RunData) -> str:
    rows: list[tuple[str, Any]] = flat_rows(run.manifest)
    listed = "\n".join(f"| {_plain(path)} | {_plain(text)} |" for path, text in rows)
    files = "\n".join(f"- `{name}`: {what}" for name, what in FILES)
    return f"| Key | Value |\n|:---|:---|\n{listed}\n\n{files}"


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _plain(value: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return tables.markdown_escape(visible(value))

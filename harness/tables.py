"""Tables of a finished run: rows from results and comparison, and their Markdown, CSV, JSON, LaTeX and terminal form.

Rows carry raw numbers (shares 0..1, None for not measured) and every row says which experiment it belongs to: a score
travels with n, its error, config digest, commit and device. Percent appears only where people read.
"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness import numbers

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]

_SCORE_FIELDS = (
    "mean", "stderr", "low", "high", "interval", "n", "clusters", "repeats", "unparsed", "truncated", "errors",
    "stopped", "length", "reasoning_tokens_mean", "completion_tokens_mean", "answer_tokens_mean", "prompt_tokens_mean",
    "limit_lowered",
)  # fmt: skip
_COMPARISON_FIELDS = (
    "n", "clusters", "mean_variant", "mean_baseline", "difference", "stderr", "low", "high", "interval",
    "variant_only", "baseline_only", "mcnemar_p", "p", "holm_p", "q", "margin", "noninferior_p", "tost_p", "verdict",
    "n_needed", "weights_differ", "sentence",
)  # fmt: skip
_RECALL_FIELDS = (
    "variant", "trajectory", "task", "phase", "selector", "k", "layer", "n", "queries", "mass", "mass_stderr",
    "oracle_mass", "mass_share", "topk_recall", "output_error", "needle_coverage",
)  # fmt: skip


def score_rows(results: Row, comparison: Row | None = None) -> list[dict[str, Any]]:
    """Every estimate of a run, tasks and variants in the run's order, whole tasks before their groups.

    `significant`: this variant differs from the baseline on this task and metric, Holm over the whole-task rows.
    """
    significant = significant_rows(comparison)
    tasks = {task: place for place, task in enumerate(results["tasks"])}
    variants = {variant: place for place, variant in enumerate(results["variants"])}
    rows = []
    for cell in results["cells"]:
        key = (cell["task"], cell["variant"], cell["metric"])
        rows.append(
            {
                "task": cell["task"],
                "variant": cell["variant"],
                "group": json.dumps(cell["group"], sort_keys=True) if cell["group"] else "",
                "metric": cell["metric"],
                "headline": cell["headline"],
                **{field: cell.get(field) for field in _SCORE_FIELDS},
                "significant": not cell["group"] and key in significant,
                **_origin(results),
            }
        )
    rows.sort(key=lambda row: (tasks[row["task"]], bool(row["group"]), not row["headline"], variants[row["variant"]]))
    return rows


def headline_rows(results: Row, comparison: Row | None = None) -> list[dict[str, Any]]:
    """One row per task and variant: the metric that the task leads with, over the whole task."""
    return [row for row in score_rows(results, comparison) if row["headline"] and not row["group"]]


def comparison_rows(results: Row, comparison: Row) -> list[dict[str, Any]]:
    """Every paired difference as the comparison has them: whole tasks, then groups (exploration, with q for holm_p)."""
    rows = []
    for row in [*comparison["rows"], *comparison.get("by_group", ())]:
        spent = row.get("tokens") or {}
        rows.append(
            {
                "task": row["task"],
                "variant": row["variant"],
                "baseline": row["baseline"],
                "group": json.dumps(row["group"], sort_keys=True) if row["group"] else "",
                "metric": row["metric"],
                **{field: row.get(field) for field in _COMPARISON_FIELDS},
                "significant": is_significant(row, comparison),
                "token_ratio": spent.get("ratio"),
                "token_ratio_low": spent.get("low"),
                "token_ratio_high": spent.get("high"),
                **_origin(results),
            }
        )
    return rows


def recall_rows(results: Row) -> list[dict[str, Any]]:
    """Recall by trajectory, task, phase, selector, k and layer; layer None is the mean over all layers."""
    return [{**{field: row.get(field) for field in _RECALL_FIELDS}, **_origin(results)} for row in results["recall"]]


def significant_rows(comparison: Row | None) -> set[tuple[str, str, str]]:
    """(task, variant, metric) of the whole-task differences that stay significant after Holm."""
    if comparison is None:
        return set()
    rows = comparison["rows"]
    return {(r["task"], r["variant"], r["metric"]) for r in rows if not r["group"] and is_significant(r, comparison)}


def is_significant(row: Row, comparison: Row) -> bool:
    """Whether a difference stays significant after Holm; rows without an adjusted p-value are never said to be."""
    p = numbers.finite(row.get("holm_p"))
    return p is not None and p < comparison["alpha"]


def leading_rows(results: Row, rows: Sequence[Row]) -> list[Row]:
    """Of comparison rows those that tables lead with: whole tasks by their headline metric, then pools of tasks."""
    headlines = {(cell["task"], cell["metric"]) for cell in results["cells"] if cell["headline"]}
    places = {task: place for place, task in enumerate(results["tasks"])}
    whole = [row for row in rows if not row["group"]]
    leading = [row for row in whole if row["task"] not in places or (row["task"], row["metric"]) in headlines]
    return sorted(leading, key=lambda row: places.get(row["task"], len(places)))


def _origin(results: Row) -> dict[str, Any]:
    return {"digest": results["digest"], "commit": results["commit"], "device": results["device"]}


# What people read: one column is a title, a side and a function from a row to its text.
@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    title: str
    text: Callable[[Row], str]
    right: bool = True


HEADLINE_COLUMNS = (
    Column("Task", lambda row: str(row["task"]), right=False),
    Column("Variant", lambda row: str(row["variant"]), right=False),
    Column("Score, %", lambda row: numbers.score(row["metric"], row["mean"]) + ("†" if row["limit_lowered"] else "")),
    Column("95 % interval", lambda row: numbers.score_interval(row["metric"], row["low"], row["high"])),
    Column("n", lambda row: numbers.count(row["n"])),
    Column("Repeats", lambda row: numbers.count(row["repeats"])),
    Column("Unparsed", lambda row: numbers.count(row["unparsed"])),
    Column("Truncated", lambda row: numbers.count(row["truncated"])),
    Column("Errors", lambda row: numbers.count(row["errors"])),
    Column("Stop / length", lambda row: f"{numbers.count(row['stopped'])} / {numbers.count(row['length'])}"),
    Column("Reasoning tokens", lambda row: numbers.tokens(row["reasoning_tokens_mean"])),
    Column("Completion tokens", lambda row: numbers.tokens(row["completion_tokens_mean"])),
)
COMPARISON_COLUMNS = (
    Column("Task", lambda row: str(row["task"]), right=False),
    Column("Variant − baseline", lambda row: f"{row['variant']} − {row['baseline']}", right=False),  # noqa: RUF001
    Column("Difference, points", lambda row: numbers.points(row["difference"])),
    Column("95 % interval", lambda row: numbers.interval(row["low"], row["high"], signed=True)),
    Column("n", lambda row: numbers.count(row["n"])),
    Column(
        "Only variant / only baseline", lambda row: f"{_either(row, 'variant_only')} / {_either(row, 'baseline_only')}"
    ),
    Column("McNemar p", lambda row: numbers.probability(row["mcnemar_p"])),
    Column("Holm p", lambda row: numbers.probability(row["holm_p"])),
    Column("Margin, points", lambda row: "±" + numbers.percent(row["margin"])),
    Column("TOST p", lambda row: numbers.probability(row["tost_p"])),
    Column("Verdict", lambda row: row["verdict"] + (" (other weights)" if row["weights_differ"] else ""), right=False),
    Column("n needed", lambda row: numbers.count(row["n_needed"])),
    Column("Completion tokens", lambda row: numbers.ratio(row["token_ratio"])),
)
RECALL_COLUMNS = (
    Column("Trajectory", lambda row: str(row["trajectory"]), right=False),
    Column("Variant", lambda row: str(row["variant"]), right=False),
    Column("Task", lambda row: str(row["task"]), right=False),
    Column("Phase", lambda row: str(row["phase"]), right=False),
    Column("Selector", lambda row: str(row["selector"]), right=False),
    Column("k", lambda row: numbers.count(row["k"])),
    Column("n", lambda row: numbers.count(row["n"])),
    Column("Mass, %", lambda row: numbers.percent(row["mass"])),
    Column("Oracle's mass, %", lambda row: numbers.percent(row["oracle_mass"])),
    Column("Share of oracle's, %", lambda row: numbers.percent(row["mass_share"])),
    Column("Top-k recall, %", lambda row: numbers.percent(row["topk_recall"])),
    Column("Output error, %", lambda row: numbers.percent(row["output_error"])),
    Column("Needle coverage, %", lambda row: numbers.percent(row["needle_coverage"])),
)


def _either(row: Row, field: str) -> str:
    return numbers.count(row[field])


def _stands_out(column: Column, row: Row) -> bool:
    return bool(row.get("significant")) and column.title in ("Score, %", "Difference, points")


def to_markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A pipe table; numbers to the right, bold where the difference is significant after Holm."""
    lines = [
        "| " + " | ".join(markdown_escape(column.title) for column in columns) + " |",
        "|" + "|".join("---:" if column.right else ":---" for column in columns) + "|",
    ]
    for row in rows:
        cells = [markdown_escape(column.text(row)) for column in columns]
        cells = [
            f"**{cell}**" if _stands_out(column, row) else cell for column, cell in zip(columns, cells, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Raw values, one header line, an empty field for None. No rows give an empty text."""
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_json(rows: Sequence[Row]) -> str:
    """Raw values as a list of objects with sorted keys; NaN is refused, None is null."""
    return json.dumps(rows, sort_keys=True, indent=1, allow_nan=False) + "\n"


def to_latex(columns: Sequence[Column], rows: Sequence[Row], caption: str, label: str) -> str:
    """A floating table in booktabs style; every text is escaped, a rule parts one task from the next."""
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{latex_escape(caption)}}}",
        f"\\label{{tab:{re.sub(r'[^A-Za-z0-9:-]', '-', label)}}}",
        f"\\begin{{tabular}}{{{''.join('r' if column.right else 'l' for column in columns)}}}",
        "\\toprule",
        " & ".join(latex_escape(column.title) for column in columns) + " \\\\",
        "\\midrule",
    ]
    previous = rows[0]["task"] if rows else None
    for row in rows:
        if row["task"] != previous:
            lines.append("\\addlinespace")
        previous = row["task"]
        cells = [latex_escape(column.text(row)) for column in columns]
        cells = [
            f"\\textbf{{{cell}}}" if _stands_out(column, row) else cell
            for column, cell in zip(columns, cells, strict=True)
        ]
        lines.append(" & ".join(cells) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}"]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    numbers.NOT_MEASURED: "--", numbers.MINUS: "$-$", "±": r"$\pm$", "×": r"$\times$", "†": r"\dag{}", "\n": " ",  # noqa: RUF001
    "[": "{[}", "]": "{]}",
}  # fmt: skip


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it is; brackets are guarded because `\\\\` takes a following [ as its argument."""
    return "".join(_LATEX.get(character, character) for character in text)


def markdown_escape(text: str) -> str:
    """Text that a pipe table shows as it is: no cell ends early, no markup begins."""
    escaped = re.sub(r"([\\|`*~]|\](?=[(\[:])|\b_\B|\B_\b)", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def terminal_table(results: Row, comparison: Row | None = None) -> "Table":
    """The headline table for the end of a run; a dagger marks a token limit below the protocol's."""
    from rich.table import Table
    from rich.text import Text

    rows = headline_rows(results, comparison)
    table = Table(title=Text(f"{results['name']}  {results['digest']}"), header_style="bold", row_styles=["", "dim"])
    for column in HEADLINE_COLUMNS:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for place, row in enumerate(rows):
        last_of_task = place + 1 < len(rows) and rows[place + 1]["task"] != row["task"]
        texts = [Text(c.text(row), style="bold" if _stands_out(c, row) else "") for c in HEADLINE_COLUMNS]
        table.add_row(*texts, end_section=last_of_task)
    if any(row["limit_lowered"] for row in rows):
        table.caption = "† token limit below the protocol's"
    return table

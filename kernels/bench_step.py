"""The whole attention step on one GPU: `dsa-eval bench attention`, `python -m kernels.bench_step`.

Scores, selection and attention beside the best dense path of the same run, the peers' times and the first bars; and
whether the table of `prefill_form` names the fastest form at each position.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels.attention_peers import SOURCE
from kernels.bench_case import Case
from kernels.bench_step_calls import FORM_QUERIES
from kernels.bench_step_rows import steps
from kernels.bench_supervisor import choose, command_line, require_gpu, run_benchmark
from kernels.prefill_form import FORMS, MASKED_UNTIL, TABLE_K, prefill_form

TESTS = tuple(f"tests/gpu/test_{name}.py" for name in ("attention_kernels", "mha_kernels", "selection"))
TOLERANCE = 1.05  # a form this much slower than the fastest one is still right: medians differ so between runs


def all_cases() -> list[Case]:
    """Every row of the benchmark."""
    return list(steps())


def bench_attention(
    only: str, rounds: int, *, out: Path | None = None, tell: Callable[[str], None] = print, commit: str | None = None
) -> dict[str, Any]:
    """Test the kernels of the step, then time every row whose name contains a part of `only`, up to `rounds` times.

    Returns:
        The record of `kernels.bench_supervisor.run_benchmark`, with "peers": where their figures come from, "bars" and
        "forms": what `judge_bars` and `judge_forms` say.

    Raises:
        ValueError: no GPU, no such row, tests that are not there or fail.
    """
    require_gpu("attention")
    chosen = choose("attention", all_cases(), only)
    record = run_benchmark(
        "attention", "kernels.bench_step", chosen, TESTS, rounds, out=out, tell=tell, commit=commit,
        conclude=lambda record: record.update(
            peers=SOURCE, bars=judge_bars(record["rows"]), forms=judge_forms(record["rows"])
        ),
    )  # fmt: skip
    for bar in record["bars"]:
        tell(f"{bar['name']}: bar {bar['bar_ms']:g} ms {_met(bar['bar_met'])}, goal {bar['goal_ms']:g} ms "
             f"{_met(bar['goal_met'])}")  # fmt: skip
    for line in record["forms"]["lines"]:
        tell(line)
    return record


def judge_bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each row with a bar {"name", "bar_ms", "bar_met", "goal_ms", "goal_met"}; null where nothing was measured."""
    return [
        {
            "name": row["name"], "bar_ms": row["bar_ms"], "goal_ms": row["goal_ms"],
            "bar_met": row["ms"] <= row["bar_ms"] if "ms" in row else None,
            "goal_met": row["ms"] <= row["goal_ms"] if "ms" in row else None,
        }
        for row in rows
        if "bar_ms" in row
    ]  # fmt: skip


def _met(verdict: bool | None) -> str:
    return "not measured" if verdict is None else "met" if verdict else "missed"


def judge_forms(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether the table names the fastest form that keeps the selection, from the rows of kernel form_*.

    dense keeps it only up to k keys; beyond, its time is told but does not count.

    Returns:
        {"masked_until", "k", "tolerance", "queries": of a chunk, "chunks": [{"context", "position": of the first query,
        "ms": by form, "table", "fastest"}], "right": true, false, or null where no chunk has every time, "lines": the
        same in words}.
    """
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        form = row["kernel"].removeprefix("form_")
        if form != row["kernel"] and "ms" in row:
            times.setdefault(row["context"], {})[form] = row["ms"]
    chunks: list[dict[str, Any]] = []
    for context, measured in sorted(times.items()):
        position = context - FORM_QUERIES
        allowed = [form for form in FORMS if form != "dense" or context <= TABLE_K]
        if all(form in measured for form in allowed):
            fastest = min(allowed, key=lambda form: measured[form])
            chunks.append(
                {
                    "context": context, "position": position, "ms": measured, "table": prefill_form(position),
                    "fastest": fastest, "right": measured[prefill_form(position)] <= TOLERANCE * measured[fastest],
                }
            )  # fmt: skip
    wrong = [chunk for chunk in chunks if not chunk["right"]]
    lines = [
        f"table of forms, positions {chunk['position']}-{chunk['context'] - 1}: {chunk['fastest']} takes "
        f"{chunk['ms'][chunk['fastest']]:.3f} ms, the table's {chunk['table']} {chunk['ms'][chunk['table']]:.3f} ms"
        for chunk in wrong
    ]
    if chunks and not wrong:
        lines = [f"table of forms: right in all of {len(chunks)} chunks to {chunks[-1]['context']} tokens"]
    return {
        "masked_until": MASKED_UNTIL, "k": TABLE_K, "tolerance": TOLERANCE, "queries": FORM_QUERIES, "chunks": chunks,
        "right": not wrong if chunks else None, "lines": lines or ["table of forms: not measured"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(command_line("kernels.bench_step", bench_attention))

"""Pages of `bench engine` and `bench lm-eval`: rates against context as a picture, tables, where they were measured."""

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from harness.bench_plot import draw_panels
from harness.engine import engine_table

Record = Mapping[str, Any]


def draw_rates(record: Record) -> Markup | None:
    """Prompt and answer tokens a second against context, a panel for each, with a line for each attention and mode.

    One request at a time, and the largest batch of each context.
    """
    return draw_panels(list(_points(record["rows"])), unit="tokens/s", label="tokens a second against context")


def _points(rows: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    largest: dict[int, int] = {}
    for row in rows:
        largest[row["context"]] = max(largest.get(row["context"], 0), row["batch"])
    for row in rows:
        if "failure" in row:
            continue
        mode = row.get("mode", "default")
        series = row["variant"] + ("" if mode == "default" else f", --{mode}")
        for name, panel in (("prefill", "prompts"), ("decode", "answers")):
            value = row[f"{name}_tokens_per_second"]
            point = {"series": series, "context": row["context"], "value": value}
            if row["batch"] == 1:
                yield {**point, "panel": f"{panel}, one at a time"}
            if row["batch"] == largest[row["context"]]:
                yield {**point, "panel": f"{panel}, the largest batch of each context"}


def engine_page(record: Record, plot: str | None) -> str:
    """The page of `bench engine`; `plot` is the picture's file name."""
    config = record["config"]
    blocks = [
        "# The engine at full width",
        f"A random checkpoint with DeepSeek-V3.2's shapes, hidden size {config['hidden_size']:,}, {config['layers']} "
        f"layers, k = {config['topk']:,}, through the loader and the engine of every run. {record['created']}.",
    ]
    if plot is not None:
        blocks.append(f"![Tokens a second against context]({plot})")
    return "\n\n".join([*blocks, engine_table(record).strip()]) + "\n"


def peer_page(record: Record) -> str:
    """The page of `bench lm-eval`."""
    head = "| | samples/s | seconds |\n| :--- | ---: | ---: |"
    ours, theirs = record["samples_per_second"], record["peer_samples_per_second"]
    commit = (record.get("commit") or "unknown commit")[:12] + (" with changes" if record.get("dirty") else "")
    return (
        "# Against lm-eval's hf model\n\n"
        f"{record['samples']} questions of `{record['model']}` ({record['dtype']}), {record['prompt_tokens']:,} prompt "
        f"and {record['completion_tokens']:,} answer tokens, greedy and dense on both sides, the same prompts and "
        f"limits; lm-eval with batches of {record['batch']}. {record['gpu'] or record['device']}, {record['created']}, "
        f"commit {commit}. Loading is not timed.\n\n"
        f"{head}\n| dsa-eval | {ours:.2f} | {record['seconds']:.1f} |\n"
        f"| lm-eval hf | {theirs:.2f} | {record['peer_seconds']:.1f} |\n| ratio | {ours / theirs:.1f} | |\n\n"
        f"{record['same_answers']} of {record['samples']} answers are the same but for space around them; "
        f"{record['prompts_that_differ']} prompts are read as other tokens.\n"
    )

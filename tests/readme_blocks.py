"""The README's tables from results/: `python -m tests.readme_blocks` writes them, test_readme.py compares them."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from tests.kernel_tables import KERNELS, STEP, bars_block, step_block

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "results" / "quickstart"
BENCH = ROOT / "results" / "bench" / "model.json"
CARD = ROOT / "model" / "bundled" / "dsa-tiny" / "README.md"
TINY = ROOT / "results" / "dsa-tiny"
TRAINING = ROOT / "results" / "training" / "dsa-tiny.jsonl"
INDEXER_CARD = ROOT / "model" / "bundled" / "smollm2-indexer" / "README.md"
INDEXER_TRAINING = ROOT / "results" / "training" / "smollm2-indexer.jsonl"
INDEXER = ROOT / "results" / "smollm2-indexer"
SHOWN_TASKS = ("multikey_4", "multivalue_4", "tracking_4", "choice", "tools")  # of the training's own evaluations


def read_block(text: str, name: str) -> str:
    """What stands between the marks of a table."""
    return _split(text, name)[1].strip()


def with_block(text: str, name: str, block: str) -> str:
    """The text with another table between its marks."""
    before, _, after = _split(text, name)
    return f"{before}\n{block}\n\n{after}"


def quickstart_block() -> str:
    """Verdicts and scores, word by word as they were published."""
    published = (QUICKSTART / "README.md").read_text(encoding="utf-8")
    return f"{_section(published, 'Verdicts')}\n\n{_section(published, 'Scores')}"


def bench_block() -> str:
    """The benchmark's medians as a table, the ratio being transformers' time over ours."""
    measured = json.loads(BENCH.read_text(encoding="utf-8"))
    peers = {row["context"]: row for row in measured["rows"] if row["side"] == "transformers"}
    lines = [
        "| Context | Side | Prefill, tokens/s | Ratio | Decode, tokens/s | Ratio | Peak, MiB |",
        "|---:|:---|---:|---:|---:|---:|---:|",
    ]
    lines += ["| " + " | ".join(_bench_cells(row, peers[row["context"]])) + " |" for row in measured["rows"]]
    size = f"{measured['parameters'] / 1e6:.1f} M parameters"
    return "\n".join([*lines, "", f"{size}, one thread, medians of {measured['rounds']}, {measured['device']}."])


def _bench_cells(row: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    if row["failure"]:
        return [f"{row['context']:,}", row["side"], f"did not finish: {row['failure']}", *["–"] * 4]  # noqa: RUF001
    prefill, decode = row["context"] / row["prefill_seconds"], row["decode_tokens_per_second"]
    ratios = ["–", "–"]  # noqa: RUF001
    if not peer["failure"]:
        ratios = [
            f"{peer['prefill_seconds'] / row['prefill_seconds']:.2f}",
            f"{decode / peer['decode_tokens_per_second']:.2f}",
        ]
    peak = f"{row['peak_bytes'] / 2**20:,.0f}"
    return [f"{row['context']:,}", row["side"], f"{prefill:,.0f}", ratios[0], f"{decode:.1f}", ratios[1], peak]


def training_block() -> str:
    """The training's course: where each evaluation stood, losses of the steps before it, accuracy at 4,096 tokens."""
    events = [json.loads(line) for line in TRAINING.read_text(encoding="utf-8").splitlines()]
    names = " | ".join(SHOWN_TASKS)
    lines = [
        "| Stage | Step | Tokens, M | Seconds | Answer loss | Rest loss | Indexer KL | Largest residual | Mode | "
        f"{names} |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|:---|" + "---:|" * len(SHOWN_TASKS),
    ]
    last: dict[str, Any] = {}
    for event in events:
        if event["kind"] == "step":
            last = event
        elif event["kind"] == "evaluation":
            losses = [last.get(key) for key in ("loss_answer", "loss_rest", "loss_indexer")]
            shares = [event["accuracy"].get(f"{task}@4096") for task in SHOWN_TASKS]
            cells = [
                event["stage"], f"{event['step']:,}", f"{event['tokens'] / 1e6:,.0f}", f"{event['seconds']:.0f}",
                *("–" if loss is None else f"{loss:.3f}" for loss in losses), f"{last['residual']:.0f}",  # noqa: RUF001
                event["mode"], *("–" if share is None else f"{100 * share:.0f}" for share in shares),  # noqa: RUF001
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mass_block() -> str:
    """The indexer's attention mass over the oracle's at the end of its training, five layers a line."""
    events = [json.loads(line) for line in INDEXER_TRAINING.read_text(encoding="utf-8").splitlines()]
    last = [event for event in events if event["kind"] == "evaluation"][-1]
    shares = {int(layer): 100 * mass / last["oracle_mass"][layer] for layer, mass in last["mass"].items()}
    lines = ["| Layers | Share of the oracle's mass, % |", "|:---|:---|"]
    for first in range(0, len(shares), 5):
        line = [f"{shares[layer]:.1f}" for layer in sorted(shares)[first : first + 5]]
        lines.append(f"| {first} to {first + len(line) - 1} | {', '.join(line)} |")
    return "\n".join(lines)


def indexer_block() -> str:
    """Headline scores and the book's perplexity at both lengths, by k and by who chose the keys."""
    with (INDEXER / "cells.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = {(row["variant"], row["task"]): row for row in rows if row["headline"] == "True" and not row["group"]}
    books = {(row["variant"], row["group"]): float(row["mean"]) for row in rows if row["metric"] == "perplexity"}
    shown = {"mmlu_pro": "MMLU-Pro", "niah_single_2": "single needle", "niah_multikey_1": "one of four needles",
             "tool_use": "function calls"}  # fmt: skip
    lengths = sorted({json.loads(group)["length"] for _, group in books if group})
    head = ["Keys", "chosen by", *shown.values(), *(f"perplexity, {length:,} tokens" for length in lengths)]
    lines = [f"| {' | '.join(head)} |", "|---:|:---|" + "---:|" * (len(head) - 2)]
    chosen = [("all", "–", "dense")]  # noqa: RUF001
    chosen += [(k, name, f"{name}{k}") for k in ("256", "128", "64") for name in ("indexer", "oracle", "recency")]
    for keys, name, variant in chosen:
        cells = [f"{100 * float(scores[variant, task]['mean']):.1f}" for task in shown]
        cells += [f"{books[variant, json.dumps({'length': length})]:.1f}" for length in lengths]
        lines.append(f"| {' | '.join((keys, name, *cells))} |")
    counts = ", ".join(f"{shown[task]} {scores['dense', task]['n']}" for task in shown)
    lost = sum(int(row["errors"]) for row in scores.values())
    return "\n".join([*lines, "", f"Scores in %, samples a variant: {counts}. {lost} samples of all tasks failed."])


def tiny_block() -> str:
    """Scores of the bundled model, word by word as they were published."""
    return _section((TINY / "README.md").read_text(encoding="utf-8"), "Scores")


def _section(text: str, title: str) -> str:
    """The text under a second-level heading, up to the next heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"expected a section {title}"
    return found[1].strip()


def _split(text: str, name: str) -> tuple[str, str, str]:
    """Up to the opening mark and with it, the table, from the closing mark on."""
    found = re.fullmatch(rf"(.*<!-- {name} -->\n)(.*?)(<!-- end -->.*)", text, re.DOTALL)
    assert found, f"expected the marks <!-- {name} --> and <!-- end -->"
    return found[1], found[2], found[3]


BLOCKS = (
    (ROOT / "README.md", "quickstart table", QUICKSTART, quickstart_block),
    (ROOT / "README.md", "bench table", BENCH, bench_block),
    (ROOT / "README.md", "kernels table", STEP, step_block),
    (ROOT / "kernels" / "README.md", "bars table", KERNELS, bars_block),
    (CARD, "training table", TRAINING, training_block),
    (CARD, "results table", TINY / "README.md", tiny_block),
    (INDEXER_CARD, "mass table", INDEXER_TRAINING, mass_block),
    (INDEXER_CARD, "results table", INDEXER / "cells.csv", indexer_block),
)


def write() -> None:
    for path, name, source, make in BLOCKS:
        if source.exists():
            path.write_text(with_block(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")


if __name__ == "__main__":
    write()

"""What the engine's benchmark writes, row by row: JSON as measured and a table in Markdown; and its command line.

Nothing beyond torch is needed here, so that it runs where only torch is installed.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MISSING = "–"  # noqa: RUF001 (an en dash in a table)
NOT_MEASURED = "not measured:"  # begins the failure of a case for which no time was left
HEAD = (
    "context", "attention", "batch", "mode", "prefill tokens/s", "decode tokens/s", "ms a step", "recall ms",
    "peak GiB", "over idle", "prefill / default", "decode / default",
)  # fmt: skip


class Report:
    """Facts and rows so far; written whole after every row, so that a run that is cut off leaves what it has."""

    def __init__(self, out: Path | None, provenance: Mapping[str, Any]) -> None:
        """out: JSON file, its table beside it as .md; None writes nothing."""
        self.out = out
        self.content: dict[str, Any] = {**provenance, "rows": []}
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)

    def note(self, **facts: Any) -> None:
        self.content |= facts
        self._write()

    def add(self, row: Mapping[str, Any]) -> None:
        self.content["rows"].append(dict(row))
        print(line(row), flush=True)
        self._write()

    def _write(self) -> None:
        if self.out is None:
            return
        for path, text in (
            (self.out, json.dumps(self.content, indent=2, sort_keys=True) + "\n"),
            (self.out.with_suffix(".md"), table(self.content)),
        ):
            scratch = path.with_name(f".{path.name}.part")
            scratch.write_text(text)
            os.replace(scratch, path)


def table(content: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, with what they were measured on above it."""
    device = content.get("device", "unknown device")
    commit = f"commit {content['commit'][:12]}" if content.get("commit") else "no commit known"
    lines = [f"{device}, {commit}. Medians, with the smallest and largest of n measurements."]
    weights = content.get("weights") or {}
    if weights:
        parts = ", ".join(f"{size / 2**30:.1f} GiB {name}" for name, size in sorted(weights.items()))
        lines.append(f"Weights in memory: {parts}.")
    if any(row.get("mode", "default") != "default" for row in content["rows"]):
        lines.append(
            "In the default mode the same request gives the same bits in any company; `--fast` gives that up, and the "
            "last two columns say how many times as fast it then is."
        )
    if any("recall_seconds" in row for row in content["rows"]):
        lines.append(
            "Recall: what it adds to a request, for 16 queries of the prompt and 8 of the answer at every layer: dense "
            "for every selector at three k, sparse for its own choice."
        )
    left = [row for row in content["rows"] if row.get("failure", "").startswith(NOT_MEASURED)]
    if left:
        why = " or ".join(dict.fromkeys(row["failure"].removeprefix(NOT_MEASURED).strip() for row in left))
        lines.append(f"Cases that are not here were not measured, as {why}: {_names(left)}.")
    lines += ["", f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    return "\n".join([*lines, *(line(row) for row in content["rows"] if row not in left)]) + "\n"


def _names(rows: Sequence[Mapping[str, Any]]) -> str:
    """Contexts of several rows by attention, mode and batch."""
    found: dict[str, list[str]] = {}
    for row in rows:
        batch = "one prompt" if row["batch"] == 1 else "several prompts"
        found.setdefault(f"{row['variant']}, {row.get('mode', 'default')}, {batch}", []).append(f"{row['context']:,}")
    return "; ".join(f"{kind}: {', '.join(contexts)}" for kind, contexts in found.items())


def line(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{row['context']:,}", row["variant"], str(row["batch"]), row.get("mode", "default")]
    if "failure" in row:
        cells += [row["failure"].replace("|", "/"), MISSING, MISSING, MISSING]
    else:
        step = 1000 * row["batch"] / row["decode_tokens_per_second"]
        recall = f"{1000 * row['recall_seconds']:,.1f}" if "recall_seconds" in row else MISSING
        cells += [_rates(row, "prefill", row["n"]), _rates(row, "decode", row["n_decode"]), f"{step:.2f}", recall]
    for name in ("peak_bytes", "peak_over_idle_bytes"):
        cells.append(f"{row[name] / 2**30:.1f}" if name in row else MISSING)
    cells += [f"{row[name]:.2f}" if name in row else MISSING for name in ("prefill_ratio", "decode_ratio")]
    return f"| {' | '.join(cells)} |"


def _rates(row: Mapping[str, Any], name: str, n: int) -> str:
    key = f"{name}_tokens_per_second"
    return f"{row[key]:,.0f} ({row[f'{key}_min']:,.0f} to {row[f'{key}_max']:,.0f}, n = {n})"


def provenance(commit: str | None) -> dict[str, Any]:
    """When, from which commit (given, or git's), on what device, with which versions."""
    if commit is None:
        root = Path(__file__).resolve().parents[1]
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
        except OSError:
            commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = None
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


def main() -> None:
    """`python3 -m model.bench_engine`: as `dsa-eval bench engine`, with more to choose from."""
    from model import bench_engine as bench

    parser = argparse.ArgumentParser(description="Prefill and decode rates and peak memory, sparse beside dense.")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(bench.CONTEXTS))
    parser.add_argument("--batches", type=int, nargs="+", default=None, help="default: 1 and what 131,072 tokens hold")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no case after this long")
    parser.add_argument("--model", default=None, help="name or folder; default: a random checkpoint is written")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cache", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--device", default=None)
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the random checkpoint, e.g. in memory")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=N", help="of config.json, e.g. num_hidden_layers=4"
    )
    parser.add_argument("--commit", default=None, help="where this is no git checkout")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    given = parser.parse_args()
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}", flush=True)
    bench.bench_engine(
        given.contexts, batches=given.batches, seconds=given.seconds, name=given.model,
        dtype=given.dtype, cache_dtype=given.cache, device=given.device, scratch=given.scratch,
        changes={key: int(value) for key, _, value in (pair.partition("=") for pair in given.set)},
        out=given.out, provenance=provenance(given.commit),
    )  # fmt: skip

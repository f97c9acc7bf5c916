"""`dsa-eval bench`: speed as a ratio to a peer of the same run, as a table and as JSON with its provenance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.bench_page import write_page
from harness.engine import bench_attention as measure_attention
from harness.engine import bench_engine as measure_engine
from harness.engine import bench_kernels as measure_kernels
from harness.engine import bench_model as measure_model
from harness.errors import HarnessError
from harness.files import write_json
from harness.manifest import provenance

MISSING = "-"


def bench_model(contexts: str, rounds: int, out: Path | None) -> None:
    """Measure, print the table and, if asked, write {**provenance, **measurements} to `out`.

    Raises HarnessError for a list of lengths that cannot be read, ModelError if the parity tests fail.
    """
    lengths = _lengths(contexts)
    measured = measure_model(lengths, rounds)
    _print(measured)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**provenance(), **measured})


def bench_kernels(only: str, rounds: int, out: Path | None) -> bool:
    """Measure the kernels, a line each; JSON into `out` after every row, its page and plot beside it at the end.

    Returns whether every row could be measured. Raises ModelError without a GPU, without a case of that name, or if
    the kernels' tests fail.
    """
    return _told(measure_kernels(only, rounds, out, print), out)


def bench_attention(only: str, rounds: int, out: Path | None) -> bool:
    """The same for the whole attention step."""
    return _told(measure_attention(only, rounds, out, print), out)


def bench_page(path: Path) -> None:
    """The page and plot of a benchmark that has been measured; see `harness.bench_page.write_page`."""
    for written in write_page(path):
        print(written)


def _told(record: Mapping[str, Any], out: Path | None) -> bool:
    failed = sum("failure" in row for row in record["rows"])
    print(f"{len(record['rows'])} rows, {failed} failed, {record['seconds']} s on {record['device']}")
    if out is not None:
        bench_page(out)
    return failed == 0


def bench_engine(contexts: str, seconds: float, model: str | None, out: Path | None) -> None:
    """Measure the engine row by row: each is printed, and written to `out` if asked, as it comes.

    Raises HarnessError for a list of lengths that cannot be read, ModelError if the engine's tests fail.
    """
    measure_engine(_lengths(contexts), seconds, model, out, provenance())


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 32:
        raise HarnessError(f"--contexts: expected lengths of at least 32 tokens like 1024,4096; got {text!r}")
    return lengths


def _print(measured: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{measured['parameters'] / 1e6:.1f} M parameters, one thread, medians of {measured['rounds']}")
    for name in ("context", "side", "prefill tokens/s", "ratio", "decode tokens/s", "ratio", "peak MiB over idle"):
        table.add_column(name, justify="left" if name == "side" else "right")
    by_context: dict[int, dict[str, Any]] = {}
    for row in measured["rows"]:
        by_context.setdefault(row["context"], {})[row["side"]] = row
        peer = by_context[row["context"]]["transformers"]
        if row["failure"]:
            table.add_row(f"{row['context']:,}", row["side"], f"did not finish: {row['failure']}", *[MISSING] * 4)
            continue
        table.add_row(
            f"{row['context']:,}",
            row["side"],
            f"{row['context'] / row['prefill_seconds']:,.0f}",
            _ratio(peer["prefill_seconds"], row["prefill_seconds"]),
            f"{row['decode_tokens_per_second']:.1f}",
            _ratio(row["decode_tokens_per_second"], peer["decode_tokens_per_second"]),
            f"{row['peak_bytes'] / 2**20:,.0f}",
        )
    Console(width=120).print(table)


def _ratio(value: float | None, base: float | None) -> str:
    return MISSING if value is None or base is None else f"{value / base:.2f}"

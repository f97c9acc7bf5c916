"""A benchmark's JSON as a Markdown page: a plot and tables beside peers and floors, nothing typed by hand."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.bench_engine_page import draw_rates, engine_page, peer_page
from harness.bench_plot import draw_panels
from harness.errors import HarnessError
from harness.files import read_json, write_whole

MISSING = "-"
KNOWN = "what bench kernels, bench attention, bench engine or bench lm-eval wrote"
TITLES = {"kernels": "Kernels", "attention": "The whole attention step"}
Row = Mapping[str, Any]


def write_page(path: Path) -> list[Path]:
    """Write X.md and, where rows have a place in it, X.svg beside X.json; gives the files written.

    Raises HarnessError: no such file, not the JSON of a benchmark that has a page.
    """
    if path.suffix != ".json":
        raise HarnessError(f"{path}: expected a file that ends in .json, for its page stands beside it")
    if not path.is_file():
        raise HarnessError(f"{path}: no such file; expected {KNOWN}")
    record = read_json(path)
    page, plot = path.with_suffix(".md"), path.with_suffix(".svg")
    if isinstance(record, dict) and "peer_samples_per_second" in record:
        write_whole(page, peer_page(record))
        return [page]
    of_engine = isinstance(record, dict) and {"weights", "config", "rows"} <= record.keys()
    if not of_engine and (
        not isinstance(record, dict)
        or record.get("benchmark") not in TITLES
        or not isinstance(record.get("rows"), list)
    ):
        raise HarnessError(f"{path}: expected {KNOWN}")
    drawn = draw_rates(record) if of_engine else draw_panels(record["rows"])
    if drawn is not None:
        write_whole(plot, str(drawn) + "\n")
    write_whole(page, (engine_page if of_engine else render_page)(record, plot.name if drawn is not None else None))
    return [page, plot] if drawn is not None else [page]


def render_page(record: Mapping[str, Any], plot: str | None) -> str:
    """The page's text; `plot` is the picture's file name."""
    blocks = [f"# {TITLES[record['benchmark']]}", _facts(record)]
    if plot is not None:
        blocks.append(f"![Time against context; dashed: peers, dotted: the floor]({plot})")
    if versus := _against_dense(record["rows"]):
        blocks += ["## Sparse against the best dense path of this run", versus]
    blocks += ["## Every row", _rows(record["rows"])]
    if record.get("forms", {}).get("chunks"):
        blocks += ["## Which form is the fastest", _forms(record["forms"])]
    if record.get("peers"):
        blocks.append(f"Peers: {record['peers']}.")
    return "\n\n".join(blocks) + "\n"


def _facts(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()) if version)
    commit = (record["commit"] or "unknown commit")[:12] + (" with changes" if record.get("dirty") else "")
    floors = record["floors"]
    counts = {kind: sum(kind in row for row in record["rows"]) for kind in ("ms", "skipped", "failure")}
    text = (
        f"{record['device']}, {record['created']}, commit {commit}, {versions}. Median (quartiles) of up to "
        f"{record['rounds']} calls (n), {record['flush_bytes'] >> 20} MiB written before each. {counts['ms']} rows "
        f"measured, {counts['skipped']} skipped, {counts['failure']} failed. Floor: the longer of the least products "
        f"at {floors['bf16_flops'] / 1e12:g} (bf16) and {floors['fp8_flops'] / 1e12:g} (FP8) TFLOP/s and the least "
        f"bytes at {floors['bytes_per_second'] / 1e12:g} TB/s ({floors['source']}). A ratio above 1 says that ours is "
        "faster."
    )
    return text if record["complete"] else f"{text} **The run was cut before its end.**"


def _rows(rows: Sequence[Row]) -> str:
    head = (
        "Kernel", "Shape", "ms", "n", "TFLOP/s", "GB/s", "Floor, ms", "Floor / ours", "Best peer, ms", "Peer / ours",
        "Bar, ms", "Goal, ms", "Peak, GiB",
    )  # fmt: skip
    return _table(head, [_cells(row) for row in rows], left=2)


def _cells(row: Row) -> list[str]:
    name, ms = min(row.get("peer_ms", {}).items(), key=lambda item: item[1], default=("", None))
    peer = MISSING if ms is None else f"{ms:.4g} ({name})"
    aims = [_aim(row, "bar_ms"), _aim(row, "goal_ms")]
    for problem in ("failure", "skipped"):
        if problem in row:
            told = f"{'failed' if problem == 'failure' else 'skipped'}: {row[problem]}".replace("|", "/")
            floor = f"{row['floor_ms']:.4g}" if "floor_ms" in row else MISSING
            return [row["kernel"], row["shape"], told, *[MISSING] * 3, floor, MISSING, peer, MISSING, *aims, MISSING]
    return [
        row["kernel"],
        row["shape"],
        f"{row['ms']:.4g} ({row['ms_q25']:.4g}-{row['ms_q75']:.4g})",
        str(row["n"]),
        f"{row['tflops']:.0f}" if "tflops" in row else MISSING,
        f"{row['gbytes_per_second']:.0f}" if "gbytes_per_second" in row else MISSING,
        f"{row['floor_ms']:.4g}" if "floor_ms" in row else MISSING,
        _ratio(row.get("floor_ms"), row["ms"]),
        peer,
        _ratio(ms, row["ms"]),
        *aims,
        f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else MISSING,
    ]


def _aim(row: Row, field: str) -> str:
    if field not in row:
        return MISSING
    met = "" if "ms" not in row else " met" if row["ms"] <= row[field] else " missed"
    return f"{row[field]:.4g}{met}"


def _against_dense(rows: Sequence[Row]) -> str:
    """For each panel and context the fastest row of each side; "" where no place has both."""
    best: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        side = row.get("series", "").partition(",")[0]
        if side in ("sparse", "dense") and "ms" in row and "context" in row:
            at = best.setdefault((row["panel"], row["context"]), {})
            at[side] = min(at.get(side, row["ms"]), row["ms"])
    lines = [
        [panel, f"{context:,}", f"{ms['sparse']:.4g}", f"{ms['dense']:.4g}", _ratio(ms["dense"], ms["sparse"])]
        for (panel, context), ms in best.items()
        if len(ms) == 2
    ]
    return _table(("Step", "Context", "Sparse, ms", "Dense, ms", "Dense / sparse"), lines, left=1) if lines else ""


def _forms(forms: Mapping[str, Any]) -> str:
    names = ("dense", "masked", "gathered")
    lines = [
        [
            f"{chunk['position']:,}-{chunk['context'] - 1:,}",
            *(f"{chunk['ms'][name]:.4g}" if name in chunk["ms"] else MISSING for name in names),
            chunk["table"],
            chunk["fastest"],
            "right" if chunk["right"] else "wrong",
        ]
        for chunk in forms["chunks"]
    ]
    head = ("Positions", *(f"{name}, ms" for name in names), "Table", "Fastest", "The table is")
    told = "right" if forms["right"] else "wrong"
    return (
        f"The committed table is {told}: it gathers from position {forms['masked_until']:,} on (k {forms['k']:,}). A "
        f"form within {forms['tolerance'] - 1:.0%} of the fastest counts as right. Dense attention reads what a "
        f"selection of k keys would leave out, so behind k it is told but does not count.\n\n"
        f"{_table(head, lines, left=1)}"
    )


def _table(head: Iterable[str], lines: Iterable[Sequence[str]], *, left: int) -> str:
    names = list(head)
    rule = [":---" if place < left else "---:" for place in range(len(names))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *lines))


def _ratio(value: float | None, base: float) -> str:
    return MISSING if value is None else f"{value / base:.2f}"

"""Tables of the READMEs from results/kernels: times beside bars, goals, peers and floors, in the designs in use."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "kernels"
KERNELS, STEP = RESULTS / "kernels.json", RESULTS / "attention.json"
CONTEXTS = (8192, 32768, 65536, 131072)
SCORES = "index_scores prefill fp8, last 4096 queries of {} keys"
CHOICE = "topk 2048 of {}, {} rows"
SPARSE = "sparse_prefill_{} bfloat16 keys={} queries={}"
DENSE = "dense_decode {} keys={} batch={}"
FULL = "dense_prefill_{} bfloat16 keys={} queries=4096"
MASKED = "masked_prefill bfloat16 keys={} queries=4096"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table: shapes of a kernel in the design in use, by the names of its rows."""

    kernel: str
    shapes: str
    names: tuple[str, ...]


LINES = (
    Line(kernel="index_scores, `hopper`", shapes="8k / 32k / 64k / 128k",
         names=tuple(SCORES.format(keys) for keys in CONTEXTS)),
    Line(kernel="index_scores, paged", shapes="128k, batch 1 / 64 / 128",
         names=tuple(f"index_scores decode paged fp8, batch {batch}, 131072 keys" for batch in (1, 64, 128))),
    Line(kernel="topk, `bounded`", shapes="4,096 rows: 8k / 32k / 64k / 128k",
         names=tuple(CHOICE.format(keys, 4096) for keys in CONTEXTS)),
    *(Line(kernel="topk, `large_parts_16`", shapes=f"{keys // 1024}k: 1 / 8 / 32 / 64 / 128 rows",
           names=tuple(CHOICE.format(keys, rows) for rows in (1, 8, 32, 64, 128))) for keys in (8192, 32768, 131072)),
    Line(kernel="sparse prefill, Hopper", shapes="8k / 32k / 64k / 128k",
         names=tuple(SPARSE.format("hopper", keys, 4096) for keys in CONTEXTS)),
    Line(kernel="sparse prefill, Hopper", shapes="128 queries: 8k / 128k",
         names=tuple(SPARSE.format("hopper", keys, 128) for keys in (8192, 131072))),
    Line(kernel="sparse prefill, Triton", shapes="8k / 32k / 64k / 128k",
         names=tuple(SPARSE.format("triton", keys, 4096) for keys in CONTEXTS)),
    Line(kernel="sparse decode, bf16, `hopper`", shapes="32k, batch 1 / 8 / 32 / 64 / 128",
         names=tuple(f"sparse_decode bfloat16 keys=32768 batch={batch}" for batch in (1, 8, 32, 64, 128))),
    Line(kernel="sparse decode, FP8, `hopper half + whole blocks`", shapes="32k, batch 1 / 8 / 32 / 64 / 128",
         names=tuple(f"sparse_decode fp8 keys=32768 batch={batch}" for batch in (1, 8, 32, 64, 128))),
    Line(kernel="masked prefill, Hopper", shapes="4k / 8k / 12k",
         names=tuple(MASKED.format(keys) for keys in (4096, 8192, 12288))),
    Line(kernel="dense prefill, Hopper at 8k, then cuDNN", shapes="8k / 32k / 64k / 128k",
         names=(FULL.format("hopper", 8192),
                *(FULL.format("cudnn", keys) for keys in CONTEXTS[1:]))),
    Line(kernel="dense decode, bf16, `hopper + 1024 rows`", shapes="batch 64: 8k / 32k / 128k",
         names=tuple(DENSE.format("bfloat16", keys, 64) for keys in (8192, 32768, 131072))),
    Line(kernel="dense decode, bf16, `hopper + 1024 rows`", shapes="batch 1: 8k / 128k",
         names=tuple(DENSE.format("bfloat16", keys, 1) for keys in (8192, 131072))),
    Line(kernel="dense decode, FP8, `hopper half + whole blocks`", shapes="batch 64: 8k / 32k / 128k",
         names=tuple(DENSE.format("fp8", keys, 64) for keys in (8192, 32768, 131072))),
    Line(kernel="FP8 cast", shapes="8,192 x 7,168", names=("fp8 cast [8192, 7168] bf16",)),
    Line(kernel="FP8 product, `tma_wide_narrow`", shapes="8,192³",
         names=("fp8 block matmul 8192 x 8192 x 8192",)),
    Line(kernel="experts, `tma_wide`", shapes="64 / 4,096 / 16,384 rows x 8 of 256",
         names=tuple(f"expert_mlp fp8, {rows} rows x 8 of 256 experts, 7168 x 2048" for rows in (64, 4096, 16384))),
    Line(kernel="attention_mass", shapes="64 queries, 128k",
         names=("attention_mass 64 queries x 128 heads, 131072 keys of 576, bf16",)),
)  # fmt: skip


def bars_block() -> str:
    """Each kernel in the design in use: time, first bar, goal, and how far from peer and floor."""
    lines = [
        "| Kernel, design in use | Shapes | ms | First bar | Goal | Peer / ours | Floor / ours |",
        "|:---|:---|---:|---:|---:|---:|---:|",
    ]
    rows = _rows(KERNELS)
    for line in LINES:
        found = [rows[name] for name in line.names]
        cells = (
            line.kernel,
            line.shapes,
            " / ".join(_ms(row["ms"]) for row in found),
            *(
                _judged([row["ms"] for row in found], [row.get(limit) for row in found])
                for limit in ("bar_ms", "goal_ms")
            ),
            _ratios([_peer(row) for row in found], found),
            _ratios([row["floor_ms"] for row in found], found),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _origin(KERNELS)])


def step_block() -> str:
    """What a step of sparse attention costs at each context, beside our dense one and the peers' sparse one."""
    rows = _rows(STEP)
    steps = {
        "4,096 queries": ("prefill_{} last 4096 of {} tokens", 2),
        "decode, batch 64": ("decode_{} batch 64, {} tokens, bfloat16 cache", 3),
        "decode, batch 1": ("decode_{} batch 1, {} tokens, bfloat16 cache", 3),
    }
    lines = [f"| Keys | {' | '.join(f'{step}, ms' for step in steps)} |", "|---:" * (len(steps) + 1) + "|"]
    for keys in CONTEXTS:
        cells = [f"{keys:,}"]
        for name, digits in steps.values():
            sparse, dense = rows[name.format("sparse", keys)], rows[name.format("dense", keys)]
            cells.append(f"**{sparse['ms']:.{digits}f}** / {dense['ms']:.{digits}f} / {_peer(sparse):.{digits}f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "**Sparse** / dense / the peers' sparse. " + _origin(STEP)])


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def _origin(*paths: Path) -> str:
    """Device, calls, and the commit of each file."""
    measured = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    (device,), (rounds,) = ({record[key] for record in measured.values()} for key in ("device", "rounds"))
    commits = [f"{record['commit'][:7]} ({name})" for name, record in measured.items()]
    return f"{device}, medians of {rounds} calls, commit {', '.join(commits)}."


def _peer(row: dict[str, Any]) -> float | None:
    return min(row["peer_ms"].values()) if row.get("peer_ms") else None


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _judged(times: list[float], limits: list[float | None]) -> str:
    """ "met" for all of them, or each with the share of the limit's speed that was reached, rounded down."""
    if not any(limits):
        return "–"  # noqa: RUF001
    if all(limit is not None and time <= limit for time, limit in zip(times, limits, strict=True)):
        return "met"
    return " / ".join(
        "–" if limit is None else "met" if time <= limit else f"{math.floor(100 * limit / time) / 100:.2f}"  # noqa: RUF001
        for time, limit in zip(times, limits, strict=True)
    )


def _ratios(of: list[float | None], rows: list[dict[str, Any]]) -> str:
    if not any(of):
        return "–"  # noqa: RUF001
    return " / ".join("–" if value is None else f"{value / row['ms']:.2f}" for value, row in zip(of, rows, strict=True))  # noqa: RUF001

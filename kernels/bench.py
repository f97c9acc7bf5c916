"""Times of the kernels on one GPU, beside those of their peers.

Every file `kernels/bench_*_cases.py` adds cases: it defines `TESTS`, the test files that must pass before anything of
it is timed, and `cases()`, which yields them. Timing: CUDA events around one call, 256 MiB written before each, so that
no input is in L2; the median of all rounds with their quartiles.
"""

import dataclasses
import importlib
import pkgutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
FLUSH_BYTES = 256 << 20  # five times an H100's L2
WARM_UPS = 5
PEERS = "kernel study on one H100 80GB HBM3 (SXM), 2026-11-21; another machine of the kind"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table.

    prepare: allocates random inputs on the GPU and gives the call to time. flops, num_bytes: what the call must do and
    move at least. peer_ms: of others' kernels for the same shapes, by name. goal_ms: what we aim at.
    """

    kernel: str
    shape: str
    prepare: Callable[[], Callable[[], object]]
    flops: float | None = None
    num_bytes: float | None = None
    peer_ms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    goal_ms: float | None = None

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape}"


def case_files() -> list[Any]:
    """The modules of all files of cases, by name."""
    found = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return [importlib.import_module(f"kernels.{name}") for name in sorted(found) if _holds_cases(name)]


def _holds_cases(name: str) -> bool:
    return name.startswith("bench_") and name.endswith("_cases")


def bench_kernels(only: str, rounds: int) -> dict[str, Any]:
    """Test the kernels, then time every case whose name contains `only`, `rounds` times.

    Returns:
        {"device", "rounds", "flush_bytes", "peers": where their figures come from, "rows": one for each case with the
        median, quartiles and extremes in ms and, where they are known, TFLOP/s, GB/s, peers and goal}.

    Raises:
        ValueError: no GPU, no such case, tests that are not there or fail.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench kernels: expected a GPU that torch can use, found none")
    chosen = [(module, [c for c in module.cases() if only in c.name]) for module in case_files()]
    chosen = [(module, cases) for module, cases in chosen if cases]
    if not chosen:
        raise ValueError(f"bench kernels: expected --only to name a part of a case like index_scores, got {only!r}")
    check_tests(sorted({test for module, _ in chosen for test in module.TESTS}))
    rows = [row for _, cases in chosen for row in measure(cases, rounds)]
    return {
        "device": torch.cuda.get_device_name(),
        "rounds": rounds,
        "flush_bytes": FLUSH_BYTES,
        "peers": PEERS,
        "rows": rows,
    }


def check_tests(paths: Iterable[str]) -> None:
    """No speed without correctness in the same command. Raises ValueError if a test fails or is not there."""
    paths = list(paths)
    missing = [path for path in paths if not (ROOT / path).exists()]
    if missing:
        raise ValueError(
            f"bench kernels: {missing[0]} is not here; run the benchmark from a checkout of the repository"
        )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [
            line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("FAILED", "ERROR", "E  "))
        ]
        raise ValueError(f"bench kernels: the kernels' tests failed, nothing is timed: {' '.join(lines[-2:])}")


def measure(cases: Iterable[Case], rounds: int) -> Iterator[dict[str, Any]]:
    """Time cases one after the other; one that does not fit into memory says so in its row."""
    for case in cases:
        row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "n": rounds}
        if case.peer_ms:
            row["peer_ms"] = dict(case.peer_ms)
        if case.goal_ms is not None:
            row["goal_ms"] = case.goal_ms
        try:
            times = time_call(case.prepare(), rounds)
        except torch.OutOfMemoryError:
            yield {**row, "failure": "out of memory"}
        else:
            yield {**row, **summary(times, case.flops, case.num_bytes)}
        torch.cuda.empty_cache()


def time_call(call: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of each of `rounds` calls, after warm-up, each with a cold L2."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UPS):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def summary(times: list[float], flops: float | None, num_bytes: float | None) -> dict[str, float]:
    """Median, quartiles and extremes of times in ms, and the rates of the median."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    row = {"ms": median, "ms_q25": low, "ms_q75": high, "ms_min": min(times), "ms_max": max(times)}
    if flops is not None:
        row["tflops"] = flops / median / 1e9
    if num_bytes is not None:
        row["gbytes_per_second"] = num_bytes / median / 1e6
    return row

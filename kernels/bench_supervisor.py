"""Tests first, then every case in processes that may be lost; the record is on the disk after each row.

A benchmark is a module with `all_cases()` and `TESTS`; this file runs it and touches no GPU itself.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.bench_case import FLOORS, FLUSH_BYTES, Case
from kernels.bench_record import provenance, write_record
from kernels.bench_worker import LOST, MARK

ROOT = Path(__file__).resolve().parents[1]
TEST_SECONDS = 600  # a kernel that hangs must not take a whole lease
TEST_PROCESSES = 8  # of GPU memory each takes a few GiB
SILENT_SECONDS = 60  # the longest case, its inputs and its compilation included
MAX_FAILURES = 5  # tests: enough to see whether they have one cause
TOLD = 300  # characters of a line of pytest
MAX_WORKERS = 8  # each one lost costs a start of about ten seconds
GONE = "the GPU no longer answered"
Tell = Callable[[str], None]


def run_benchmark(
    benchmark: str,
    module: str,
    chosen: Sequence[Case],
    tests: Sequence[str],
    rounds: int,
    *,
    out: Path | None = None,
    tell: Tell = print,
    commit: str | None = None,
    conclude: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Run the tests that `chosen` ask for, then measure each case up to `rounds` times.

    Args:
        benchmark: its name, as in `dsa-eval bench NAME`.
        module: whose `all_cases()` has these cases.
        tests: test files.
        out: JSON file that is rewritten after every row; `complete` is false in it until the last.
        tell: gets a line for each row.
        commit: of the code, where there is no git to ask.
        conclude: adds to the record what follows from its rows; called after each.

    Returns:
        {"benchmark", "created", "commit", "dirty", "versions", "device", "rounds", "flush_bytes", "floors", "tests",
        "test_seconds", "rows", "complete", "seconds"}; `kernels.bench_case.measure` says what a row holds.

    Raises:
        ValueError: the tests are not there or fail.
    """
    begin = time.monotonic()
    wanted = sorted({case.tests for case in chosen})
    expression = "" if "" in wanted else " or ".join(f"({part})" for part in wanted)
    tell(f"tests: {' '.join(tests)}" + (f" -k '{expression}'" if expression else ""))
    check_tests(tests, expression, benchmark)
    tested = time.monotonic()
    record: dict[str, Any] = {
        "benchmark": benchmark, **provenance(commit), "device": None, "rounds": rounds, "flush_bytes": FLUSH_BYTES,
        "floors": FLOORS, "tests": {"files": list(tests), "expression": expression},
        "test_seconds": round(tested - begin, 1), "rows": [], "complete": False,
    }  # fmt: skip
    known = {case.name: case.row() for case in chosen}
    command = [sys.executable, "-m", "kernels.bench_worker", module, str(rounds)]
    for line in supervised(command, list(known)):
        if "name" in line:
            row = {**known[line["name"]], **line}
            record["rows"].append(row)
            tell(describe(row))
        else:
            record |= line
        record["seconds"] = round(time.monotonic() - tested, 1)
        conclude(record)
        if out is not None:
            write_record(out, record)
    record["complete"] = True
    if out is not None:
        write_record(out, record)
    return record


def require_gpu(benchmark: str) -> None:
    """Raises ValueError where torch has no GPU. Takes no memory of it."""
    if not torch.cuda.is_available():
        raise ValueError(f"bench {benchmark}: expected a GPU that torch can use, found none")


def choose(benchmark: str, cases: Sequence[Case], only: str) -> list[Case]:
    """Cases whose name contains one of the comma-separated parts of `only`. Raises ValueError where none does."""
    parts = [part.strip() for part in only.split(",")]
    found = [case for case in cases if any(part in case.name for part in parts)]
    if not found:
        kernels = ", ".join(sorted({case.kernel for case in cases}))
        raise ValueError(f"bench {benchmark}: expected --only to name a part of a case ({kernels}), got {only!r}")
    return found


def check_tests(paths: Sequence[str], expression: str, benchmark: str, processes: int = TEST_PROCESSES) -> None:
    """No speed without correctness in the same command. Raises ValueError if a test fails or is not there.

    processes: at most, where xdist is there; 1 for tests of a GPU's free memory. What failing tests printed goes to
        stderr, the error is one line.
    """
    missing = [path for path in paths if not (ROOT / path).exists()]
    if missing:
        raise ValueError(
            f"bench {benchmark}: {missing[0]} is not here; run the benchmark from a checkout of the repository"
        )
    command = [sys.executable, "-m", "pytest", "-q", f"--maxfail={MAX_FAILURES}", "-o", "addopts=", *paths]
    command += ["-k", expression] if expression else []
    if processes > 1 and importlib.util.find_spec("xdist") is not None:  # most of their time is compilation
        command += ["-n", str(min(processes, os.cpu_count() or 1))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TEST_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"bench {benchmark}: the tests took over {TEST_SECONDS} s, nothing is timed") from None
    if done.returncode != 0:
        sys.stderr.write(done.stdout + done.stderr)
        lines = [line[:TOLD] for line in (done.stdout + done.stderr).splitlines()]
        why = [line for line in lines if line.startswith("E  ")][:1]  # later failures may follow from the first
        which = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
        told = " ".join([*why, *which[:2]])
        raise ValueError(f"bench {benchmark}: the kernels' tests failed, nothing is timed: {told}")


def supervised(
    command: Sequence[str], names: Sequence[str], silent_seconds: float = SILENT_SECONDS
) -> Iterator[dict[str, Any]]:
    """A line for each name, in order, whatever becomes of the processes that measure.

    The worker's own lines, and for each case during which one died or fell silent {"name", "failure"}. Lines without a
    name are facts of the device.
    """
    left = collections.deque(names)
    for _ in range(MAX_WORKERS):
        with tempfile.TemporaryFile("w+") as errors:
            worker = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            try:
                reason = yield from _rows_of(worker, left, silent_seconds)
            finally:
                worker.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it for a while
                    worker.wait(timeout=20)
            if not left:
                return
            if reason != GONE:  # that one's row has been told
                errors.seek(0)
                last = [line for line in errors.read().splitlines() if line.strip()][-1:]
                yield {"name": left.popleft(), "failure": ": ".join([reason, *last])[:300]}
        if not left:
            return
    for name in left:
        yield {"name": name, "failure": f"not run: {MAX_WORKERS} processes were lost before it"}


def _rows_of(
    worker: subprocess.Popen[str], left: collections.deque[str], silent_seconds: float
) -> Generator[dict[str, Any], None, str]:
    """Yield one worker's lines and take their names off `left`; returns why it ended."""
    assert worker.stdin is not None and worker.stdout is not None, "opened with pipes"
    lines: queue.Queue[str | None] = queue.Queue()
    stdout = worker.stdout

    def read() -> None:
        for line in stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        worker.stdin.write(json.dumps(list(left)))
        worker.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; its exit code says how
    while left:
        try:
            line = lines.get(timeout=silent_seconds)
        except queue.Empty:
            return f"no result within {silent_seconds:g} s"
        if line is None:
            code = worker.wait()
            return GONE if code == LOST else f"the process ended with exit code {code}"
        if line.startswith(MARK):
            told = json.loads(line[len(MARK) :])
            if told.get("name") == left[0]:
                left.popleft()
            yield told
    return "done"


def describe(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    for problem in ("failure", "skipped"):
        if problem in row:
            return f"{row['name']}: {problem}: {row[problem]}"
    text = f"{row['name']}: {row['ms']:.4f} ms ({row['ms_q25']:.4f}-{row['ms_q75']:.4f}, n {row['n']})"
    text += "".join(f", {label} {row[key]:.4f}" for key, label in (("floor_ms", "floor"),) if key in row)
    text += "".join(f", {peer} {ms:.4f}" for peer, ms in row.get("peer_ms", {}).items())
    return text + "".join(f", {key[:-3]} {row[key]:g}" for key in ("bar_ms", "goal_ms") if key in row)


def failures(record: dict[str, Any]) -> int:
    """How many rows could not be measured though they fit."""
    return sum("failure" in row for row in record["rows"])


def command_line(program: str, run: Callable[..., dict[str, Any]]) -> int:
    """`python -m kernels.…` for hosts without the command line's packages: 0, 1 with a failed row, 2 bad use."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file, rewritten after every case")
    parser.add_argument("--only", default="", metavar="TEXT,...", help="only cases whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed calls of each case")
    parser.add_argument("--commit", metavar="HASH", help="of this code, where it is no git checkout")
    given = parser.parse_args()
    try:
        if given.rounds < 2:
            raise ValueError(f"--rounds: expected at least 2, got {given.rounds}")
        record = run(given.only, given.rounds, out=given.out, commit=given.commit)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    print(f"{len(record['rows'])} rows, {failures(record)} failed, {record['seconds']} s")
    return 1 if failures(record) else 0

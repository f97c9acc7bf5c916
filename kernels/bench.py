"""Times of the kernels on one GPU, beside those of their peers: `dsa-eval bench kernels`, `python -m kernels.bench`.

Every file `kernels/bench_*_cases.py` adds cases: it defines `TESTS`, the test files that must pass before anything of
it is timed, and `cases()`, which yields them.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernels.bench_case import Case
from kernels.bench_supervisor import choose, command_line, require_gpu, run_benchmark

PEERS = "kernel study on one H100 80GB HBM3 (SXM), 2026-11-21; another machine of the kind"


def case_files() -> list[Any]:
    """The modules of all files of cases, by name."""
    found = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return [importlib.import_module(f"kernels.{name}") for name in sorted(found) if _holds_cases(name)]


def _holds_cases(name: str) -> bool:
    return name.startswith("bench_") and name.endswith("_cases")


def all_cases() -> list[Case]:
    """Every case of every file."""
    return [case for module in case_files() for case in module.cases()]


def bench_kernels(
    only: str, rounds: int, *, out: Path | None = None, tell: Callable[[str], None] = print, commit: str | None = None
) -> dict[str, Any]:
    """Test the kernels, then time every case whose name contains a part of `only`, up to `rounds` times.

    Returns:
        The record of `kernels.bench_supervisor.run_benchmark`, with "peers": where their figures come from.

    Raises:
        ValueError: no GPU, no such case, tests that are not there or fail.
    """
    require_gpu("kernels")
    chosen = choose("kernels", all_cases(), only)
    names = {case.name for case in chosen}
    tests = {test for module in case_files() if any(c.name in names for c in module.cases()) for test in module.TESTS}
    return run_benchmark(
        "kernels", "kernels.bench", chosen, sorted(tests), rounds, out=out, tell=tell, commit=commit,
        conclude=lambda record: record.update(peers=PEERS),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(command_line("kernels.bench", bench_kernels))

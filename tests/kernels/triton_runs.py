"""Run Triton kernels without a GPU: in the interpreter, in a process of its own as it is chosen on import."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "interpreted"


def run_interpreted(name: str) -> None:
    """All tests of interpreted/<name>.py pass under TRITON_INTERPRET=1; skips where the interpreter cannot work."""
    pytest.importorskip("triton", reason="needs triton")
    triton, numpy = (importlib.metadata.version(package) for package in ("triton", "numpy"))
    if _number(triton) < (3, 7) and _number(numpy) >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton} cannot run loops with numpy {numpy}")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(CASES / f"{name}.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES.parents[2], timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])

"""The page lookup's Triton kernel without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the CPU paths do not need it")
from kernels import page_slots_triton
from kernels.page_slots import page_slots_reference
from tests.kernels.hopper import Build

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter builds nothing")
def test_it_is_right_in_the_interpreter_and_builds_for_hopper(monkeypatch):
    command = [sys.executable, "-m", "pytest", "-k", "interpreted", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    kernel = Build(page_slots_triton.page_slots_kernel)
    monkeypatch.setattr(page_slots_triton, "page_slots_kernel", kernel)
    ids = torch.empty(64, 2048, dtype=torch.int32, device="meta")
    page_slots_triton.page_slots_triton(ids, torch.empty(64, 512, dtype=torch.int32, device="meta"))
    assert kernel.registers > 0 and kernel.stack == 0


@pytest.mark.skipif(not INTERPRETED, reason="a case of the test above")
@pytest.mark.parametrize("k", [1, 1025])
def test_interpreted_positions_become_slots(k):
    pages = torch.randperm(60).to(torch.int32).view(3, 20)
    ids = torch.randint(-1, 20 * 64, (3, k), dtype=torch.int32)
    assert torch.equal(page_slots_triton.page_slots_triton(ids, pages), page_slots_reference(ids, pages))

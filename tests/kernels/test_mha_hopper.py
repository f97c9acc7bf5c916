"""The Gluon kernel of the MHA form without a GPU: it builds for sm_90 without a spill, its softmax under a product."""

import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the CPU paths do not need it")
pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
import triton
from triton.experimental.gluon._runtime import GluonASTSource

from kernels import dense_prefill, mask_bits_triton, mha_hopper
from tests.kernels.hopper import SHARED_LIMIT, Build

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a case of test_bits_are_right_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter builds nothing")
gluon_release = pytest.mark.skipif(
    not triton.__version__.startswith(mha_hopper.TESTED), reason="written for another release of Gluon"
)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def kernel(monkeypatch):
    kernel = Build(mha_hopper.mha_hopper_kernel, GluonASTSource)
    monkeypatch.setattr(mha_hopper, "mha_hopper_kernel", kernel)
    monkeypatch.setattr(mha_hopper, "num_processors", lambda device: 132)
    monkeypatch.setattr(mask_bits_triton, "pack_mask_kernel", Build(mask_bits_triton.pack_mask_kernel))
    return kernel


def launch(heads=128, masked=False, **design):
    q, k, kv = empty(4096, heads, 192), empty(8192, heads, 192), empty(8192, heads, 256)
    mask = empty(4096, 8192, dtype=torch.bool) if masked else None
    out, lse = empty(4096, heads, 128), empty(4096, heads, dtype=torch.float32)
    mha_hopper.mha_hopper(q, k, kv[..., 128:], 0.1, 4096, mask, out, lse, **design)


@compiled
@gluon_release
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("heads, in_turns", [(128, True), (128, False), (3, True)])
def test_it_builds_for_hopper_without_a_spill(kernel, heads, in_turns, masked):
    launch(heads, masked, in_turns=in_turns)
    assert 0 < kernel.shared <= SHARED_LIMIT
    assert kernel.stack == 0
    for step in ("wgmma", "setmaxnreg", "cp.async.bulk.tensor"):
        assert step in kernel.ptx
    assert ("ld.global.v4" in kernel.ptx) == masked  # four words of bits at once
    assert ("ld.global.v4" in mask_bits_triton.pack_mask_kernel.ptx) == masked  # 16 keys of a mask


@compiled
@gluon_release
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_the_softmax_stands_before_the_wait_for_the_product_that_it_runs_under(kernel, masked):
    """Between the waits for the scores (one product in flight) and for all: 64 weights of a thread, each group."""
    launch(masked=masked)
    steps = re.findall(r"DEPBAR\.LE gsb0, (0x\d)|(MUFU\.EX2)|(LDL|STL)", kernel._tool("nvdisasm", "-c"))
    counts, open_product = [], False
    for wait, weight, spill in steps:
        assert not spill
        if wait:
            open_product = wait == "0x1"
            counts += [0] if open_product else []
        elif weight and open_product:
            counts[-1] += 1
    assert len(counts) == 2 and min(counts) >= 64


@compiled
def test_bits_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-k", "interpreter", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@interpreted
@pytest.mark.parametrize("queries, keys", [(1, 1), (3, 70), (40, 300), (33, 128)])
def test_interpreter_bits_are_the_visible_part_of_the_mask(queries, keys):
    mask = torch.rand(queries, keys + 5)[:, :keys] < 0.5
    bits = mask_bits_triton.pack_mask(mask, keys - queries)
    assert bits.shape == (-(-keys // 128), queries, 4)
    found = (bits.permute(1, 0, 2).reshape(queries, -1, 1) >> torch.arange(32)) & 1
    visible = torch.arange(keys)[None, :] <= keys - queries + torch.arange(queries)[:, None]
    assert torch.equal(found.reshape(queries, -1)[:, :keys].bool(), mask & visible)
    assert not bool(found.reshape(queries, -1)[:, keys:].any())


@compiled
def test_it_is_chosen_under_a_mask_and_up_to_8192_keys(monkeypatch):
    for name in ("takes_kernels", "hopper_fits", "cudnn_fits"):
        monkeypatch.setattr(dense_prefill, name, lambda *_: True)
    q, few, more = empty(2, 4, 192), empty(8192, 1, 192), empty(8193, 1, 192)
    assert [dense_prefill.choose_prefill(q, k, k) for k in (few, more)] == ["hopper", "cudnn"]
    assert [dense_prefill.choose_prefill(q, k, k, masked=True) for k in (few, more)] == ["hopper", "hopper"]


@compiled
def test_rows_that_tma_cannot_address_are_not_taken():
    kv = empty(9, 4, 256)
    assert mha_hopper._addressable(kv[..., 128:]) and mha_hopper._addressable(kv[:, 1:3, :128])
    assert not mha_hopper._addressable(empty(4, 9, 192).transpose(0, 1))  # a head's rows beside each other
    assert not mha_hopper._addressable(empty(9, 4, 196)[..., :192])  # a row of a head begins between 16 bytes
    assert not mha_hopper._addressable(empty(9, 1, 192).expand(-1, 4, -1))
    q = torch.empty(2, 4, 192, dtype=torch.bfloat16)
    assert not mha_hopper.fits(q, q, q[..., :128])

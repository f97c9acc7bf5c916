"""The dense Triton kernel without a GPU: right in the interpreter at small size, built for sm_90 at full size."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the CPU paths do not need it")
from kernels import masked_mha_triton
from kernels.dense_mla import dense_mla_reference
from tests.kernels.hopper import SHARED_LIMIT, Build, interpreter_works

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a case of test_the_kernel_is_right_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter builds nothing")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums of at most a hundred terms in another order


@compiled
def test_the_kernel_is_right_in_the_interpreter():
    if not interpreter_works():
        pytest.skip("this Triton's interpreter cannot run a loop to a run-time bound with this numpy")
    command = [sys.executable, "-m", "pytest", "-k", "interpreter", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def run(q, k, v, start, mask):
    """Outputs start as NaN: what the kernel leaves out is seen."""
    out, lse = torch.full((*q.shape[:2], v.shape[-1]), float("nan")), torch.full(q.shape[:2], float("nan"))
    masked_mha_triton.masked_mha(q, k, v, 0.3, start, mask, out, lse)
    return out, lse


@interpreted
@pytest.mark.parametrize("queries, keys", [(1, 1), (3, 70), (33, 33)])
@pytest.mark.parametrize("heads, groups, dim, value_dim", [(2, 1, 48, 32), (2, 2, 16, 48)])
def test_interpreter_dense_attention_sees_no_future(queries, keys, heads, groups, dim, value_dim):
    q, k, v = torch.randn(queries, heads, dim), torch.randn(keys, groups, dim), torch.randn(keys, groups, value_dim)
    out, _ = run(q, k, v, keys - queries, None)
    torch.testing.assert_close(out, dense_mla_reference(q, k, v, 0.3, keys - queries), **CLOSE)


@interpreted
def test_interpreter_dense_attention_reads_only_masked_keys():
    q, k, v = torch.randn(9, 2, 48), torch.randn(50, 2, 48), torch.randn(50, 2, 32)
    mask = torch.rand(9, 50) < 0.3
    mask[:, 0] = True
    mask[4] = False
    out, lse = run(q, k, v, 41, mask)
    assert torch.equal(out[4], torch.zeros_like(out[4])) and bool(lse[4].isneginf().all())
    rows = torch.arange(9) != 4
    torch.testing.assert_close(out[rows], dense_mla_reference(q, k, v, 0.3, 41, mask)[rows], **CLOSE)


@compiled
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize(
    "dim, value_dim, groups, dtype",
    [(192, 128, 128, torch.bfloat16), (64, 64, 4, torch.bfloat16), (576, 512, 1, torch.bfloat16)],
    ids=["v32", "small", "absorbed"],
)
def test_it_builds_for_hopper_within_its_shared_memory(monkeypatch, dim, value_dim, groups, dtype, masked):
    kernel = Build(masked_mha_triton.masked_mha_kernel)
    monkeypatch.setattr(masked_mha_triton, "masked_mha_kernel", kernel)

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    mask = empty(4096, 8192, dtype=torch.bool) if masked else None
    masked_mha_triton.masked_mha(
        empty(4096, 128, dim), empty(8192, groups, dim), empty(8192, groups, value_dim), 0.1, 4096, mask,
        empty(4096, 128, value_dim), empty(4096, 128, dtype=torch.float32),
    )  # fmt: skip
    assert 0 < kernel.shared <= SHARED_LIMIT
    assert "wgmma" in kernel.ptx
    if dim == 192:
        assert kernel.stack == 0

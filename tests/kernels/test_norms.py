"""RMSNorm and SwiGLU: torch forms, and their Triton kernels without a GPU."""

import pytest
import torch
import torch.nn.functional as F

from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.swiglu import swiglu
from tests.kernels.triton_runs import run_interpreted


@pytest.mark.parametrize("shape", [(1, 8), (5, 192), (2, 3, 64)])
def test_rms_norm_matches_the_reference_and_may_write_into_its_input(shape):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    expected = rms_norm_reference(x, weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)
    assert rms_norm(x, weight, 1e-6, x) is x
    torch.testing.assert_close(x, expected)


def test_half_precision_is_rounded_once():
    x, weight = torch.randn(9, 64).bfloat16(), torch.randn(64).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x.float(), (64,), weight.float(), 1e-6).bfloat16())
    gate, up = torch.randn(2, 9, 64).bfloat16()
    assert torch.equal(swiglu(gate, up, torch.bfloat16), (F.silu(gate.float()) * up.float()).bfloat16())


def test_the_kernels_are_right_in_the_interpreter():
    run_interpreted("norms")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_build_for_hopper(monkeypatch, dtype):
    pytest.importorskip("triton", reason="needs triton")
    from kernels import rms_norm_triton, swiglu_triton
    from tests.kernels.hopper import Build

    for n, h, d in ((64, 1, 7168), (64, 1, 512), (64, 128, 192)):
        kernel = Build(rms_norm_triton.rms_norm_kernel)
        with monkeypatch.context() as patch, torch.device("meta"):
            patch.setattr(rms_norm_triton, "rms_norm_kernel", kernel)
            x = torch.empty(n, h, d, dtype=dtype)
            rms_norm_triton.rms_norm_triton(x, torch.empty(d, dtype=dtype), 1e-6, x)
        assert kernel.registers > 0 and kernel.stack == 0
    kernel = Build(swiglu_triton.silu_times_kernel)
    monkeypatch.setattr(swiglu_triton, "silu_times_kernel", kernel)
    gate = torch.empty(64, 18432, dtype=dtype, device="meta")
    swiglu_triton.swiglu_triton(gate, gate, dtype)
    assert kernel.registers > 0 and kernel.stack == 0

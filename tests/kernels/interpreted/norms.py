"""RMSNorm and SwiGLU in Triton's interpreter."""

import pytest
import torch

from kernels.rms_norm import rms_norm_reference
from kernels.rms_norm_triton import rms_norm_triton
from kernels.swiglu_triton import swiglu_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (37, 192), (3, 7168), (5, 3, 64)])
def test_rows_are_normalised_apart_and_in_place(shape, dtype):
    wide = torch.randn(*shape[:-1], shape[-1] + 8).to(dtype)
    x, weight = wide[..., : shape[-1]], torch.randn(shape[-1])
    before, expected = wide.clone(), rms_norm_reference(x, weight, 1e-6).to(dtype)
    out = torch.empty(shape, dtype=dtype)
    rms_norm_triton(x, weight, 1e-6, out)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=1e-6)
    assert torch.equal(wide, before)
    rms_norm_triton(x, weight, 1e-6, x)
    assert torch.equal(x, out) and torch.equal(wide[..., shape[-1] :], before[..., shape[-1] :])


@pytest.mark.parametrize("shape", [(1, 1), (37, 129), (3, 4096)])
def test_swiglu_is_silu_of_the_gate_times_up(shape):
    gate, up = torch.randn(shape) * 20, torch.randn(shape)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(swiglu_triton(gate, up, torch.float32), expected, rtol=1e-5, atol=1e-6)

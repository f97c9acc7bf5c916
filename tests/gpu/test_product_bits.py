"""Whether the designs of the FP8 product agree to the bit: those that do may serve few and many rows of one model."""

import pytest
import torch

from kernels.fp8 import quantize_e4m3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("design", ["loads_narrow", "tma", "tma_wide", "hopper", "hopper_narrow"])
@pytest.mark.parametrize("s, n, d", [(40, 576, 7168), (300, 1024, 1536)])
def test_a_design_gives_the_bits_of_the_portable_kernel(design, s, n, d):
    from kernels.grouped_gemm_triton import block_matmul_triton

    x, x_scale = quantize_e4m3(torch.randn(s, d, device="cuda"))
    weight = torch.randn(n, d, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 128), -(-d // 128), device="cuda") + 0.5
    actual = block_matmul_triton(x, x_scale, weight, scale, torch.bfloat16, design)
    assert torch.equal(actual, block_matmul_triton(x, x_scale, weight, scale, torch.bfloat16, "loads"))

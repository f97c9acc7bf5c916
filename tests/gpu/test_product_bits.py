"""Whether the designs of the FP8 product agree to the bit: those that do may serve few and many rows of one model."""

import pytest
import torch

from kernels.fp8 import quantize_e4m3

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("design", ["loads_narrow", "tma", "tma_wide", "tma_wide_narrow", "hopper", "hopper_narrow"])
@pytest.mark.parametrize("s, n, d", [(40, 576, 7168), (300, 1024, 1536)])
def test_a_design_gives_the_bits_of_the_portable_kernel(design, s, n, d):
    from kernels.grouped_gemm_triton import block_matmul_triton

    x, x_scale = quantize_e4m3(torch.randn(s, d, device="cuda"))
    weight = torch.randn(n, d, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 128), -(-d // 128), device="cuda") + 0.5
    actual = block_matmul_triton(x, x_scale, weight, scale, torch.bfloat16, design)
    assert torch.equal(actual, block_matmul_triton(x, x_scale, weight, scale, torch.bfloat16, "loads"))


@pytest.mark.parametrize("design", ["tma_wide_narrow", "hopper_narrow"])
@pytest.mark.parametrize("n, d", [(576, 7168), (1536, 7168), (7168, 16384), (200, 1104)])
def test_a_row_has_the_same_bits_among_few_and_among_many(design, n, d):
    from kernels.grouped_gemm_triton import block_matmul_triton

    x, x_scale = quantize_e4m3(torch.randn(700, d, device="cuda"))
    weight = torch.randn(n, d, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 128), -(-d // 128), device="cuda") + 0.5
    many = block_matmul_triton(x, x_scale, weight, scale, torch.bfloat16, design)
    for rows in (slice(0, 1), slice(5, 69), slice(600, 700)):
        few = block_matmul_triton(x[rows].clone(), x_scale[rows].clone(), weight, scale, torch.bfloat16, design)
        assert torch.equal(few, many[rows])

"""FP8 rounding and grouped products in Triton's interpreter (whose casts to FP8 are inexact)."""

import pytest
import torch

from kernels.fp8 import AMAX_FLOOR, E4M3_MAX, block_matmul_reference, quantize_e4m3
from kernels.fp8_triton import quantize_triton
from kernels.grouped_gemm_triton import Groups, block_matmul_triton


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape, group", [((3, 300), 128), ((2, 5, 64), 64), ((40, 128), 128)])
def test_scales_are_those_of_the_reference_to_the_bit(shape, group, power_of_two):
    x = torch.randn(shape) * torch.logspace(-6, 4, shape[0]).view(-1, *[1] * (len(shape) - 1))
    values, scales = quantize_triton(x, group, power_of_two, AMAX_FLOOR, E4M3_MAX)
    expected, expected_scales = quantize_e4m3(x, group, power_of_two=power_of_two)
    assert torch.equal(scales, expected_scales)
    # on a GPU all values are equal to the bit; the interpreter's cast errs for a few below powers of two
    assert (values.float() == expected.float()).float().mean() > 0.9


@pytest.mark.parametrize("s, n, d", [(1, 64, 128), (3, 130, 200)])
def test_block_matmul_matches_the_reference(s, n, d):
    x, x_scale = quantize_e4m3(torch.randn(s, d))
    weight = torch.randn(n, d).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(-(-n // 128), -(-d // 128)) + 0.5
    actual = block_matmul_triton(x, x_scale, weight, weight_scale, torch.float32)
    torch.testing.assert_close(actual, block_matmul_reference(x, x_scale, weight, weight_scale), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 37])
def test_every_row_meets_its_own_weights(rows):
    x, weight = torch.randn(rows, 48), torch.randn(6, 40, 48)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(rows)])
    groups = Groups(experts, 6)
    got = groups.matmul(x, weight, torch.float32, gather=True)
    again = groups.matmul(got, weight[:, :, :40].contiguous(), torch.float32, gather=False)
    for place, slot in enumerate(groups.source.tolist()):
        row, expert = slot // 2, int(experts.flatten()[slot])
        torch.testing.assert_close(got[place], weight[expert] @ x[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again[place], weight[expert, :, :40] @ got[place], rtol=1e-4, atol=1e-3)


def test_fp8_groups_use_their_block_scales():
    (x, x_scale), experts = quantize_e4m3(torch.randn(5, 160)), torch.tensor([[2, 0], [1, 2], [2, 1], [0, 1], [2, 0]])
    weight, scale = torch.randn(3, 140, 160).to(torch.float8_e4m3fn), torch.rand(3, 2, 2) + 0.5
    groups = Groups(experts, 3)
    got = groups.matmul(x, weight, torch.float32, (x_scale, scale), gather=True)
    for place, slot in enumerate(groups.source.tolist()):
        row, expert = slot // 2, int(experts.flatten()[slot])
        expected = block_matmul_reference(x[row : row + 1], x_scale[row : row + 1], weight[expert], scale[expert])
        torch.testing.assert_close(got[place], expected[0], rtol=1e-5, atol=1e-4)

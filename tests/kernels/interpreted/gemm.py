"""FP8 rounding and grouped products in Triton's interpreter (whose casts to FP8 are inexact)."""

import pytest
import torch

from kernels.expert_mlp_triton import combine, expert_mlp_triton, swiglu
from kernels.fp8 import AMAX_FLOOR, E4M3_MAX, block_matmul_reference, dequantize_e4m3, quantize_e4m3
from kernels.fp8_triton import quantize_triton
from kernels.group_rows_triton import group_rows
from kernels.grouped_gemm import expert_mlp_reference
from kernels.grouped_gemm_triton import DESIGNS, Groups, _sort_rows, block_matmul_triton

PORTABLE = [name for name, design in DESIGNS.items() if not design.gluon]  # Gluon has no interpreter


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape, group", [((3, 300), 128), ((2, 5, 64), 64), ((40, 128), 128)])
def test_scales_are_those_of_the_reference_to_the_bit(shape, group, power_of_two):
    x = torch.randn(shape) * torch.logspace(-6, 4, shape[0]).view(-1, *[1] * (len(shape) - 1))
    values, scales = quantize_triton(x, group, power_of_two, AMAX_FLOOR, E4M3_MAX)
    expected, expected_scales = quantize_e4m3(x, group, power_of_two=power_of_two)
    assert torch.equal(scales, expected_scales)
    # on a GPU all values are equal to the bit; the interpreter's cast errs for a few below powers of two
    assert (values.float() == expected.float()).float().mean() > 0.9


@pytest.mark.parametrize("design", PORTABLE)
@pytest.mark.parametrize("s, n, d", [(1, 64, 128), (3, 130, 200), (70, 300, 208)])
def test_block_matmul_matches_the_reference(s, n, d, design):
    x, x_scale = quantize_e4m3(torch.randn(s, d))
    weight = torch.randn(n, d).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(-(-n // 128), -(-d // 128)) + 0.5
    actual = block_matmul_triton(x, x_scale, weight, weight_scale, torch.float32, design)
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


@pytest.mark.parametrize("design", PORTABLE)
def test_fp8_groups_use_their_block_scales(design):
    (x, x_scale), experts = quantize_e4m3(torch.randn(5, 160)), torch.tensor([[2, 0], [1, 2], [2, 1], [0, 1], [2, 0]])
    weight, scale = torch.randn(3, 140, 160).to(torch.float8_e4m3fn), torch.rand(3, 2, 2) + 0.5
    groups = Groups(experts, 3)
    got = groups.matmul(x, weight, torch.float32, (x_scale, scale), gather=True, design=design)
    for place, slot in enumerate(groups.source.tolist()):
        row, expert = slot // 2, int(experts.flatten()[slot])
        expected = block_matmul_reference(x[row : row + 1], x_scale[row : row + 1], weight[expert], scale[expert])
        torch.testing.assert_close(got[place], expected[0], rtol=1e-5, atol=1e-4)


def test_an_unknown_design_is_refused():
    x, scale = torch.zeros(1, 128).to(torch.float8_e4m3fn), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"expected a design of loads, .* got 'fastest'"):
        block_matmul_triton(x, scale, x, scale, torch.float32, "fastest")


def test_swiglu_is_silu_of_the_gate_times_up_and_its_scales_are_exact():
    both = torch.randn(35, 2 * 200)
    expected = torch.nn.functional.silu(both[:, :200]) * both[:, 200:]
    hidden, none = swiglu(both, torch.float32, quantized=False)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)
    assert none is None
    values, scales = swiglu(both, torch.float32, quantized=True)
    assert torch.equal(scales, quantize_e4m3(hidden)[1])
    # the interpreter's cast cuts off where a GPU rounds: an error of up to a whole step
    assert float((dequantize_e4m3(values, scales) - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("rows, choices", [(1, 1), (9, 3), (4, 8)])
def test_weighted_rows_are_summed_in_the_order_of_their_experts(rows, choices):
    experts = torch.stack([torch.randperm(8)[:choices] for _ in range(rows)])
    source = experts.flatten().argsort(stable=True)
    y, weights = torch.randn(rows * choices, 40), torch.rand(choices, rows).T
    expected = torch.zeros(rows, 40)
    for place, slot in enumerate(source.tolist()):
        expected[slot // choices] += y[place] * weights[slot // choices, slot % choices]
    torch.testing.assert_close(combine(y, source.argsort(), weights), expected, rtol=1e-6, atol=1e-6)


def test_float32_experts_match_the_reference():
    gate_up, down = torch.randn(6, 2 * 24, 16) / 4, torch.randn(6, 16, 24) / 4
    x, weights = torch.randn(7, 16), torch.rand(7, 2)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(7)])
    expected = expert_mlp_reference(x, gate_up, down, experts, weights)
    actual = expert_mlp_triton(x, gate_up, down, experts, weights, None)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("num, num_groups", [(1, 1), (7, 5), (300, 3), (257, 256), (600, 20)])
def test_few_rows_are_grouped_as_a_stable_sort_groups_them(num, num_groups, block_m):
    flat = torch.randint(0, num_groups, (num,))
    tiles = -(-num // block_m) + min(num_groups, num)
    source, place, ends, tile_group, tile_first = group_rows(flat, num_groups, tiles, block_m)
    expected = _sort_rows(flat, num_groups, tiles, block_m)
    assert torch.equal(source, expected[0]) and torch.equal(place, expected[1]) and torch.equal(ends, expected[2])
    used = expected[3] < num_groups
    assert torch.equal(tile_group[used], expected[3][used])
    assert torch.equal(tile_first[used], expected[4][used])
    assert bool((tile_group[~used] >= num_groups).all())

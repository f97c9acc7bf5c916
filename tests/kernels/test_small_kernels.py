"""Index scores, Hadamard rotation, FP8 rounding and expert products against their references and known facts."""

import pytest
import torch

from kernels.fp8 import dequantize_blocks, dequantize_e4m3, quantize_e4m3, simulate_e4m3
from kernels.grouped_gemm import expert_mlp, expert_mlp_reference
from kernels.hadamard import hadamard, hadamard_reference
from kernels.index_scores import index_scores, index_scores_reference


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 700), (7, 63), (200, 200)])
@pytest.mark.parametrize("heads, dim", [(16, 32), (4, 128)])
def test_index_scores_match_the_reference(queries, keys, heads, dim):
    q, k, w = torch.randn(queries, heads, dim), torch.randn(keys, dim), torch.randn(queries, heads)
    start = keys - queries
    torch.testing.assert_close(
        index_scores(q, k, w, start), index_scores_reference(q, k, w, start), rtol=1e-4, atol=1e-4
    )


def test_index_scores_hide_the_future():
    scores = index_scores(torch.randn(4, 16, 32), torch.randn(4, 32), torch.rand(4, 16), start=0)
    assert int(torch.isinf(scores).sum()) == 6  # strict upper triangle of 4 x 4


def test_index_scores_name_the_bad_shape():
    with pytest.raises(ValueError, match=r"expected k \[>= 4, 32\]"):
        index_scores(torch.zeros(4, 16, 32), torch.zeros(4, 64), torch.zeros(4, 16), start=0)


@pytest.mark.parametrize("dim", [1, 2, 64, 128])
def test_hadamard_matches_the_matrix_and_keeps_dot_products(dim):
    a, b = torch.randn(5, 3, dim), torch.randn(5, 3, dim)
    torch.testing.assert_close(hadamard(a), hadamard_reference(a), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((hadamard(a) * hadamard(b)).sum(-1), (a * b).sum(-1), rtol=1e-4, atol=1e-4)


def test_hadamard_refuses_a_width_that_is_no_power_of_two():
    with pytest.raises(ValueError, match="power of two, got 48"):
        hadamard(torch.zeros(2, 48))


def test_fp8_scales_are_the_next_power_of_two_and_errors_within_half_a_step():
    x = torch.randn(6, 300) * torch.logspace(-6, 4, 6)[:, None]
    values, scales = quantize_e4m3(x)
    exponents = torch.log2(scales)
    assert torch.equal(exponents, exponents.round())
    raw = torch.nn.functional.pad(x, (0, 84)).unflatten(-1, (3, 128)).abs().amax(-1).clamp_min(1e-4) / 448
    assert bool(((scales >= raw) & (scales < 2 * raw)).all())
    back = dequantize_e4m3(values, scales)
    step = torch.maximum(x.abs() / 16, scales.repeat_interleave(128, -1)[:, :300] * 2**-10)  # 3 mantissa bits
    assert bool(((back - x).abs() <= step * (1 + 1e-6)).all())


def test_fp8_rounding_twice_is_rounding_once():
    x = torch.randn(4, 512)
    assert torch.equal(simulate_e4m3(simulate_e4m3(x)), simulate_e4m3(x))


def test_a_power_of_two_amax_keeps_its_exact_scale():
    _, scales = quantize_e4m3(torch.full((1, 128), 448.0 * 4))
    assert scales.item() == 4.0


def test_block_scales_cover_a_partial_last_block():
    weight = torch.randn(192, 300).clamp(-400, 400).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.5
    got = dequantize_blocks(weight, scales)
    for i, j in [(0, 0), (127, 127), (128, 128), (191, 299), (130, 255), (191, 256)]:
        assert got[i, j] == weight[i, j].float() * scales[i // 128, j // 128]


def test_block_scales_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected scales \[2, 1\]"):
        dequantize_blocks(torch.zeros(192, 128).to(torch.float8_e4m3fn), torch.ones(1, 1))


@pytest.mark.parametrize("rows", [1, 8, 37])
def test_expert_products_match_the_reference(rows):
    gate_up, down = torch.randn(6, 2 * 24, 16) / 4, torch.randn(6, 16, 24) / 4
    x, weights = torch.randn(rows, 16), torch.rand(rows, 2)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(rows)])
    torch.testing.assert_close(
        expert_mlp(x, gate_up, down, experts, weights), expert_mlp_reference(x, gate_up, down, experts, weights),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_an_expert_row_has_the_same_bits_whoever_shares_the_step():
    gate_up, down = torch.randn(6, 2 * 24, 16), torch.randn(6, 16, 24)
    x, weights = torch.randn(8, 16), torch.rand(8, 2)
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(8)])
    together = expert_mlp(x, gate_up, down, experts, weights)
    for i in range(8):
        others = torch.cat((x[i : i + 1], torch.randn(3, 16)))
        alone = expert_mlp(others, gate_up, down, torch.cat((experts[i : i + 1], experts[:3])), weights[[i, 0, 1, 2]])
        assert torch.equal(alone[0], together[i])

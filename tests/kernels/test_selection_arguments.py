"""What selection kernels take: FP8, key scales, positions, pages; and how they refuse the rest, naming it."""

import pytest
import torch

from kernels.attention_mass import attention_mass, attention_mass_paged, attention_mass_reference
from kernels.fp8 import block_matmul, block_matmul_reference, dequantize_blocks, quantize_e4m3, simulate_e4m3
from kernels.grouped_gemm import expert_mlp, expert_mlp_reference
from kernels.index_scores import index_scores, index_scores_reference
from kernels.index_scores_paged import (
    PAGE,
    index_scores_paged,
    index_scores_paged_reference,
    page_bytes,
    read_index_pages,
    write_index_pages,
)
from kernels.topk import topk, topk_mask

E4M3 = torch.float8_e4m3fn
POSITIONS = torch.tensor([149, -1, 0, 64, 63, 500])


@pytest.mark.parametrize("start", [144, POSITIONS])
@pytest.mark.parametrize("scaled", [True, False])
def test_fp8_index_scores_with_key_scales_match_the_reference(start, scaled):
    q, k, w = torch.randn(6, 16, 32).to(E4M3), torch.randn(150, 32).to(E4M3), torch.randn(6, 16)
    scale = torch.rand(150) if scaled else None
    expected = index_scores_reference(q, k, w, start, scale)
    torch.testing.assert_close(index_scores(q, k, w, start, scale), expected, rtol=1e-5, atol=1e-4)


def test_a_key_scale_of_zero_hides_no_key_and_shows_none():
    q, k, w = torch.randn(4, 4, 16), torch.randn(4, 16), torch.rand(4, 4)
    scores = index_scores(q, k, w, 0, torch.zeros(4))
    assert torch.equal(scores.isneginf(), torch.ones(4, 4, dtype=torch.bool).triu(1))


def test_pages_hold_keys_then_scales_as_the_published_layout_says():
    pages = torch.zeros(2, page_bytes(128), dtype=torch.uint8)
    assert pages.shape[1] == 64 * 132
    values, scales = torch.randn(3, 128).to(E4M3), torch.tensor([1.5, 2.5, 3.5])
    write_index_pages(pages, torch.tensor([1, 64, 127]), values, scales)
    assert torch.equal(pages[0, 128:256], values[0].view(torch.uint8))
    assert torch.equal(pages[1, 63 * 128 : 64 * 128], values[2].view(torch.uint8))
    assert pages[1, 64 * 128 : 64 * 128 + 4].clone().view(torch.float32).item() == 2.5
    found, found_scales = read_index_pages(pages, torch.tensor([1, 0], dtype=torch.int32), 66)
    assert torch.equal(found[0].view(torch.uint8), values[1].view(torch.uint8))
    assert found_scales[[0, 63, 65]].tolist() == [2.5, 3.5, 1.5]


def test_paged_index_scores_match_the_reference():
    pages = torch.zeros(12, page_bytes(32), dtype=torch.uint8)
    write_index_pages(pages, torch.arange(12 * PAGE), torch.randn(12 * PAGE, 32).to(E4M3), torch.rand(12 * PAGE))
    tables = torch.randperm(12).view(3, 4).to(torch.int32)
    q, w, lengths = torch.randn(3, 8, 32).to(E4M3), torch.randn(3, 8), torch.tensor([130, 0, 200], dtype=torch.int32)
    expected = index_scores_paged_reference(q, pages, w, tables, lengths, 201)
    torch.testing.assert_close(index_scores_paged(q, pages, w, tables, lengths, 201), expected, rtol=1e-5, atol=1e-4)


def test_attention_mass_of_rows_at_any_position():
    q, k, positions = torch.randn(4, 6, 16), torch.randn(90, 3, 16), torch.tensor([89, -1, 0, 40])
    mass = attention_mass(q, k, 0.25, positions)
    torch.testing.assert_close(mass, attention_mass_reference(q, k, 0.25, positions), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass.sum(1), torch.tensor([1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_paged_index_scores_of_plain_keys_match_the_reference(dtype, error):
    pages, tables = torch.randn(12, PAGE, 48).to(dtype), torch.randperm(12).view(3, 4).to(torch.int32)
    q, w, lengths = torch.randn(3, 5, 48).to(dtype), torch.randn(3, 5), torch.tensor([130, 0, 200], dtype=torch.int32)
    expected = index_scores_paged_reference(q, pages, w, tables, lengths, 201)
    actual = index_scores_paged(q, pages, w, tables, lengths, 201)
    assert torch.equal(actual.isneginf(), expected.isneginf())
    seen = ~expected.isneginf()
    assert (actual - expected)[seen].norm() < error * expected[seen].norm()
    assert torch.equal(index_scores_paged(q[2:], pages, w[2:], tables[2:], lengths[2:], 256)[0, :201], actual[2])


@pytest.mark.parametrize("groups", [1, 3])
def test_paged_attention_mass_is_that_of_each_sequences_own_keys(groups):
    rows, tables = torch.randn(10 * PAGE, groups * 16 + 8), torch.randperm(10)[:9].view(3, 3).to(torch.int32)
    k = rows[:, 8:].unflatten(1, (groups, 16))
    q, lengths = torch.randn(3, 6, 16), torch.tensor([130, 0, 192], dtype=torch.int32)
    mass = attention_mass_paged(q, k, 0.25, tables, lengths)
    torch.testing.assert_close(mass.sum(1), torch.tensor([1.0, 0.0, 1.0]))
    for i in (0, 2):
        own = torch.cat([k[PAGE * p : PAGE * (p + 1)] for p in tables[i].tolist()])[: lengths[i]]
        expected = attention_mass_reference(q[i : i + 1], own, 0.25, int(lengths[i]) - 1)[0]
        torch.testing.assert_close(mass[i, : lengths[i]], expected, rtol=1e-5, atol=1e-6)
        assert not mass[i, lengths[i] :].any()


def test_block_matmul_is_the_product_of_what_the_scales_say():
    x, x_scale = quantize_e4m3(torch.randn(5, 200))
    weight, scale = torch.randn(130, 200).to(E4M3), torch.rand(2, 2)
    got = block_matmul(x, x_scale, weight, scale, torch.float32)
    wide = scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :200]
    expected = (x.float() * x_scale.repeat_interleave(128, 1)[:, :200]) @ (weight.float() * wide).T
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(block_matmul_reference(x, x_scale, weight, scale), expected, rtol=1e-5, atol=1e-4)


def test_fp8_experts_round_what_they_multiply():
    gate_up, down = torch.randn(3, 256, 64).to(E4M3), torch.randn(3, 64, 128).to(E4M3)
    scales = (torch.rand(3, 2, 1) / 50, torch.rand(3, 1, 1) / 50)
    x, experts, weights = torch.randn(4, 64), torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0]]), torch.rand(4, 2)
    got = expert_mlp(x, gate_up, down, experts, weights, scales)
    first = torch.stack([dequantize_blocks(gate_up[e], scales[0][e]) for e in range(3)])
    second = torch.stack([dequantize_blocks(down[e], scales[1][e]) for e in range(3)])
    unrounded = expert_mlp_reference(x, first, second, experts, weights)
    assert 0 < (got - unrounded).norm() / unrounded.norm() < 0.1
    row = torch.zeros(64)
    for e, weight in zip(experts[1].tolist(), weights[1], strict=True):
        gate, up = (first[e] @ simulate_e4m3(x[1])).chunk(2)
        row += weight * (second[e] @ simulate_e4m3(torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(got[1], row, rtol=1e-4, atol=1e-4)


Q, K, W = torch.zeros(2, 4, 32), torch.zeros(9, 32), torch.zeros(2, 4)
Q8, PAGES = Q.to(E4M3), torch.zeros(3, page_bytes(32), dtype=torch.uint8)
KEYS = torch.zeros(PAGE, 1, 32)
TABLES, LENGTHS = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
SCORES, VISIBLE = torch.zeros(2, 9), torch.tensor([8, 9])
X, WEIGHT = torch.zeros(2, 128).to(E4M3), torch.zeros(64, 128).to(E4M3)
ONE = torch.ones(2, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: index_scores(Q.int(), K, W, 0), "index_scores: expected q in float32 or .*, got int32"),
        (lambda: index_scores(Q, K.half(), W, 0), "index_scores: expected k in float32, got float16"),
        (lambda: index_scores(Q, K, W.half(), 0), "index_scores: expected w in float32, got float16"),
        (lambda: index_scores(Q, K[:, :16], W, 0), r"index_scores: expected k \[>= 2, 32\]"),
        (lambda: index_scores(Q, K, W, -1), "index_scores: expected start of at least 0, got -1"),
        (lambda: index_scores(Q, K, W, torch.zeros(3).long()), r"expected start \[2\], got \[3\]"),
        (lambda: index_scores(Q, K, W, 0, torch.ones(8)), r"expected k_scale \[9\], got \[8\]"),
        (lambda: index_scores(Q, K.to("meta"), W, 0), "expected k on cpu, got meta"),
        (lambda: topk(SCORES, 0, VISIBLE), "topk: expected k of at least 1, got 0"),
        (lambda: topk(SCORES.double(), 1, VISIBLE), "topk: expected scores in float32, got float64"),
        (lambda: topk(SCORES.T, 1, VISIBLE), "topk: expected scores with stride 1 on the last axis"),
        (lambda: topk_mask(SCORES, 1, VISIBLE[:1]), r"topk_mask: expected visible \[2\], got \[1\]"),
        (lambda: attention_mass(Q, K, 1.0, 0), r"attention_mass: expected k \[t, g, 32\], got \[9, 32\]"),
        (lambda: attention_mass(Q, torch.zeros(9, 3, 32), 1.0, 0), "multiple of k's 3, got 4"),
        (lambda: attention_mass_paged(Q, K[:, None], 1.0, TABLES, LENGTHS), "whole pages of 64 keys, got 9 keys"),
        (lambda: attention_mass_paged(Q, KEYS, 1.0, TABLES, LENGTHS + 192), r"lengths in 0..192, got 193 at \[0\]"),
        (lambda: attention_mass_paged(Q, KEYS, 1.0, TABLES + 1, LENGTHS), r"tables\[0\] in 0..0, got 1 at \[0\]"),
        (lambda: index_scores_paged(Q.int(), PAGES, W, TABLES, LENGTHS, 9), "expected q in float8_e4m3fn or .*int32"),
        (lambda: index_scores_paged(Q, PAGES, W, TABLES, LENGTHS, 9), r"expected pages \[n, 64, 32\], got \[3, 2304\]"),
        (lambda: index_scores_paged(Q8, PAGES[:, 1:], W, TABLES, LENGTHS, 9), r"expected pages \[n, 2304\]"),
        (lambda: index_scores_paged(Q8, PAGES, W, TABLES, LENGTHS, 193), "num_keys in 0..192, got 193"),
        (lambda: index_scores_paged(Q8, PAGES, W, TABLES, LENGTHS + 9, 9), r"lengths in 0..9, got 10 at \[0\]"),
        (lambda: index_scores_paged(Q8, PAGES, W, TABLES + 3, LENGTHS, 9), r"tables\[0\] in 0..2, got 3 at \[0\]"),
        (lambda: write_index_pages(PAGES, torch.tensor([192]), K[:1].to(E4M3), ONE[0]), r"slots in 0..191, got 192"),
        (lambda: block_matmul(X, ONE, WEIGHT, ONE[:, 0]), r"expected weight_scale \[1, 1\], got \[2\]"),
        (lambda: block_matmul(X.float(), ONE, WEIGHT, ONE[:1]), "expected x in float8_e4m3fn, got float32"),
        (lambda: expert_mlp(torch.zeros(2, 8), torch.zeros(3, 4, 8), torch.zeros(3, 8, 3), VISIBLE[:, None], ONE),
         r"expert_mlp: expected down \[3, 8, 2\], got \[3, 8, 3\]"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()

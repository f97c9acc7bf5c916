"""The index score kernels in Triton's interpreter (which cannot compute in bfloat16)."""

import pytest
import torch

from kernels.index_scores import index_scores_reference
from kernels.index_scores_paged import PAGE, index_scores_paged_reference, page_bytes, write_index_pages
from kernels.index_scores_paged_triton import DESIGNS, index_scores_paged_triton
from kernels.index_scores_triton import Tile, index_scores_triton


def inputs(s, t, h, d, dtype):
    return torch.randn(s, h, d).to(dtype), torch.randn(t, d).to(dtype), torch.randn(s, h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("s, t, h, d", [(1, 1, 4, 16), (3, 129, 64, 128), (5, 63, 9, 48), (9, 200, 128, 32)])
def test_scores_match_the_reference(s, t, h, d, dtype):
    q, k, w = inputs(s, t, h, d, dtype)
    start = max(0, t - s)
    expected = index_scores_reference(q, k, w, start)
    torch.testing.assert_close(index_scores_triton(q, k, w, start), expected, rtol=1e-5, atol=1e-4)


def test_key_scales_and_positions_of_any_order_are_used():
    q, k, w = inputs(6, 150, 32, 64, torch.float8_e4m3fn)
    position, scale = torch.tensor([149, -1, 0, 64, 63, 500]), torch.rand(150)
    actual = index_scores_triton(q, k, w, position, scale)
    torch.testing.assert_close(actual, index_scores_reference(q, k, w, position, scale), rtol=1e-5, atol=1e-4)
    assert bool(actual[1].isneginf().all())


@pytest.mark.parametrize("s, t, h, d", [(3, 150, 64, 128), (9, 200, 16, 48)])
def test_keys_by_tma_score_alike(s, t, h, d):
    q, k, w = inputs(s, t, h, d, torch.float8_e4m3fn)
    position, scale = torch.randint(-1, t + 20, (s,)), torch.rand(t)
    for start, k_scale in ((t - s, None), (t - s, scale), (position, scale)):
        expected = index_scores_reference(q, k, w, start, k_scale)
        actual = index_scores_triton(q, k, w, start, k_scale, design="tma")
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_an_unknown_design_is_refused():
    with pytest.raises(ValueError, match=r"expected a design of loads, .* got 'fastest'"):
        index_scores_triton(*inputs(1, 1, 4, 16, torch.float16), 0, design="fastest")


def test_several_ranges_of_keys_and_other_tiles_score_alike():
    q, k, w = inputs(2, 1300, 16, 32, torch.float16)
    scores = index_scores_triton(q, k, w, 1298)
    other = index_scores_triton(q, k, w, 1298, tile=Tile(keys=128, columns=16, num_warps=4, num_stages=1))
    torch.testing.assert_close(scores, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("h, d", [(64, 128), (5, 32), (3, 48), (3, 144)])
def test_paged_scores_match_the_reference(h, d, design):
    lengths = torch.tensor([130, 0, 64, 1, 200], dtype=torch.int32)
    pages, tables = filled_pages(20, d, 5, 4)
    q, w = torch.randn(5, h, d).to(torch.float8_e4m3fn), torch.randn(5, h)
    for num_keys in (200, 201, 256):
        expected = index_scores_paged_reference(q, pages, w, tables, lengths, num_keys)
        actual = index_scores_paged_triton(q, pages, w, tables, lengths, num_keys, design)
        torch.testing.assert_close(known(actual, lengths), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("programs", [1, 2, 3, 8])
def test_paged_scores_do_not_depend_on_who_computes_them_nor_on_rows_without_keys(monkeypatch, programs, design):
    lengths = torch.tensor([0, 130, 0, 0, 700, 1, 0], dtype=torch.int32)
    pages, tables = filled_pages(84, 32, 7, 12)
    q, w = torch.randn(7, 5, 32).to(torch.float8_e4m3fn), torch.randn(7, 5)
    expected = index_scores_paged_triton(q, pages, w, tables, lengths, 768)
    tables = torch.where(torch.arange(12) * PAGE < lengths[:, None], tables, 1 << 30)  # an address out of bounds
    monkeypatch.setattr("kernels.index_scores_paged_triton.PROGRAMS_AN_SM", programs)
    monkeypatch.setattr("kernels.index_scores_paged_triton.ROUNDS", 1)
    monkeypatch.setattr("kernels.index_scores_paged_triton.MAX_PAGES_A_PROGRAM", 1 << 10)
    monkeypatch.setattr("kernels.index_scores_paged_triton.PROGRAMS_AHEAD", programs)
    monkeypatch.setattr("kernels.index_scores_paged_triton.PAGES_AHEAD", 1 << 10)
    actual = index_scores_paged_triton(q, pages, w, tables, lengths, 768, design)
    assert torch.equal(known(actual, lengths), known(expected, lengths))
    assert bool(known(actual, lengths)[4, :700].isfinite().all())


@pytest.mark.parametrize("design", DESIGNS)
def test_nothing_is_written_behind_a_length_and_strided_pages_are_read(monkeypatch, design):
    lengths = torch.tensor([70, 0, 129, 64], dtype=torch.int32)
    pages, tables = filled_pages(12, 64, 4, 3)
    q, w = torch.randn(4, 9, 64).to(torch.float8_e4m3fn), torch.randn(4, 9)
    expected = index_scores_paged_reference(q, pages, w, tables, lengths, 192)
    for gap in (0, 16, 512):
        apart = torch.zeros(12, pages.shape[1] + gap, dtype=torch.uint8)[:, : pages.shape[1]].copy_(pages)
        out = torch.full((4, 192), 7.0)
        monkeypatch.setattr("kernels.index_scores_paged_triton.empty_scores", lambda *_, out=out: out)
        index_scores_paged_triton(q, apart, w, tables, lengths, 192, design)
        torch.testing.assert_close(known(out, lengths), expected, rtol=1e-5, atol=1e-4)
        assert bool((out[expected.isneginf()] == 7).all())


def test_an_unknown_design_of_paged_scores_is_refused():
    pages, tables = filled_pages(1, 32, 1, 1)
    q, w, lengths = torch.zeros(1, 4, 32).to(torch.float8_e4m3fn), torch.zeros(1, 4), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"index_scores_paged: expected a design of loads, .* got 'fastest'"):
        index_scores_paged_triton(q, pages, w, tables, lengths, 64, "fastest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("h, d", [(64, 128), (4, 64), (5, 24)])
def test_paged_scores_of_plain_keys_match_the_reference(h, d, dtype):
    lengths = torch.tensor([130, 0, 64, 1, 200], dtype=torch.int32)
    pages, tables = torch.randn(20, PAGE, d).to(dtype), torch.randperm(20).view(5, 4).to(torch.int32)
    q, w = torch.randn(5, h, d).to(dtype), torch.randn(5, h)
    for num_keys in (200, 256):
        expected = index_scores_paged_reference(q, pages, w, tables, lengths, num_keys)
        actual = index_scores_paged_triton(q, pages, w, tables, lengths, num_keys)
        torch.testing.assert_close(known(actual, lengths), expected, rtol=1e-5, atol=1e-4)


def known(scores, lengths):
    """Scores that the kernel has written, and -inf behind them."""
    return torch.where(torch.arange(scores.shape[1]) < lengths[:, None], scores, float("-inf"))


def filled_pages(num, d, sequences, pages_each):
    """Random keys and scales in all pages, and page tables without a page twice."""
    pages = torch.zeros(num, page_bytes(d), dtype=torch.uint8)
    slots = torch.arange(num * PAGE)
    write_index_pages(pages, slots, torch.randn(len(slots), d).to(torch.float8_e4m3fn), torch.rand(len(slots)))
    return pages, torch.randperm(num)[: sequences * pages_each].view(sequences, pages_each).to(torch.int32)

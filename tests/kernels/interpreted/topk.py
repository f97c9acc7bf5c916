"""The top-k kernel in Triton's interpreter."""

import pytest
import torch

from kernels import topk_bounded_triton as bounded
from kernels import topk_triton as module
from kernels.topk import topk_reference
from kernels.topk_triton import DESIGNS, topk_triton
from tests.kernels.test_topk import KINDS, adversarial


@pytest.fixture(params=DESIGNS)
def design(request, monkeypatch):
    """Each design by name, with rows and parts small enough that short rows meet every path."""
    monkeypatch.setattr(module, "ROW", 2048)
    monkeypatch.setattr(module, "PART", 1024)
    monkeypatch.setattr(module, "PARTS_AT_ONCE", 6)
    monkeypatch.setattr(module, "DESIGN", request.param)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, cols, k", [(1, 1, 1), (1, 129, 64), (5, 63, 16), (2, 5001, 100), (1, 9003, 1500)])
def test_topk_is_the_stable_sort_of_visible_scores(design, kind, rows, cols, k):
    scores = adversarial(kind, rows, cols)
    visible = torch.arange(cols - rows + 1, cols + 1, dtype=torch.int32)
    assert torch.equal(topk_triton(scores, k, visible), topk_reference(scores, k, visible))


def test_rows_see_nothing_little_or_all(design):
    scores = torch.randn(6, 3000)
    visible = torch.tensor([0, 1, 64, 65, 2999, 3000], dtype=torch.int32)
    assert torch.equal(topk_triton(scores, 64, visible), topk_reference(scores, 64, visible))


def test_what_lies_behind_the_visible_keys_never_matters(design):
    scores, visible = torch.randn(2, 4100), torch.tensor([3001, 4097], dtype=torch.int32)
    poisoned = scores.clone()
    poisoned[0, 3001:], poisoned[1, 4097:] = float("nan"), float("inf")
    assert torch.equal(topk_triton(poisoned, 50, visible), topk_triton(scores, 50, visible))


@pytest.mark.parametrize("make", [lambda n: torch.arange(float(n)), lambda n: -torch.arange(float(n))])
def test_a_sample_that_misleads_is_corrected(design, make):
    # the sample sees no score of the few high ones, or mostly those
    scores = torch.zeros(2, 6000)
    scores[:, 5000:] = make(1000) + torch.tensor([[1e-3], [1e3]])
    visible = torch.full((2,), 6000, dtype=torch.int32)
    for k in (7, 900, 1200):
        assert torch.equal(topk_triton(scores, k, visible), topk_reference(scores, k, visible))


def test_the_bracket_is_halved_when_the_sample_is_of_no_use(design, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED_TRIES", 0)
    scores, visible = torch.randn(1, 5000) * 1e20, torch.tensor([5000], dtype=torch.int32)
    assert torch.equal(topk_triton(scores, 300, visible), topk_reference(scores, 300, visible))


def test_rows_that_are_not_aligned_are_read_alike(design):
    scores = torch.randn(3, 2503)
    visible = torch.tensor([2500, 2502, 2503], dtype=torch.int32)
    for view in (scores, torch.nn.functional.pad(scores, (3, 2))[:, 3:2506]):
        assert torch.equal(topk_triton(view, 100, visible), topk_reference(scores, 100, visible))


def test_a_program_with_several_rows_keeps_them_apart(design, monkeypatch):
    monkeypatch.setattr(module, "BUSY_ROWS", 1)
    monkeypatch.setattr(module, "NARROW_PROGRAMS", 2)
    scores, visible = torch.randn(7, 2300), torch.tensor([2300, 10, 2100, 0, 2299, 64, 2050], dtype=torch.int32)
    assert torch.equal(topk_triton(scores, 64, visible), topk_reference(scores, 64, visible))


def test_the_best_may_all_be_in_one_part_or_begin_and_end_in_several(design):
    scores, visible = torch.rand(3, 5000), torch.tensor([5000, 4097, 2049], dtype=torch.int32)
    scores[0, 3000:3100] += 5
    scores[1, 1000:1050] += 5
    assert torch.equal(topk_triton(scores, 80, visible), topk_reference(scores, 80, visible))


def test_k_may_be_larger_than_a_row_that_fits(design):
    scores, visible = torch.randn(2, 5000), torch.tensor([5000, 3000], dtype=torch.int32)
    assert torch.equal(topk_triton(scores, 2500, visible), topk_reference(scores, 2500, visible))


@pytest.mark.parametrize("kind", KINDS)
def test_histograms_of_keys_find_the_cut_when_the_sample_is_of_no_use(kind, monkeypatch):
    monkeypatch.setattr(bounded, "FAST_TRIES", bounded.tl.constexpr(0))
    monkeypatch.setattr(module, "WIDE_LIST", 256)
    monkeypatch.setattr(module, "MIN_LIST", 256)
    monkeypatch.setattr(module, "ROW", 0)
    monkeypatch.setattr(module, "BOUNDED_SPLIT_ROWS", 0)
    scores, visible = adversarial(kind, 2, 5003), torch.tensor([5003, 4999], dtype=torch.int32)
    scores[1] *= 1e20
    for k in (7, 100):
        assert torch.equal(topk_triton(scores, k, visible, "bounded"), topk_reference(scores, k, visible))


@pytest.mark.parametrize("tries, narrowed", [(0, True), (1, True), (2, False)])
def test_a_pivot_that_missed_is_corrected_by_its_count(monkeypatch, tries, narrowed):
    calls = []
    narrow = bounded._narrow.fn

    def counted(*args):
        calls.append(args)
        return narrow(*args)

    monkeypatch.setattr(bounded, "_narrow", counted)
    monkeypatch.setattr(bounded, "FAST_TRIES", bounded.tl.constexpr(tries))
    monkeypatch.setattr(module, "ROW", 0)
    monkeypatch.setattr(module, "BOUNDED_SPLIT_ROWS", 0)
    monkeypatch.setattr(module, "WIDE_LIST", 1024)
    monkeypatch.setattr(module, "MIN_LIST", 1024)
    torch.manual_seed(0)  # one row in a hundred misses twice
    scores, visible = torch.randn(1, 6000), torch.tensor([6000], dtype=torch.int32)
    groups, stride = 256, 6000 // 1024  # where `_pivot` looks: most of it is hidden, so that it guesses too low
    jitter = ((torch.arange(groups) * 0x9E3779B1 % 2**32) >> 8) % stride
    sampled = ((torch.arange(groups) * stride + jitter)[:, None] * 4 + torch.arange(4)).flatten()
    scores[0, sampled[torch.rand(1024) < 0.6]] = -9.0
    assert torch.equal(topk_triton(scores, 500, visible, "bounded"), topk_reference(scores, 500, visible))
    assert bool(calls) == narrowed


@pytest.mark.parametrize("design", ["pairs_16", "large_parts_16"])
def test_the_kth_score_is_found_among_equal_infinite_and_next_to_equal_ones(design):
    row = torch.randn(900)
    close = torch.full((900,), 1.0)
    close[::7] = 1.0 + 2**-23  # the next float32
    zeros = torch.zeros(900)
    zeros[::2] = -0.0
    zeros[:30], zeros[30:60] = -1.0, 1.0
    infinite = row.clone()
    infinite[:50], infinite[50:100], infinite[100:150] = float("inf"), float("-inf"), float("nan")
    scores = torch.stack([row, close, zeros, infinite, row * 1e38, row * 1e-42])
    visible = torch.full((6,), 900, dtype=torch.int32)
    for k in (1, 2, 29, 31, 50, 51, 129, 130, 750, 801, 899):
        assert torch.equal(topk_triton(scores, k, visible, design), topk_reference(scores, k, visible))


def test_large_parts_are_as_many_as_work_at_once(monkeypatch):
    grids = []
    kernel = module.topk_parts_kernel

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "topk_parts_kernel", Counted())
    monkeypatch.setattr(module, "ROW", 256)
    monkeypatch.setattr(module, "PART", 512)
    monkeypatch.setattr(module, "WIDE_LIST", 256)
    monkeypatch.setattr(module, "MIN_LIST", 256)
    monkeypatch.setattr(module, "PARTS_AT_ONCE", 16)
    for rows in (1, 4, 7, 40):
        scores, visible = torch.randn(rows, 4000), torch.randint(0, 4001, (rows,), dtype=torch.int32)
        visible[0] = 4000
        assert torch.equal(topk_triton(scores, 60, visible, "large_parts_16"), topk_reference(scores, 60, visible))
    assert grids == [(1, 8), (4, 4), (7, 2)]  # a row each where there are more rows than places

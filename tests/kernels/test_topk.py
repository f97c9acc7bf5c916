"""Top-k keys: exact, by (score, then smaller index), whatever the scores look like."""

import pytest
import torch

from kernels.topk import mask_to_ids, topk, topk_mask, topk_ranks, topk_reference


def adversarial(kind: str, rows: int, cols: int) -> torch.Tensor:
    """Score rows on which radix selection and arbitrary tie-breaking go wrong."""
    scores = torch.randn(rows, cols)
    if kind == "all equal":
        return torch.full_like(scores, 0.25)
    if kind == "zeros of both signs":
        return torch.where(scores > 0, 0.0, -0.0)
    if kind == "one value with ties":
        return scores.mul(2).round().div(2)
    if kind == "mostly relu zeros":
        return torch.where(scores > 1.5, scores, 0.0)
    if kind == "with nan and infinities":
        scores[scores > 1.0] = float("nan")
        scores[scores < -1.5] = float("-inf")
        scores[:, :3] = float("inf")
    return scores


KINDS = [
    "random",
    "all equal",
    "zeros of both signs",
    "one value with ties",
    "mostly relu zeros",
    "with nan and infinities",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, cols, k", [(1, 1, 1), (1, 129, 64), (64, 64, 16), (5, 6000, 2048), (33, 100, 128)])
def test_topk_is_the_stable_sort_of_visible_scores(kind, rows, cols, k):
    scores = adversarial(kind, rows, cols)
    visible = torch.arange(cols - rows + 1, cols + 1)
    assert torch.equal(topk(scores, k, visible), topk_reference(scores, k, visible))


@pytest.mark.parametrize("kind", KINDS)
def test_future_keys_never_matter(kind):
    scores = adversarial(kind, 8, 200)
    visible = torch.arange(193, 201)
    poisoned = scores.clone()
    for i, n in enumerate(visible.tolist()):
        poisoned[i, n:] = float("nan")
    assert torch.equal(topk_mask(scores, 50, visible), topk_mask(poisoned, 50, visible))


def test_rows_of_any_positions_choose_within_what_they_see():
    scores = torch.randn(4, 300)
    visible = torch.tensor([3, 64, 65, 290])
    mask = topk_mask(scores, 64, visible)
    assert mask.sum(1).tolist() == [3, 64, 64, 64]
    assert torch.equal(topk(scores, 64, visible), topk_reference(scores, 64, visible))


def test_ids_are_ascending_with_minus_one_last():
    mask = torch.tensor([[True, False, True, True], [False, True, False, False], [False, False, False, False]])
    assert mask_to_ids(mask, 3).tolist() == [[0, 2, 3], [1, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, cols, k", [(1, 1, 3), (5, 600, 200), (33, 100, 128)])
def test_ranks_hold_the_choices_of_all_smaller_k(kind, rows, cols, k):
    scores = adversarial(kind, rows, cols)
    visible = torch.arange(cols - rows + 1, cols + 1).clamp_min(0)
    ranks = topk_ranks(scores, k, visible)
    assert ranks.dtype == torch.int32
    for smaller in (1, 2, k // 2, k):
        assert torch.equal(ranks < smaller, topk_mask(scores, smaller, visible))
    assert int(ranks.max()) <= k

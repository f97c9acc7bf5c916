"""Which k keys have the largest score: an exact, ordered choice, ties to the smaller index."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from kernels.check import check_tensor
from kernels.switch import takes_kernels


def topk_reference(scores: torch.Tensor, k: int, visible: torch.Tensor) -> torch.Tensor:
    """Plain meaning of `topk`: a stable descending sort of the visible keys, the first k, ascending, -1 last.

    -0.0 equals +0.0; NaN counts as -inf. Row i sees keys 0..visible[i] - 1.
    """
    s, _ = scores.shape
    ids = torch.full((s, k), -1, dtype=torch.int32)
    for i in range(s):
        row = scores[i, : int(visible[i])].float()
        row = torch.where(row.isnan(), float("-inf"), row) + 0.0
        chosen = row.sort(descending=True, stable=True).indices[:k].sort().values
        ids[i, : len(chosen)] = chosen.to(torch.int32)
    return ids


def topk_mask(scores: torch.Tensor, k: int, visible: torch.Tensor) -> torch.Tensor:
    """The k best visible keys of every query as a mask.

    Args:
        scores: [s, t], float32; the entries of future keys do not matter. NaN counts as -inf, -0.0 equals +0.0.
        k: keys to choose, >= 1.
        visible: [s], int; row i sees the first n = visible[i] keys and chooses all of them if n <= k.

    Returns:
        [s, t], bool, min(k, n) true in each row; equal scores go to the smaller index.

    Raises:
        ValueError: a wrong shape, dtype, device or k.
    """
    _check("topk_mask", scores, k, visible)
    s, t = scores.shape
    if takes_kernels(scores):
        mask = torch.zeros(s, t + 1, dtype=torch.bool, device=scores.device)  # the last column takes the -1
        ids = topk(scores, k, visible).long()
        return mask.scatter_(1, torch.where(ids < 0, t, ids), True)[:, :t]
    cols = torch.arange(t, device=scores.device)[None, :]
    if t <= k or s == 0:
        return cols < visible[:, None]
    clean = scores.nan_to_num(-math.inf, math.inf, -math.inf).add_(0.0)
    known = min(max(int(visible.min()), 0), t)  # keys before it are seen by every row
    future = cols[:, known:] >= visible[:, None]
    clean[:, known:].masked_fill_(future, -math.inf)
    if clean.is_cuda:
        kth = clean.topk(k, 1).values[:, -1:]
    else:  # numpy's partition is several times faster than torch's on a CPU; the k-th value is the same number
        kth = torch.from_numpy(np.partition(clean.numpy(), t - k, axis=1)[:, t - k].copy())[:, None]
    mask = clean >= kth
    mask[:, known:].masked_fill_(future, False)
    excess = torch.nonzero(mask.sum(1, dtype=torch.int32) > k).flatten()
    if len(excess):
        above = (clean[excess] > kth[excess]) & mask[excess]
        ties = mask[excess] & ~above
        room = k - above.sum(1, keepdim=True)
        mask[excess] = above | (ties & (ties.cumsum(1) <= room))
    return mask


def mask_to_ids(mask: torch.Tensor, k: int) -> torch.Tensor:
    """A mask [s, t] with at most k true in each row -> ids [s, k], int32, ascending, -1 last."""
    s = mask.shape[0]
    if s == 1 and not mask.is_cuda:  # an answer's token: two calls in place of nine
        chosen = mask[0].nonzero().to(torch.int32).view(1, -1)
        return F.pad(chosen, (0, k - chosen.shape[1]), value=-1)
    counts = mask.sum(1)
    row, col = torch.nonzero(mask, as_tuple=True)
    slot = torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]
    ids = torch.full((s, k), -1, dtype=torch.int32, device=mask.device)
    ids[row, slot] = col.to(torch.int32)
    return ids


def topk(scores: torch.Tensor, k: int, visible: torch.Tensor) -> torch.Tensor:
    """The k best visible keys of every query: ids [s, k], int32, ascending, -1 last. Arguments as `topk_mask`.

    On a GPU the scores are read about once; rows should start at multiples of 16 bytes, as `index_scores` gives them.
    """
    _check("topk", scores, k, visible)
    if takes_kernels(scores):
        from kernels.topk_triton import topk_triton

        return topk_triton(scores, k, visible.to(torch.int32))
    return mask_to_ids(topk_mask(scores, k, visible), k)


def topk_ranks(scores: torch.Tensor, k: int, visible: torch.Tensor) -> torch.Tensor:
    """Places of the k best visible keys of every query: one choice that holds those of all smaller k.

    Args: as `topk_mask`.

    Returns:
        [s, t], int32: 0 for the best key, k for keys that are not among the k best. `topk_ranks(...) < j` equals
        `topk_mask(scores, j, visible)` for every j up to k.
    """
    s, t = scores.shape
    ids = topk(scores, k, visible).long()
    known = ids >= 0
    found = scores.gather(1, ids.clamp_min(0))
    found = torch.where(known & ~found.isnan(), found, float("-inf")) + 0.0
    # ids ascend and -1 stands last, so a stable sort gives equal scores to the smaller index
    best = torch.where(known, ids, t).gather(1, found.sort(dim=1, descending=True, stable=True).indices)
    places = torch.arange(k, dtype=torch.int32, device=scores.device)
    ranks = torch.full((s, t + 1), k, dtype=torch.int32, device=scores.device)  # the last column takes the -1
    return ranks.scatter_(1, best, places.expand(s, k))[:, :t]


def _check(where: str, scores: torch.Tensor, k: int, visible: torch.Tensor) -> None:
    if k < 1:
        raise ValueError(f"{where}: expected k of at least 1, got {k}")
    check_tensor(where, "scores", scores, ["s", "t"], [torch.float32], scores.device, contiguous=False)
    check_tensor(where, "visible", visible, [scores.shape[0]], [torch.int32, torch.int64], scores.device)

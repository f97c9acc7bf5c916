"""Where dense attention looks: its probabilities averaged over heads, the indexer's target and the oracle's score."""

from collections.abc import Iterator

import torch

from kernels.check import check_tensor
from kernels.switch import takes_kernels

TILE_BYTES = 64 << 20  # scores [rows, h, t] held at a time


def attention_mass_reference(q: torch.Tensor, k: torch.Tensor, scale: float, start: int | torch.Tensor) -> torch.Tensor:
    """p[i, j] = mean_h softmax_j(scale * q[i, h] . k[j]) over j <= position[i]; float32, quadratic.

    Source: DeepSeek-V3.2, arXiv:2512.02556, the head-summed, L1-normalised target of the indexer's warm-up.
    """
    h, (t, g, _) = q.shape[1], k.shape
    heads = torch.arange(h, device=q.device) // (h // g)
    scores = torch.einsum("shd,thd->hst", q.float(), k.float()[:, heads]) * scale
    visible = torch.arange(t, device=q.device)[None, :] <= _positions(start, q)[:, None]
    return scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0).mean(0)


def attention_scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, positions: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Scaled scores of query i over keys 0..positions[i], -inf behind, a tile of rows at a time.

    Args:
        q: [s, h, d]; head j belongs to group j // (h / g). k: [t, g, d]. positions: [s], int, 0-based.

    Yields:
        (rows of q, scores [rows, h, t] float32); at most 64 MiB, or one row.
    """
    s, h, _ = q.shape
    t, g, _ = k.shape
    keys = k.permute(1, 2, 0)  # [g, d, t]
    step = max(1, TILE_BYTES // (h * t * 4))
    cols = torch.arange(t, device=q.device)
    for top in range(0, s, step):
        rows = slice(top, min(top + step, s))
        b = rows.stop - top
        queries = q[rows].unflatten(1, (g, h // g)).permute(1, 2, 0, 3).flatten(1, 2)  # [g, m * b, d]
        scores = torch.matmul(queries, keys).float().mul_(scale).view(g, h // g, b, t)
        scores.masked_fill_(cols[None, :] > positions[rows, None], float("-inf"))
        yield rows, scores.permute(2, 0, 1, 3).flatten(1, 2)


def attention_mass(q: torch.Tensor, k: torch.Tensor, scale: float, start: int | torch.Tensor) -> torch.Tensor:
    """Head-averaged dense attention of every query over its visible keys.

    Args:
        q: [s, h, d], float32, bfloat16 or float16. k: [t, g, d], q's dtype, last axis packed; h a multiple of g.
        scale: of the softmax.
        start: position of q[0], or the position of every query, [s] int32 or int64; -1 sees no key.

    Returns:
        [s, t] float32; each row sums to 1 (0 without a visible key), future keys are 0. On a GPU the keys are read
        twice, whatever the number of heads, and a row's bits do not depend on the other rows or on longer caches.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
    """
    where, dtypes = "attention_mass", [torch.float32, torch.bfloat16, torch.float16]
    check_tensor(where, "q", q, ["s", "h", "d"], dtypes, q.device, contiguous=q.is_cuda)
    check_tensor(where, "k", k, ["t", "g", q.shape[2]], [q.dtype], q.device, contiguous=False)
    if q.shape[1] % max(1, k.shape[1]):
        raise ValueError(f"{where}: expected q's heads to be a multiple of k's {k.shape[1]}, got {q.shape[1]}")
    positions = _positions(start, q)
    check_tensor(where, "start", positions, [q.shape[0]], [torch.int32, torch.int64], q.device)
    if takes_kernels(q):
        from kernels.attention_mass_triton import attention_mass_triton

        return attention_mass_triton(q, k, scale, positions.to(torch.int32))
    out = torch.empty(q.shape[0], k.shape[0], dtype=torch.float32, device=q.device)
    for rows, scores in attention_scores(q, k, scale, positions):
        torch.mean(scores.softmax(-1), 1, out=out[rows])
    return out.masked_fill_(positions[:, None] < 0, 0.0)


def _positions(start: int | torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return start if isinstance(start, torch.Tensor) else torch.arange(start, start + q.shape[0], device=q.device)

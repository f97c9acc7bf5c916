"""Where dense attention looks: its probabilities averaged over heads, the indexer's target and the oracle's score."""

from collections.abc import Iterator

import torch

from kernels.check import check_range, check_tensor
from kernels.fp8_cache import PAGE
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
        q: [n, s, h, d], the same queries at n layers; head j belongs to group j // (h / g). k: [n, t, g, d].
        positions: [s], int, 0-based.

    Yields:
        (rows of q, scores [n, rows, h, t] float32); at most 64 MiB, or one row at n layers.
    """
    n, s, h, _ = q.shape
    t, g = k.shape[1:3]
    keys = k.permute(0, 2, 3, 1)  # [n, g, d, t]
    step = max(1, TILE_BYTES // (n * h * t * 4))
    cols = torch.arange(t, device=q.device)
    for top in range(0, s, step):
        rows = slice(top, min(top + step, s))
        b = rows.stop - top
        queries = q[:, rows].unflatten(2, (g, h // g)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [n, g, m * b, d]
        scores = torch.matmul(queries, keys).float().mul_(scale).view(n, g, h // g, b, t)
        scores.masked_fill_(cols[None, :] > positions[rows, None], float("-inf"))
        yield rows, scores.permute(0, 3, 1, 2, 4).flatten(2, 3)


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
    for rows, scores in attention_scores(q[None], k[None], scale, positions):
        torch.mean(scores[0].softmax(-1), 1, out=out[rows])
    return out.masked_fill_(positions[:, None] < 0, 0.0)


def attention_mass_paged(
    q: torch.Tensor, k: torch.Tensor, scale: float, tables: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Head-averaged dense attention of one new query a sequence over that sequence's pages.

    Args:
        q: [b, h, d], float32, bfloat16 or float16. k: keys of all pages, page after page, [64 n, g, d], q's dtype, last
            axis packed; h a multiple of g.
        scale: of the softmax.
        tables: page numbers of each sequence, [b, p] int32; only the first ceil(length / 64) are read.
        lengths: keys of each sequence, the new one included, [b] int32, 0..64 p.

    Returns:
        [b, 64 p] float32; each row sums to 1 (0 for a sequence of length 0), 0 behind its length. A row's bits depend
        on neither the other rows nor the width of the tables.

    Raises:
        ValueError: a wrong shape, dtype, device or stride. Page numbers and lengths on a GPU are the caller's word.
    """
    where, dtypes = "attention_mass_paged", [torch.float32, torch.bfloat16, torch.float16]
    check_tensor(where, "q", q, ["b", "h", "d"], dtypes, q.device, contiguous=q.is_cuda)
    check_tensor(where, "k", k, ["t", "g", q.shape[2]], [q.dtype], q.device, contiguous=False)
    b, num_keys = q.shape[0], tables.shape[-1] * PAGE
    if q.shape[1] % max(1, k.shape[1]):
        raise ValueError(f"{where}: expected q's heads to be a multiple of k's {k.shape[1]}, got {q.shape[1]}")
    if k.shape[0] % PAGE:
        raise ValueError(f"{where}: expected k in whole pages of {PAGE} keys, got {k.shape[0]} keys")
    check_tensor(where, "tables", tables, [b, "p"], [torch.int32], q.device)
    check_tensor(where, "lengths", lengths, [b], [torch.int32], q.device)
    if takes_kernels(q):
        from kernels.attention_mass_triton import attention_mass_triton

        return attention_mass_triton(q, k, scale, lengths - 1, tables)
    check_range(where, "lengths", lengths, 0, num_keys + 1)
    out = torch.zeros(b, num_keys, dtype=torch.float32, device=q.device)
    pages = k.unflatten(0, (-1, PAGE))
    for i, length in enumerate(lengths.tolist()):
        table = tables[i, : -(-length // PAGE)]
        check_range(where, f"tables[{i}]", table, 0, pages.shape[0])
        if length:
            keys = pages[table.long()].flatten(0, 1)
            out[i, : keys.shape[0]] = attention_mass(q[i : i + 1], keys, scale, lengths[i : i + 1] - 1)[0]
    return out


def _positions(start: int | torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return start if isinstance(start, torch.Tensor) else torch.arange(start, start + q.shape[0], device=q.device)

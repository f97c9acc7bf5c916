"""Lightning-indexer scores: which past tokens does a query want to read?"""

import torch

from kernels.check import check_tensor
from kernels.switch import takes_kernels

ROWS, COLS = 128, 512  # a tile of [ROWS, h, COLS] dots stays in cache; a query alone takes as many keys as fill one
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def index_scores_reference(
    q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, start: int | torch.Tensor, k_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain meaning of `index_scores`; float32, quadratic, no tricks.

    score[i, j] = k_scale[j] * sum_h w[i, h] * relu(q[i, h] . k[j])   if j <= position[i]   else -inf

    Source: DeepSeek-V3.2, arXiv:2512.02556, the index score of the lightning indexer.
    """
    dots = torch.einsum("shd,td->sht", q.float(), k.float())  # [s, h, t]
    scores = torch.einsum("sht,sh->st", dots.relu(), w.float())  # [s, t]
    if k_scale is not None:
        scores = scores * k_scale
    cols = torch.arange(k.shape[0], device=q.device)[None, :]
    return scores.masked_fill(cols > _positions(start, q)[:, None], float("-inf"))


def index_scores(
    q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, start: int | torch.Tensor, k_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Score every visible key for every query; future keys get -inf.

    Args:
        q: index queries, [s, h, d], float32, bfloat16, float16 or float8_e4m3fn.
        k: index keys shared by all heads, [t, d], q's dtype; t >= start + s.
        w: head weights, [s, h], float32, every scale of the query folded in. May be negative.
        start: position of q[0], q[i] sees keys 0..start + i; or the position of every query, [s] int32 or int64, where
            -1 sees no key and positions behind t see all.
        k_scale: what the keys' values are multiplied by, [t] float32, none below 0; None is 1.

    Returns:
        Scores, [s, t], float32. Peak memory: the result plus, on a CPU, one tile of [128, h, 512]. On a GPU rows start
        at multiples of 128 bytes, and a score's bits depend on its query and key alone.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
    """
    _check(q, k, w, start, k_scale)
    if takes_kernels(q):
        from kernels.index_scores_triton import index_scores_triton

        return index_scores_triton(q, k, w, start, k_scale)
    s, h, d = q.shape
    t = k.shape[0]
    if q.dtype == torch.float8_e4m3fn:
        q, k = q.float(), k.float()
    positions = _positions(start, q)
    out = torch.full((s, t), float("-inf"), dtype=torch.float32, device=q.device)
    for top in range(0, s, ROWS):
        bottom = min(top + ROWS, s)
        queries = q[top:bottom].reshape(-1, d)
        weights = w[top:bottom].to(q.dtype).unsqueeze(1)  # [s, 1, h]
        step = COLS if bottom - top > 1 else ROWS * COLS
        near, far = (min(int(n) + 1, t) for n in positions[top:bottom].aminmax())
        for left in range(0, far, step):
            right = min(left + step, far)
            dots = (queries @ k[left:right].T).view(bottom - top, h, right - left).relu_()
            tile = torch.bmm(weights, dots).squeeze(1)
            out[top:bottom, left:right] = tile if k_scale is None else tile.float() * k_scale[left:right]
        cols = torch.arange(near, far, device=q.device)
        future = cols[None, :] > positions[top:bottom, None]
        out[top:bottom, near:far].masked_fill_(future, float("-inf"))
    return out


def _positions(start: int | torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return start if isinstance(start, torch.Tensor) else torch.arange(start, start + q.shape[0], device=q.device)


def _check(
    q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, start: int | torch.Tensor, k_scale: torch.Tensor | None
) -> None:
    where = "index_scores"
    check_tensor(where, "q", q, ["s", "h", "d"], DTYPES, q.device, contiguous=q.is_cuda)
    s, h, d = q.shape
    enough = isinstance(start, torch.Tensor) or k.shape[0] >= start + s
    if k.shape[1:] != (d,) or w.shape != (s, h) or not enough:
        least = "t" if isinstance(start, torch.Tensor) else f">= {start + s}"
        raise ValueError(
            f"{where}: expected k [{least}, {d}] and w [{s}, {h}], got {list(k.shape)} and {list(w.shape)}"
        )
    check_tensor(where, "k", k, ["t", d], [q.dtype], q.device, contiguous=q.is_cuda)
    check_tensor(where, "w", w, [s, h], [torch.float32], q.device, contiguous=q.is_cuda)
    if isinstance(start, torch.Tensor):
        check_tensor(where, "start", start, [s], [torch.int32, torch.int64], q.device)
    elif start < 0:
        raise ValueError(f"{where}: expected start of at least 0, got {start}")
    if k_scale is not None:
        check_tensor(where, "k_scale", k_scale, [k.shape[0]], [torch.float32], q.device)

"""Lightning-indexer scores: which past tokens does a query want to read?"""

import torch

ROWS, COLS = 128, 512  # a tile of [ROWS, h, COLS] dots stays in cache


def index_scores_reference(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, start: int) -> torch.Tensor:
    """Plain meaning of `index_scores`; float32, quadratic, no tricks.

    score[i, j] = sum_h w[i, h] * relu(q[i, h] . k[j])   if j <= start + i   else -inf

    Source: DeepSeek-V3.2, arXiv:2512.02556, the index score of the lightning indexer.
    """
    dots = torch.einsum("shd,td->sht", q.float(), k.float())  # [s, h, t]
    scores = torch.einsum("sht,sh->st", dots.relu(), w.float())  # [s, t]
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    cols = torch.arange(k.shape[0], device=q.device)[None, :]
    return scores.masked_fill(cols > start + rows, float("-inf"))


def index_scores(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, start: int) -> torch.Tensor:
    """Score every visible key for every query; future keys get -inf.

    Args:
        q: index queries, [s, h, d], float32 or bfloat16.
        k: index keys shared by all heads, [t, d], q's dtype; t >= start + s.
        w: head weights, [s, h], float32, every scale folded in. May be negative.
        start: position of q[0]; q[i] sees keys 0..start + i.

    Returns:
        Scores, [s, t], float32. Peak memory: the result plus one tile of [128, h, 512].

    Raises:
        ValueError: if the shapes disagree.
    """
    s, h, d = q.shape
    t = k.shape[0]
    if k.shape != (t, d) or w.shape != (s, h) or t < start + s:
        raise ValueError(
            f"index_scores: expected k [>= {start + s}, {d}] and w [{s}, {h}], got {list(k.shape)} and {list(w.shape)}"
        )
    out = torch.full((s, t), float("-inf"), dtype=torch.float32, device=q.device)
    for top in range(0, s, ROWS):
        bottom = min(top + ROWS, s)
        queries = q[top:bottom].reshape(-1, d)
        weights = w[top:bottom].to(q.dtype).unsqueeze(1)  # [s, 1, h]
        visible = start + bottom
        for left in range(0, visible, COLS):
            right = min(left + COLS, visible)
            dots = (queries @ k[left:right].T).view(bottom - top, h, right - left).relu_()
            out[top:bottom, left:right] = torch.bmm(weights, dots).squeeze(1)
        if bottom - top > 1:
            future = torch.ones(bottom - top, bottom - top, dtype=torch.bool, device=q.device).triu_(1)
            out[top:bottom, start + top : visible].masked_fill_(future, float("-inf"))
    return out

"""The indexer's training loss: how far its softmax is from the head-averaged attention; gradients in closed form."""

from typing import Any

import torch

TILE_ELEMENTS = 1 << 24  # [b, rows, t] float32 held at a time: 64 MiB each, six of them at most
CLAMP = 1e-10  # below this a probability counts as this inside the logarithm


def support_mask(positions: torch.Tensor, num_keys: int, selected: torch.Tensor | None) -> torch.Tensor:
    """Keys that a row's distributions live on, [b, r, t] bool: the visible ones, or those of them that are selected.

    positions [b, r]; selected [b, r, k] ids, of which those of invisible keys count for nothing.
    """
    cols = torch.arange(num_keys, device=positions.device)
    visible = cols <= positions[..., None]
    if selected is None:
        return visible
    chosen = torch.zeros(visible.shape, dtype=torch.bool, device=positions.device)
    return chosen.scatter_(-1, selected.long().clamp_max(num_keys - 1), True) & visible


def indexer_kl_reference(
    index_q: torch.Tensor, index_k: torch.Tensor, index_w: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    scale: float, positions: torch.Tensor, selected: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Plain meaning of `indexer_kl`, gradients by autograd; float32, nothing tiled.

    L = mean_rows sum_s p_s (ln p_s - ln softmax(I)_s) over the support, p = mean_h softmax(scale q_h k), a constant.
    Source: DeepSeek-V3.2, arXiv:2512.02556, the losses of the dense warm-up and of the sparse stage.
    """
    t, h, g = k.shape[1], q.shape[2], k.shape[2]
    support = support_mask(positions, t, selected)
    heads = torch.arange(h, device=q.device) // (h // g)
    scores = torch.einsum("brhd,bthd->bhrt", q.float(), k.float()[:, :, heads]) * scale
    p = scores.masked_fill(~support[:, None], float("-inf")).softmax(-1).mean(1).detach()
    dots = torch.einsum("brhd,btd->brht", index_q.float(), index_k.float()).relu()
    logits = torch.einsum("brh,brht->brt", index_w.float(), dots)
    log_pi = logits.masked_fill(~support, float("-inf")).log_softmax(-1)
    return (p * (p.clamp_min(CLAMP).log() - log_pi.masked_fill(~support, 0.0))).sum(-1).mean()


def head_mean_probabilities(q: torch.Tensor, k: torch.Tensor, scale: float, support: torch.Tensor) -> torch.Tensor:
    """Attention averaged over heads: q [b, r, h, d], k [b, t, g, d], support [b, r, t] -> [b, r, t] float32.

    One head at a time: the peak is three arrays of the result's size.
    """
    h, g = q.shape[2], k.shape[2]
    mean = torch.zeros(support.shape, dtype=torch.float32, device=q.device)
    for head in range(h):
        keys = k[:, :, head // (h // g)].float().transpose(1, 2)
        scores = torch.bmm(q[:, :, head].float() * scale, keys)
        mean += scores.masked_fill_(~support, float("-inf")).softmax(-1)
    return mean.div_(h)


def index_logits(index_q: torch.Tensor, index_k: torch.Tensor, index_w: torch.Tensor) -> torch.Tensor:
    """Index scores of a batch, one head at a time: [b, r, h, d], [b, t, d], [b, r, h] -> [b, r, t] float32."""
    b, r, h, _ = index_q.shape
    keys = index_k.float().transpose(1, 2)
    out = torch.zeros(b, r, index_k.shape[1], dtype=torch.float32, device=index_q.device)
    for head in range(h):
        out += torch.bmm(index_q[:, :, head].float(), keys).relu_().mul_(index_w[:, :, head, None])
    return out


class _IndexerKl(torch.autograd.Function):
    """The loss is linear in the incoming gradient, so its own gradients are made while the tiles are at hand."""

    @staticmethod
    def forward(
        ctx: Any, index_q: torch.Tensor, index_k: torch.Tensor, index_w: torch.Tensor, q: torch.Tensor,
        k: torch.Tensor, scale: float, positions: torch.Tensor, selected: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        b, r, h, _ = index_q.shape
        t = index_k.shape[1]
        keys = index_k.float()
        grad_q = torch.zeros_like(index_q, dtype=torch.float32)
        grad_k = torch.zeros_like(keys)
        grad_w = torch.zeros_like(index_w, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=index_q.device)
        step = max(1, TILE_ELEMENTS // (b * t))
        for top in range(0, r, step):
            rows = slice(top, min(top + step, r))
            support = support_mask(positions[:, rows], t, None if selected is None else selected[:, rows])
            p = head_mean_probabilities(q[:, rows], k, scale, support)
            logits = index_logits(index_q[:, rows], keys, index_w[:, rows]).masked_fill_(~support, float("-inf"))
            log_pi = logits - logits.logsumexp(-1, keepdim=True)
            difference = p.clamp_min(CLAMP).log_().sub_(log_pi.masked_fill(~support, 0.0))
            total += (p * difference).sum()
            gradient = log_pi.exp_().sub_(p).div_(b * r)  # of the scores: pi - p on the support, 0 elsewhere
            for head in range(h):
                queries = index_q[:, rows, head].float()
                dots = torch.bmm(queries, keys.transpose(1, 2))
                grad_w[:, rows, head] = (gradient * dots.relu()).sum(-1)
                through = gradient * (dots > 0) * index_w[:, rows, head, None]
                grad_q[:, rows, head] = torch.bmm(through, keys)
                grad_k += torch.bmm(through.transpose(1, 2), queries)
        ctx.save_for_backward(grad_q.to(index_q.dtype), grad_k.to(index_k.dtype), grad_w.to(index_w.dtype))
        return total / (b * r)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_q, grad_k, grad_w = ctx.saved_tensors
        (grad,) = grads
        return grad * grad_q, grad * grad_k, grad * grad_w, None, None, None, None, None


def indexer_kl(
    index_q: torch.Tensor, index_k: torch.Tensor, index_w: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    scale: float, positions: torch.Tensor, selected: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """KL(attention || indexer), the mean over the given rows.

    Args:
        index_q: index queries of the rows, [b, r, h, d]. index_k: index keys, [b, t, d].
        index_w: head weights of the rows, [b, r, h], every scale folded in.
        q: main queries of the rows, [b, r, h, d]; k: main keys, [b, t, g, d]: constants, they get no gradient.
        scale: softmax scale of the main attention. positions: of the rows, [b, r], int; row i sees keys 0..position.
        selected: ids [b, r, k] of the sparse stage, where both distributions live on the selected keys alone;
            ids of invisible keys are ignored, every row needs one visible key. None is the warm-up: all visible keys.

    Returns:
        Scalar, float32. Memory linear in t: tiles of rows, gradients by pi - p (no autograd graph).
    """
    out: torch.Tensor = _IndexerKl.apply(index_q, index_k, index_w, q.detach(), k.detach(), scale, positions, selected)  # type: ignore[no-untyped-call]
    return out

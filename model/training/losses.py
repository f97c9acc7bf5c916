"""The language-model loss: answers and the rest averaged apart, logits never whole in float32."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

CHUNK_ELEMENTS = 1 << 26  # [rows, vocab] float32 logits held at a time: 256 MiB


def normalised_weights(
    weights: torch.Tensor, is_answer: torch.Tensor, rest_weight: float, add: Callable[[list[torch.Tensor]], None]
) -> torch.Tensor:
    """Weight of each target's cross-entropy in the loss, [b, l] float32; column 0 is never a target.

    loss = mean over answer tokens + rest_weight * mean over the others, weighted: prompts outnumber answers by far.

    Args:
        weights: a batch's, [b, l] float32. is_answer: [b, l] bool.
        add: sums tensors in place over all processes, each of which has its own rows.
    """
    targets = torch.cat((torch.zeros_like(weights[:, :1]), weights[:, 1:]), 1)
    parts = torch.stack((targets * is_answer, targets * ~is_answer))  # [2, b, l]
    sums = parts.sum((1, 2))
    add([sums])
    means = parts / sums.clamp_min(1e-8)[:, None, None]
    return means[0] + rest_weight * means[1]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenLosses:
    """loss: scalar with gradient. each: cross-entropy of every target, [n]. correct: the argmax is the target, [n]."""

    loss: torch.Tensor
    each: torch.Tensor
    correct: torch.Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Linear in the incoming gradient: each chunk's gradients are made while its logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor,
        dtype: torch.dtype, learns: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        n, vocab = x.shape[0], head.shape[0]
        small = head.to(dtype)
        grad_x = torch.empty_like(x) if learns else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if learns else None
        each = torch.empty(n, dtype=torch.float32, device=x.device)
        correct = torch.empty(n, dtype=torch.bool, device=x.device)
        step = max(1, CHUNK_ELEMENTS // vocab)
        for top in range(0, n, step):
            rows = slice(top, min(top + step, n))
            hidden = x[rows].to(dtype)
            logits = (hidden @ small.T).float()
            wanted = targets[rows, None]
            correct[rows] = logits.argmax(-1) == targets[rows]
            log_z = logits.logsumexp(-1, keepdim=True)
            each[rows] = (log_z - logits.gather(-1, wanted)).squeeze(-1)
            if grad_x is not None and grad_head is not None:
                gradient = logits.sub_(log_z).exp_()
                gradient.scatter_add_(-1, wanted, gradient.new_full(wanted.shape, -1.0))
                gradient = gradient.mul_(weights[rows, None]).to(dtype)
                grad_x[rows] = (gradient @ small).to(x.dtype)
                grad_head += (gradient.T @ hidden).float()
        if grad_x is not None and grad_head is not None:
            ctx.save_for_backward(grad_x, grad_head.to(head.dtype))
        ctx.mark_non_differentiable(each, correct)
        return (each * weights).sum(), each, correct

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_head = ctx.saved_tensors
        return grads[0] * grad_x, grads[0] * grad_head, None, None, None, None


def cross_entropy(
    x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
) -> TokenLosses:
    """Weighted sum of cross-entropies over the vocabulary.

    Args:
        x: normalised hidden states, [n, d]. head: [v, d]. targets: [n], int64. weights: [n], float32.
        dtype: of the matrix products; softmax and sums are float32.

    Returns:
        TokenLosses; beyond the inputs' gradients the peak is 256 MiB of logits.
    """
    learns = torch.is_grad_enabled() and (x.requires_grad or head.requires_grad)
    loss, each, correct = _ChunkedCrossEntropy.apply(x, head, targets, weights, dtype, learns)  # type: ignore[no-untyped-call]
    return TokenLosses(loss=loss, each=each, correct=correct)

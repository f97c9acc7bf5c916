"""Log-likelihoods of a continuation, chunk by chunk as its prompt is read."""

import functools

import torch

from model.sampling import greedy
from model.serving.forward import head
from model.serving.sequence import PagedSequence
from model.serving.shortage import Steps
from model.transformer import Transformer

SCORED_ROWS = 256  # whose logits are held at a time


def score(model: Transformer, steps: Steps, sequence: PagedSequence, hidden: torch.Tensor, start: int) -> None:
    """Give a sequence the log-likelihoods of those continuation tokens whose predecessors are in this chunk.

    hidden: of the chunk from position `start` to before `sequence.length`, with padding behind it, [rows, hidden].
    """
    first, stop = len(sequence.request.token_ids) - 1, sequence.length
    continuation = sequence.request.continuation or ()
    for top in range(max(first, start), stop, SCORED_ROWS):
        end = min(top + SCORED_ROWS, stop)
        rows, ids = hidden[top - start : end - start], continuation[top - first : end - first]
        are_greedy, logprobs = steps.run(functools.partial(_score_rows, model, rows, ids), [sequence])
        sequence.is_greedy = sequence.is_greedy and are_greedy
        sequence.logprobs += logprobs


def _score_rows(model: Transformer, hidden: torch.Tensor, ids: tuple[int, ...]) -> tuple[bool, list[float]]:
    """Whether each of these tokens is its row's most likely one, and their log-likelihoods."""
    logits = head(model, hidden)
    targets = torch.tensor(ids, device=hidden.device)
    broken = torch.nonzero(~logits.amax(-1).isfinite()).flatten().tolist()
    if broken:
        greedy(logits[broken[0]])  # raises
    logprobs: list[float] = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1).tolist()
    return bool((logits.argmax(-1) == targets).all()), logprobs

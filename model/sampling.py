"""From logits to the next token: greedy, or drawn by the request's own random stream."""

import hashlib
import random

import torch

from model.errors import ModelError
from model.request import Sampling


def greedy(logits: torch.Tensor) -> int:
    """Logits [v] -> the id of the largest, the smallest id of equal ones. Raises ModelError if it is not finite."""
    largest = logits.max()  # NaN if there is any
    if not bool(largest.isfinite()):
        raise ModelError(f"the model's largest logit is {float(largest)}; its weights or its dtype cannot be served")
    return int(torch.nonzero(logits == largest)[0])


class Sampler:
    """Draws one request's tokens. Its stream depends on the request's seed alone, never on the batch."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self.sampling = sampling
        digest = hashlib.sha256(f"sampling/{seed}".encode()).digest()
        self.random = random.Random(int.from_bytes(digest[:8], "big"))
        self._drawn: float | None = None  # a number whose token is not known yet

    def next(self, logits: torch.Tensor) -> int:
        """Logits [v] float32 -> token id. Raises ModelError as `greedy` does.

        After any error the same call can be made again: it gives the token that it would have given.
        """
        best = greedy(logits)
        if self.sampling.temperature == 0:
            return best
        scaled, ids = (logits.double() / self.sampling.temperature).sort(descending=True, stable=True)
        if self.sampling.top_k is not None:
            scaled, ids = scaled[: self.sampling.top_k], ids[: self.sampling.top_k]
        probabilities = scaled.softmax(-1)
        mass = probabilities.cumsum(-1)
        # nucleus: the fewest tokens whose mass reaches top_p
        keep = int((mass - probabilities < self.sampling.top_p).sum())
        mass = mass[:keep]
        if self._drawn is None:
            self._drawn = self.random.random()
        draw = self._drawn * float(mass[-1])
        token = int(ids[min(int(torch.searchsorted(mass, draw, right=True)), keep - 1)])
        self._drawn = None
        return token

"""From logits to the next token: greedy, or drawn by the request's own random stream."""

import hashlib
import random

import torch

from model.request import Sampling


class Sampler:
    """Draws one request's tokens. Its stream depends on the request's seed alone, never on the batch."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self.sampling = sampling
        digest = hashlib.sha256(f"sampling/{seed}".encode()).digest()
        self.random = random.Random(int.from_bytes(digest[:8], "big"))

    def next(self, logits: torch.Tensor) -> int:
        """Logits [v] float32 -> token id; the smallest id of equal logits when greedy."""
        if self.sampling.temperature == 0:
            return int(torch.nonzero(logits == logits.max())[0])
        scaled, ids = (logits.double() / self.sampling.temperature).sort(descending=True, stable=True)
        if self.sampling.top_k is not None:
            scaled, ids = scaled[: self.sampling.top_k], ids[: self.sampling.top_k]
        probabilities = scaled.softmax(-1)
        mass = probabilities.cumsum(-1)
        # nucleus: the fewest tokens whose mass reaches top_p
        keep = int((mass - probabilities < self.sampling.top_p).sum())
        mass = mass[:keep]
        draw = self.random.random() * float(mass[-1])
        return int(ids[min(int(torch.searchsorted(mass, draw, right=True)), keep - 1)])

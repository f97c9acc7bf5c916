"""A small model, and what an engine's samplers see."""

import pytest
import torch

import model.sequence
from model.sampling import Sampler
from tests.model.helpers import dsa_folder, ours


@pytest.fixture
def tiny():
    return ours(dsa_folder("deepseek"))


@pytest.fixture
def logits_of(monkeypatch):
    """{seed of the request: logits of each of its sampled tokens}, filled while an engine runs."""
    seen: dict[int, list[torch.Tensor]] = {}

    class Recording(Sampler):
        def __init__(self, sampling, seed):
            super().__init__(sampling, seed)
            seen[seed] = []
            self.mine = seen[seed]

        def next(self, logits):
            self.mine.append(logits.clone())
            return super().next(logits)

    monkeypatch.setattr(model.sequence, "Sampler", Recording)
    return seen

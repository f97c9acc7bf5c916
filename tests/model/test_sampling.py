"""Drawing tokens: the right distribution, the request's own stream, and the edges of top_p and top_k."""

import math

import pytest
import torch
from scipy.stats import chisquare

from model.errors import ModelError
from model.request import Sampling
from model.sampling import Sampler, greedy

LOGITS = [1.2, -0.3, 0.8, 2.0, -1.5, 0.8, 0.1, -0.6]
DRAWS = 2000


def exact(logits, sampling):
    """{token: probability} by definition: temperature, then the k largest, then the fewest that reach top_p."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: sampling.top_k]
    weights = {i: math.exp(logits[i] / sampling.temperature) for i in order}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for i in order:
        if mass < sampling.top_p:
            kept[i] = weights[i] / total
            mass += kept[i]
    return {i: p / mass for i, p in kept.items()}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.7, top_p=0.7, top_k=6),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(sampling):
    sampler, logits = Sampler(sampling, seed=1), torch.tensor(LOGITS)
    counts = [0] * len(LOGITS)
    for _ in range(DRAWS):
        counts[sampler.next(logits)] += 1
    expected = exact(LOGITS, sampling)
    assert sum(counts[i] for i in expected) == DRAWS, "no token outside the nucleus"
    assert chisquare([counts[i] for i in expected], [DRAWS * p for p in expected.values()]).pvalue > 1e-3


def test_a_stream_follows_its_seed():
    logits = torch.zeros(1000)

    def stream(seed):
        sampler = Sampler(Sampling(temperature=1.0), seed)
        return [sampler.next(logits) for _ in range(20)]

    assert stream(1) == stream(1)
    assert stream(1) != stream(2)
    assert len(set(stream(1))) > 15


@pytest.mark.parametrize("top_p, size", [(1e-9, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (1.0, 3)])
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p_smaller_ids_first(top_p, size):
    logits = torch.tensor([0.25, 0.5, 0.25]).log()
    sampler = Sampler(Sampling(temperature=1.0, top_p=top_p), seed=0)
    assert {sampler.next(logits) for _ in range(100)} == set([1, 0, 2][:size])


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([0.0, float("-inf"), 0.0, float("-inf")])
    sampler = Sampler(Sampling(temperature=1.0), seed=0)
    assert {sampler.next(logits) for _ in range(200)} == {0, 2}


def test_top_k_takes_smaller_ids_of_equal_logits():
    sampler = Sampler(Sampling(temperature=1.0, top_k=2), seed=0)
    assert {sampler.next(torch.zeros(50)) for _ in range(100)} == {0, 1}


def test_greedy_takes_the_smallest_id_of_equal_logits():
    logits = torch.randn(5000).clamp(max=1.0)  # hundreds are equal
    first = logits.tolist().index(1.0)
    assert greedy(logits) == first
    assert Sampler(Sampling(), seed=3).next(logits) == first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_largest_number_are_refused(value, temperature):
    logits = torch.tensor([0.0, value, 1.0])
    with pytest.raises(ModelError, match="largest logit is"):
        Sampler(Sampling(temperature=temperature), seed=0).next(logits)
    with pytest.raises(ModelError, match="largest logit is -inf"):
        greedy(torch.full((4,), float("-inf")))

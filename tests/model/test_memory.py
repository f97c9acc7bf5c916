"""Prefill with recall at growing contexts: the largest tensor grows with the context, never with its square."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.checkpoint import load_model
from model.engine import LocalEngine
from model.request import Attention, Probes, Request
from tests.model.helpers import dsa_folder

CONTEXTS = (1024, 2048, 4096)
SELECTORS = ("indexer", "oracle", "recency", "random")


class LargestTensor(TorchDispatchMode):
    """Remembers the shape with the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.shape = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # an expanded view holds no memory: count what its storage can hold
            if isinstance(leaf, torch.Tensor) and leaf.numel() * leaf.element_size() <= leaf.untyped_storage().nbytes():
                self.shape = max(self.shape, tuple(leaf.shape), key=math.prod)
        return out


class NoText:
    """An encoding for prompts of ids."""

    eos_ids: tuple[int, ...] = ()
    think_end_id = None

    def decode(self, ids):
        return ""


@pytest.fixture(scope="module")
def tiny():
    folder = dsa_folder("deepseek", num_hidden_layers=2, index_n_heads=4, max_position_embeddings=8192)
    return load_model(str(folder), "float32")


def largest(model, attention, context, probes=None):
    engine = LocalEngine.of(model, NoText(), {"it": attention})
    ids = tuple(torch.randint(0, 320, (context - 2,)).tolist())
    with LargestTensor() as seen:
        (result,) = engine.run([Request(id="a", variant="it", token_ids=ids, max_tokens=2, probes=probes)])
    assert result.finish_reason == "length"
    return seen.shape


ASKED = Probes(queries=64, ks=(32, 64), selectors=SELECTORS)
CASES = {
    "dense": (Attention(), None),
    **{selector: (Attention(topk=64, selector=selector), None) for selector in SELECTORS},
    "dense with recall": (Attention(), ASKED),
    "sparse with recall": (Attention(topk=64), ASKED),
}


@pytest.mark.parametrize("case", CASES)
def test_the_largest_tensor_grows_linearly_with_the_context(tiny, case):
    attention, probes = CASES[case]
    shapes = [largest(tiny, attention, context, probes) for context in CONTEXTS]
    sizes = [math.prod(shape) for shape in shapes]
    assert max(b / a for a, b in itertools.pairwise(sizes)) <= 2.2, shapes
    assert sizes[-1] < CONTEXTS[-1] ** 2 / 2, shapes


def test_the_measure_sees_a_square():
    """A matrix of context x context would be caught, as a result or in place."""
    x = torch.randn(300, 4)
    with LargestTensor() as seen:
        (x @ x.T).softmax(-1)
        torch.zeros(1, 1).expand(1000, 1000)
    assert seen.shape == (300, 300)

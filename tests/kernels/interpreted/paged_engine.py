"""The paged engine over the Triton kernels, in their interpreter: the same tokens as over the torch forms."""

import dataclasses
import importlib

import pytest
import torch

import model.serving.attention
import model.serving.forms
from model.request import Attention, Request
from model.serving.engine import PagedEngine
from model.serving.shape import Shape
from tests.model.helpers import dsa_folder, llama_folder, ours
from tests.model.test_engine import Words

KERNELS = (
    "attention_mass", "dense_prefill", "grouped_gemm", "index_rows", "index_scores",
    "index_scores_paged", "page_slots", "rms_norm", "rope", "sparse_mla", "swiglu", "topk",
)  # fmt: skip
FOLDERS = {"deepseek": lambda: dsa_folder("deepseek", num_hidden_layers=2), "llama": llama_folder}


def answers(tiny, requests, attention):
    engine = PagedEngine.of(tiny, Words(), {"it": attention}, shape=Shape(2, 256, 64, 512), cache_bytes=1 << 24)
    return {r.id: dataclasses.replace(r, seconds=0.0) for r in engine.run(requests)}


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    "name, attention",
    [
        ("deepseek", Attention()),
        ("deepseek", Attention(topk=16)),
        ("llama", Attention(topk=16, selector="oracle")),
    ],
)
def test_kernels_and_torch_forms_give_the_same_tokens(name, attention, gathered, monkeypatch):
    if attention.topk is None and gathered:
        pytest.skip("dense attention gathers nothing")
    tiny = ours(FOLDERS[name]())
    monkeypatch.setattr(model.serving.forms, "gathers", lambda *_: gathered)
    requests = [Request(id="a", variant="it", token_ids=tuple(range(7, 57)), max_tokens=3)]
    expected = answers(tiny, requests, attention)
    assert expected["a"].error is None
    called = []
    for module in KERNELS:
        known = importlib.import_module(f"kernels.{module}")
        monkeypatch.setattr(known, "takes_kernels", lambda *x, module=module: called.append(module) or True)
    with torch.inference_mode():
        assert answers(tiny, requests, attention) == expected
    assert called

"""The transformer against transformers' own DeepSeek-V3.2 and GLM on the same random checkpoints."""

import dataclasses

import pytest
import torch

import model.attention
from model.request import Attention
from tests.model.helpers import SMALL, YARN, dsa_folder, frozen, ours, reference, run

MAX_DIFFERENCE = 1e-4  # float32 logits of magnitude 1-10 through three layers
MARGIN = 1e-5  # index scores closer than this may be ordered either way
CONTEXT = 400

CONFIGS = {
    "deepseek": ("deepseek", {}),
    "deepseek with groups": ("deepseek", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
    "deepseek with yarn": ("deepseek", {"rope_parameters": frozen(YARN), "index_n_heads": 32}),
    "deepseek with two shared experts": ("deepseek", {"n_shared_experts": 2, "num_hidden_layers": 4}),
    "glm": ("glm", {}),
    "glm with shared indexers": ("glm", {"num_hidden_layers": 6, "index_topk_freq": 2, "index_skip_topk_offset": 2}),
    "glm with a pattern of indexers": ("glm", {"num_hidden_layers": 5, "index_topk_pattern": "FSSFS"}),
}


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def folder(request):
    kind, changes = CONFIGS[request.param]
    return dsa_folder(kind, **changes)


def reference_selections(reference_model, ids):
    """Logits and, per layer with an indexer, the reference's top-k ids and index scores."""
    chosen, handles = [], []

    def keep(module, args, kwargs, output):
        chosen.append(output[0])

    for layer in reference_model.model.layers:
        if layer.self_attn.indexer is not None:
            handles.append(layer.self_attn.indexer.register_forward_hook(keep, with_kwargs=True))
    try:
        with torch.inference_mode():
            logits = reference_model(ids[None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, chosen


def our_logits(our_model, ids, theirs, monkeypatch):
    """Our logits and how many rows were clear; every clear row must select the reference's keys.

    Rows whose k-th score is a near tie take the reference's keys, or one arbitrary choice would shift all later rows.
    """
    topk = SMALL["index_topk"]
    remaining = [torch.zeros(CONTEXT, CONTEXT, dtype=torch.bool).scatter_(1, their.long(), True) for their in theirs]
    total = len(remaining) * (CONTEXT - topk)
    clear_rows = 0
    original = model.attention.select

    def compare(attention, layer, positions, num_keys, scores):
        nonlocal clear_rows
        given = scores("indexer")
        mask = original(attention, layer, positions, num_keys, lambda name: given)
        their_mask = remaining.pop(0) & (torch.arange(num_keys)[None, :] <= positions[:, None])
        ordered = given.sort(dim=1, descending=True).values
        clear = (ordered[:, topk - 1] - ordered[:, topk] > MARGIN) & (positions >= topk)
        clear_rows += int(clear.sum())
        assert torch.equal(mask[clear], their_mask[clear]), f"layer {layer} selects other keys"
        return torch.where(clear[:, None], mask, their_mask)

    monkeypatch.setattr(model.attention, "select", compare)
    logits = run(our_model, ids, Attention(topk=topk), [len(ids)])
    assert not remaining, "every indexer of the reference has a selecting layer of ours"
    return logits, clear_rows / total


def test_logits_and_selected_keys_equal_transformers(folder, monkeypatch):
    ids = torch.randint(0, SMALL["vocab_size"], (CONTEXT,))
    expected, theirs = reference_selections(reference(folder), ids)
    actual, clear_share = our_logits(ours(folder), ids, theirs, monkeypatch)
    assert clear_share > 0.9, "the comparison must cover most rows"
    assert float((actual - expected).abs().max()) <= MAX_DIFFERENCE


def test_dense_mode_equals_transformers_with_topk_beyond_the_context(folder):
    ids = torch.randint(0, SMALL["vocab_size"], (SMALL["index_topk"],))
    with torch.inference_mode():
        expected = reference(folder)(ids[None]).logits[0]
    actual = run(ours(folder), ids, Attention(), [len(ids)])
    assert float((actual - expected).abs().max()) <= MAX_DIFFERENCE


def test_the_indexers_rope_layout_decides_the_selection():
    """A checkpoint read with the other layout must differ from the reference, or the parity test proves nothing."""
    ids = torch.randint(0, SMALL["vocab_size"], (CONTEXT,))
    folder = dsa_folder("deepseek")
    right = ours(folder)
    expected = run(right, ids, Attention(topk=48), [CONTEXT])
    wrong = type(right)(right.config)
    wrong.load_state_dict(right.state_dict())
    for layer in wrong.layers:
        indexer = layer.self_attn.indexer
        indexer.config = dataclasses.replace(indexer.config, interleaved=True)
    actual = run(wrong.eval().requires_grad_(False), ids, Attention(topk=48), [CONTEXT])
    assert float((actual - expected).abs().max()) > 100 * MAX_DIFFERENCE

"""What is trained is what is evaluated: the training forward against inference, and where gradients may not go."""

import pytest
import torch
import torch.nn.functional as F

import model.training.attention
from kernels.grouped_gemm import expert_mlp
from kernels.index_scores import index_scores
from kernels.topk import topk_reference
from model.checkpoint import load_model
from model.request import Attention
from model.training.attention import select_ids, selected_attention
from model.training.forward import TrainingForward, residual_excess
from model.training.moe import balance, mixture
from tests.model.helpers import YARN, dsa_folder, frozen, run

MAX_DIFFERENCE = 1e-4  # float32 logits of magnitude 1-10 through three layers
CASES = {
    "deepseek": ("deepseek", {}),
    "deepseek with groups": ("deepseek", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
    "deepseek with yarn": ("deepseek", {"rope_parameters": frozen(YARN)}),
    "deepseek with many experts": ("deepseek", {"n_routed_experts": 24}),
    "glm with shared indexers": ("glm", {"num_hidden_layers": 4, "index_topk_freq": 2, "index_skip_topk_offset": 2}),
}


def trainable(folder):
    return load_model(str(folder), "float32").train().requires_grad_(True)


def logits(model, output, b):
    return F.linear(output.hidden, model.lm_head.weight).unflatten(0, (b, -1))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("topk", [None, 48])
@pytest.mark.parametrize("chunk", [1 << 25, 2 * 130 * 50])
def test_training_logits_equal_the_inference_engines(monkeypatch, name, topk, chunk):
    monkeypatch.setattr(model.training.attention, "CHUNK_ELEMENTS", chunk)
    kind, changes = CASES[name]
    transformer = trainable(dsa_folder(kind, **changes))
    ids = torch.randint(0, 320, (2, 130))
    with torch.no_grad():
        actual = logits(transformer, TrainingForward(transformer)(ids, topk=topk), 2)
    expected = torch.stack([run(transformer, row, Attention(topk=topk), [130]) for row in ids])
    assert float((actual - expected).abs().max()) <= MAX_DIFFERENCE


def test_the_language_model_loss_never_reaches_the_indexer():
    transformer = trainable(dsa_folder())
    ids = torch.randint(0, 320, (2, 90))
    TrainingForward(transformer)(ids, topk=48).hidden.square().sum().backward()
    grads = {name: p.grad for name, p in transformer.named_parameters() if name != "lm_head.weight"}
    assert all(grad is None for name, grad in grads.items() if "indexer" in name)
    assert all(grad is not None for name, grad in grads.items() if "indexer" not in name)


@pytest.mark.parametrize("topk", [None, 48])
def test_the_indexers_loss_never_reaches_the_model(topk):
    transformer = trainable(dsa_folder())
    ids, rows = torch.randint(0, 320, (2, 90)), torch.randint(0, 90, (2, 16))
    output = TrainingForward(transformer)(ids, topk=topk, kl_rows=rows)
    assert set(output.kl) == {0, 1, 2}
    sum(output.kl.values()).backward()
    for name, parameter in transformer.named_parameters():
        assert (parameter.grad is not None) == ("indexer" in name), name


def test_a_frozen_model_trains_its_indexer_alone():
    transformer = trainable(dsa_folder())
    ids, rows = torch.randint(0, 320, (1, 60)), torch.randint(0, 60, (1, 16))
    output = TrainingForward(transformer)(ids, frozen=True, kl_rows=rows)
    assert not output.hidden.requires_grad
    sum(output.kl.values()).backward()
    assert all((p.grad is not None) == ("indexer" in name) for name, p in transformer.named_parameters())


@pytest.mark.parametrize("chunk", [1, 3 * 2 * 40, 1 << 25])
def test_selected_attention_has_the_gradients_of_masked_softmax(monkeypatch, chunk):
    monkeypatch.setattr(model.training.attention, "CHUNK_ELEMENTS", chunk)
    q, k, v = (torch.randn(2, 3, 40, 8, requires_grad=True) for _ in range(3))
    ids = select_ids(torch.randn(2, 40, 2, 4), torch.randn(2, 40, 4), torch.randn(2, 40, 2), 7)
    mask = torch.zeros(2, 40, 40, dtype=torch.bool).scatter_(-1, ids.long(), True).tril()
    assert mask.sum(-1).tolist() == [[min(7, i + 1) for i in range(40)]] * 2
    weights = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    expected, upstream = weights @ v, torch.randn(2, 3, 40, 8)
    actual = selected_attention(q, k, v, ids, 0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    for mine, their in zip(torch.autograd.grad(actual, (q, k, v), upstream), theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5)


def test_equal_scores_select_the_smaller_index():
    q, k, w = torch.randn(1, 40, 1, 4), torch.randn(1, 40, 4), torch.ones(1, 40, 1)  # half of the scores are 0.0
    ids = select_ids(q, k, w, 25)
    scores = index_scores(q[0], k[0], w[0], 0)
    assert bool((scores == 0).sum(1).max() > 5)
    assert torch.equal(as_mask(ids[0]), as_mask(topk_reference(scores, 25, torch.arange(40) + 1)))


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_many_equal_scores_select_as_the_engine_does(levels):
    b, length, topk = 2, 90, 16
    q, k = torch.ones(b, length, 1, 4), torch.randint(0, levels, (b, length, 1)).float().expand(b, length, 4)
    ids = select_ids(q, k.contiguous(), torch.ones(b, length, 1), topk)
    for row in range(b):
        expected = topk_reference((4 * k[row, :, 0]).expand(length, length), topk, torch.arange(length) + 1)
        assert torch.equal(as_mask(ids[row]), as_mask(expected))


def as_mask(ids):
    """Visible keys that are named, [l, l]: ids [l, k], -1 or an invisible key names none."""
    length = len(ids)
    mask = torch.zeros(length, length + 1, dtype=torch.bool)  # the last column takes the -1
    return mask.scatter_(-1, torch.where(ids < 0, length, ids).long(), True)[:, :length].tril()


def test_the_residuals_excess_counts_only_beyond_the_limit():
    x = torch.tensor([[1.0, -4.0, 2.0], [3.0, 0.0, -2.0]], requires_grad=True)
    excess = residual_excess(x, 2.0)
    assert excess.item() == pytest.approx((1.0**2 + 0.5**2) / 2)
    excess.backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, -0.5, 0.0], [0.25, 0.0, 0.0]]))


def test_the_wide_mixture_equals_the_grouped_products():
    transformer = trainable(dsa_folder())
    moe = transformer.layers[1].mlp
    x = torch.randn(50, 64)
    experts, gates = moe.gate(x)
    expected = expert_mlp(x, moe.experts.gate_up_proj, moe.experts.down_proj, experts, gates) + moe.shared_experts(x)
    actual, load = mixture(moe, x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert load.tolist() == torch.bincount(experts.flatten(), minlength=8).tolist()


def test_balance_moves_the_bias_towards_idle_experts():
    gate = trainable(dsa_folder()).layers[1].mlp.gate
    before = gate.e_score_correction_bias.clone()
    balance(gate, torch.tensor([4.0, 0, 2, 2, 2, 2, 2, 2]), 0.01)
    assert torch.allclose(
        gate.e_score_correction_bias - before, torch.tensor([-0.01, 0.01, 0, 0, 0, 0, 0, 0]), atol=1e-7
    )
    assert not gate.e_score_correction_bias.requires_grad


def test_yarn_can_be_left_out():
    folder = dsa_folder("deepseek", rope_parameters=frozen(YARN))
    transformer, plain = trainable(folder), trainable(dsa_folder("deepseek"))
    ids = torch.randint(0, 320, (1, 60))
    with torch.no_grad():
        bare = TrainingForward(transformer, plain_rope=True)(ids).hidden
        torch.testing.assert_close(bare, TrainingForward(plain)(ids).hidden, rtol=1e-5, atol=1e-5)
        assert float((bare - TrainingForward(transformer)(ids).hidden).abs().max()) > 1e-2


def test_compiled_pieces_serve_every_layer_with_one_graph_a_kind():
    import torch._dynamo

    torch._dynamo.reset()
    transformer = trainable(dsa_folder("deepseek", num_hidden_layers=4))
    forward = TrainingForward(transformer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    forward.before = torch.compile(forward.before, dynamic=False, backend=backend)
    forward.after = torch.compile(forward.after, dynamic=False, backend=backend)
    ids = torch.randint(0, 320, (2, 60))
    with torch.no_grad():
        expected = TrainingForward(transformer)(ids).hidden
        torch.testing.assert_close(forward(ids).hidden, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 3  # before, after with an MLP, after with a mixture
    torch._dynamo.reset()

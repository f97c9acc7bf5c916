"""The indexer's loss: closed-form gradients against autograd, tiles of rows, the selected support."""

import pytest
import torch

import kernels.indexer_kl
from kernels.indexer_kl import indexer_kl, indexer_kl_reference

B, T, ROWS = 2, 37, 9


def inputs(groups: int = 4, selected: int | None = None):
    """(index_q, index_k, index_w requiring gradients, then the constants)."""
    trained = [torch.randn(B, ROWS, 3, 8), torch.randn(B, T, 8), torch.randn(B, ROWS, 3)]
    positions = torch.randint(0, T, (B, ROWS))
    positions[0, 0] = 0  # a row with one visible key
    ids = None if selected is None else torch.stack([torch.randperm(T)[:selected] for _ in range(B * ROWS)])
    if ids is not None:
        ids = ids.view(B, ROWS, selected)
        ids[..., 0] = 0  # every row sees one of its keys
    constants = (torch.randn(B, ROWS, 4, 16), torch.randn(B, T, groups, 16), 0.25, positions, ids)
    return [x.requires_grad_() for x in trained], constants


@pytest.mark.parametrize("selected", [None, 6])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tile", [1, 3 * B * T, 1 << 24])
def test_loss_and_gradients_equal_autograds(monkeypatch, selected, groups, tile):
    monkeypatch.setattr(kernels.indexer_kl, "TILE_ELEMENTS", tile)
    trained, constants = inputs(groups, selected)
    expected = indexer_kl_reference(*trained, *constants)
    expected_grads = torch.autograd.grad(3.0 * expected, trained)
    actual = indexer_kl(*trained, *constants)
    actual_grads = torch.autograd.grad(3.0 * actual, trained)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_gradients_hold_against_finite_differences():
    trained, constants = inputs(selected=5)
    grads = torch.autograd.grad(indexer_kl(*trained, *constants), trained)
    for i, grad in enumerate(grads):
        direction = torch.randn_like(trained[i])
        shifted = [
            indexer_kl(*[x + e * direction if j == i else x for j, x in enumerate(trained)], *constants)
            for e in (1e-3, -1e-3)
        ]
        slope = float((shifted[0] - shifted[1]).detach()) / 2e-3
        assert slope == pytest.approx(float((grad * direction).sum()), rel=0.05, abs=2e-4)


def test_the_loss_vanishes_when_the_indexer_is_the_attention():
    q, k = torch.rand(1, 6, 1, 8), torch.rand(1, 6, 1, 8)  # positive dots: the ReLU does nothing
    positions = torch.arange(6)[None]
    loss = indexer_kl(q, k[:, :, 0], torch.full((1, 6, 1), 0.5), q, k, 0.5, positions)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_keys_outside_the_selection_get_no_gradient():
    trained, constants = inputs(selected=4)
    (grad,) = torch.autograd.grad(indexer_kl(*trained, *constants), trained[1:2])
    ids = constants[-1]
    for row in range(B):
        outside = sorted(set(range(T)) - set(ids[row].flatten().tolist()))
        assert outside and float(grad[row, outside].abs().max()) == 0.0


def test_the_attention_gets_no_gradient():
    trained, (q, k, *rest) = inputs()
    q.requires_grad_()
    k.requires_grad_()
    indexer_kl(*trained, q, k, *rest).backward()
    assert q.grad is None and k.grad is None and trained[0].grad is not None

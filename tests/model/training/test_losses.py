"""The language-model loss in chunks against autograd, its weights, and the rows of the indexer's loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model.training.losses
from model.training.batch import Batch
from model.training.losses import cross_entropy, normalised_weights
from model.training.rows import loss_rows


def batch(is_answer, weights=None, b=1):
    is_answer = np.array([is_answer] * b, dtype=bool)
    given = np.ones(is_answer.shape) if weights is None else np.array([weights] * b)
    ids = np.zeros(is_answer.shape, dtype=np.int32)
    return Batch(token_ids=ids, weights=given.astype(np.float32), is_answer=is_answer)


def row(whole, i):
    """Row i as a process of its own has it."""
    mine = slice(i, i + 1)
    return Batch(
        token_ids=whole.token_ids[mine], weights=whole.weights[mine], is_answer=whole.is_answer[mine], first_row=i
    )


@pytest.mark.parametrize("chunk", [1, 7 * 50, 1 << 20])
def test_chunked_loss_and_gradients_equal_autograds(monkeypatch, chunk):
    monkeypatch.setattr(model.training.losses, "CHUNK_ELEMENTS", chunk)
    x, head = torch.randn(23, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, weights = torch.randint(0, 50, (23,)), torch.rand(23)
    each = F.cross_entropy(x @ head.T, targets, reduction="none")
    expected = torch.autograd.grad((each * weights).sum() * 3, (x, head))
    actual = cross_entropy(x, head, targets, weights, torch.float32)
    torch.testing.assert_close(actual.each, each.detach())
    assert torch.equal(actual.correct, (x @ head.T).argmax(-1) == targets)
    for mine, theirs in zip(torch.autograd.grad(actual.loss * 3, (x, head)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def weights_of(given, rest_weight, add=lambda sums: None):
    return normalised_weights(torch.from_numpy(given.weights), torch.from_numpy(given.is_answer), rest_weight, add)


def test_answers_and_the_rest_are_averaged_apart():
    weights = weights_of(batch([0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 4]), 0.2)
    assert weights[0].tolist() == pytest.approx([0, 0.2 / 3, 0.2 / 3, 0.2 / 3, 0.2, 0.8])


def test_the_first_token_and_padding_are_no_targets():
    weights = weights_of(batch([1, 1, 0, 0], [1, 1, 1, 0]), 0.5)
    assert weights[0].tolist() == pytest.approx([0, 1.0, 0.5, 0])


def test_a_batch_without_answers_has_a_loss_all_the_same():
    assert float(weights_of(batch([0, 0, 0]), 0.2).sum()) == pytest.approx(0.2)


def test_the_means_are_over_the_rows_of_all_processes():
    is_answer = np.array([[0, 0, 1, 1], [0, 1, 1, 1]], dtype=bool)
    weights = np.array([[1, 1, 2, 3], [1, 1, 1, 5]], dtype=np.float32)
    whole = Batch(token_ids=np.zeros((2, 4), dtype=np.int32), weights=weights, is_answer=is_answer)
    first, second = (row(whole, i) for i in range(2))
    expected = weights_of(whole, 0.3)

    def add(sums):  # what the other process would bring
        sums[0] += torch.tensor([7.0, 0.0])

    torch.testing.assert_close(weights_of(first, 0.3, add)[0], expected[0])
    assert float(weights_of(second, 0.3)[0].sum()) == pytest.approx(1.0), "alone it has answers only"


def test_half_of_the_loss_rows_predict_answers():
    answers = np.zeros(100, dtype=bool)
    answers[[40, 90]] = True
    rows = loss_rows(batch(answers, b=3), 20, seed=1, step=5)
    assert rows.shape == (3, 20)
    assert set(rows[:, :10].flatten()) == {39, 89}
    assert len(set(rows[:, 10:].flatten())) > 5


def test_loss_rows_follow_from_seed_and_step():
    given = batch(np.zeros(50, dtype=bool), b=2)
    assert np.array_equal(loss_rows(given, 8, 3, 4), loss_rows(given, 8, 3, 4))
    assert not np.array_equal(loss_rows(given, 8, 3, 4), loss_rows(given, 8, 3, 5))


def test_a_row_has_the_same_loss_rows_in_the_whole_batch_and_in_a_share():
    given = batch([0, 0, 1, 1, 0, 0], b=3)
    shares = [loss_rows(row(given, i), 6, seed=3, step=4) for i in range(3)]
    assert np.array_equal(loss_rows(given, 6, seed=3, step=4), np.concatenate(shares))


def test_short_rows_give_no_more_loss_rows_than_they_have_tokens():
    assert loss_rows(batch([0, 1, 1]), 256, 0, 0).shape == (1, 3)

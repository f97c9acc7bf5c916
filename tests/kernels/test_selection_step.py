"""Scores, choice and attention in pieces: the same ids and outputs as in turn, row by row."""

import pytest
import torch

from kernels.bench_step_calls import sparse_decode_step, sparse_prefill_step, sparse_prompt
from kernels.selection_step import DESIGN, DESIGNS, Step, cut, selection_step

CPU = torch.device("cpu")
SMALL = {"heads": 2, "k": 16, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def told(calls, *, attends=True, fails_at=None):
    """A step over rows of numbers that notes its calls: row i's scores are i and its ids, of k = 3, are i, 2 i, 3 i."""

    def score(rows):
        calls.append(("score", rows.start, rows.stop))
        return torch.arange(rows.start, rows.stop, dtype=torch.float32)[:, None]

    def choose(scores, rows):
        calls.append(("choose", rows.start, rows.stop))
        if rows.start == fails_at:
            raise RuntimeError("no such row")
        assert scores[:, 0].tolist() == list(range(rows.start, rows.stop))
        return (scores * torch.arange(1, 4)).to(torch.int32)

    def attend(ids, rows, out):
        calls.append(("attend", rows.start, rows.stop))
        out[rows] = ids.sum(1)

    if not attends:
        return Step(score=score, choose=choose)
    return Step(score=score, choose=choose, attend=attend, empty=lambda: torch.full((10,), -7))


@pytest.mark.parametrize("count, pieces", [(10, 1), (10, 2), (10, 4), (7, 2), (3, 4), (1, 2), (4096, 4)])
def test_pieces_cover_every_row_once_and_the_last_rows_come_first(count, pieces):
    runs = cut(count, pieces)
    assert 1 <= len(runs) <= pieces
    assert [row for run in runs[::-1] for row in range(run.start, run.stop)] == list(range(count))
    assert max(run.stop - run.start for run in runs) == -(-count // pieces)


@pytest.mark.parametrize("design", DESIGNS)
def test_each_design_calls_for_every_row_once_and_gives_what_in_turn_gives(design):
    calls = []
    ids, out = selection_step(told(calls), 10, 3, CPU, design)
    assert torch.equal(ids, (torch.arange(10)[:, None] * torch.arange(1, 4)).to(torch.int32))
    assert out.tolist() == [6 * i for i in range(10)]
    for name in ("score", "choose", "attend"):
        seen = sorted(row for call, start, stop in calls if call == name for row in range(start, stop))
        assert seen == list(range(10))
    alone = []
    ids_alone, nothing = selection_step(told(alone, attends=False), 10, 3, CPU, design)
    assert torch.equal(ids_alone, ids) and nothing is None and "attend" not in {call[0] for call in alone}


def test_two_pieces_at_a_time_go_through_every_call_together():
    calls = []
    selection_step(told(calls), 10, 3, CPU, "chains 4")
    assert [(name, start) for name, start, _ in calls] == [
        ("score", 9), ("score", 6), ("choose", 9), ("choose", 6), ("attend", 9), ("attend", 6),
        ("score", 3), ("score", 0), ("choose", 3), ("choose", 0), ("attend", 3), ("attend", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("design", DESIGNS)
def test_no_rows_and_one_row_are_a_step_as_well(design):
    for count in (0, 1):
        ids, _ = selection_step(told([], attends=False), count, 3, CPU, design)
        assert ids.shape == (count, 3)


def test_scores_of_two_pieces_at_most_are_held():
    alive = set()

    class Scores(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    most = []

    def score(rows):
        scores = torch.zeros(rows.stop - rows.start, 1).as_subclass(Scores)
        alive.add(id(scores))
        most.append(len(alive))
        return scores

    step = Step(score=score, choose=lambda scores, rows: torch.zeros(rows.stop - rows.start, 3, dtype=torch.int32))
    selection_step(step, 16, 3, CPU, "chains 4")
    assert len(most) == 4 and max(most) == 2 and not alive


def test_an_error_of_a_call_comes_out_and_an_unknown_design_is_named():
    with pytest.raises(RuntimeError, match="no such row"):
        selection_step(told([], fails_at=0), 10, 3, CPU, "chains 2")
    with pytest.raises(ValueError, match=r"expected a design of in turn, chains 2, .*, got 'at once'"):
        selection_step(told([]), 10, 3, CPU, "at once")
    with pytest.raises(ValueError, match="expected empty beside attend"):
        selection_step(Step(score=torch.zeros, choose=torch.add, attend=print), 10, 3, CPU)


def in_design(build, *args, design, **options):
    torch.manual_seed(11)
    return build(*args, **SMALL, **options, design=design)()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_prompts_pieces_give_the_bits_of_the_whole(design):
    assert DESIGN == "in turn"
    for build, args in ((sparse_prefill_step, (200, 23)), (sparse_prompt, (90, 32))):
        whole = in_design(build, *args, design=None)
        assert bool(whole.any()) and torch.equal(in_design(build, *args, design=design), whole)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_batchs_pieces_give_the_bits_of_the_whole(design):
    for dtype in ("fp8", "float32"):
        whole = in_design(sparse_decode_step, 130, 5, dtype, design=None)
        assert bool(whole.any()) and torch.equal(in_design(sparse_decode_step, 130, 5, dtype, design=design), whole)

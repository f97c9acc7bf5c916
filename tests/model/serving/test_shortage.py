"""A GPU's memory that runs short, acted on a CPU: the same step runs again with the same bits, or says what fits."""

import dataclasses
import pkgutil

import pytest
import torch

import model.probe
import model.serving.decoder
import model.serving.engine
import model.serving.forward
import model.serving.prompter
import model.serving.shortage
from model.request import Probes, Sampling
from model.serving.decoder import Decoder
from model.serving.prompter import Prompter
from model.serving.shortage import AT_ONCE, WAITS, is_shortage
from tests.model.serving.helpers import FEW_ROWS, assert_all_pages_are_free, paged
from tests.model.test_engine import answers, ask, random_ids

SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 62.00 MiB.\nsecond line")


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """Seconds that the engine would have waited."""
    seconds = []
    monkeypatch.setattr(model.serving.shortage.time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def mixed():
    """Prompts of one and two chunks, with recall, drawn answers and log-likelihoods."""
    probes = Probes(queries=6, ks=(16,), selectors=("oracle", "recency"), needles=((3, 9),))
    drawn = Sampling(temperature=1.0)
    return [
        ask("probed", 300, seed=1, max_tokens=7, sampling=drawn, probes=probes),
        ask("drawn", 41, seed=2, max_tokens=7, variant="indexer", sampling=drawn),
        ask("scored", 200, variant="oracle", continuation=random_ids(130), probes=probes),
    ]


def failing(original, times, error=SHORT, where=lambda *args: True):
    """`original`, whose work is done and then lost as often as `times` says, at the calls that `where` names."""
    left = [times]

    def call(*args, **kwargs):
        found = original(*args, **kwargs)
        if left[0] and where(*args):
            left[0] -= 1
            raise error
        return found

    return call


def within_layer_one(layer, *rest):
    return layer.layer == 1


PLACES = {
    "a chunk, in its second layer": ("model.serving.forward.attend_chunk", within_layer_one),
    "a decode step, in its second layer": ("model.serving.forward.attend_rows", within_layer_one),
    "logits": ("model.serving.engine.head", lambda *args: True),
    "the drawing of a token": ("torch.searchsorted", lambda *args: True),
    "a tile of recall": ("model.probe.Probe._tile", lambda *args: True),
    "the columns of recall": ("model.probe.Probe._columns", lambda *args: True),
}


@pytest.mark.parametrize("times", [1, len(WAITS)])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_did_not_fit_runs_again_with_the_same_bits(
    tiny, mixed, place, times, monkeypatch, logits_of, slept
):
    expected = answers(paged(tiny), mixed)
    assert all(result.error is None for result in expected.values())
    path, where = PLACES[place]
    monkeypatch.setattr(path, failing(pkgutil.resolve_name(path), times, where=where))
    engine = paged(tiny)
    assert answers(engine, mixed) == expected
    assert (engine.stats.shortages, slept) == (times, list(WAITS[:times]))
    assert_all_pages_are_free(engine)


@pytest.mark.parametrize(
    "message", ["Triton Error [CUDA]: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"]
)
def test_other_libraries_say_it_in_other_words(tiny, mixed, message, monkeypatch):
    expected = answers(paged(tiny), mixed)
    short = failing(model.serving.prompter.run_chunk, 1, RuntimeError(message))
    monkeypatch.setattr(model.serving.prompter, "run_chunk", short)
    engine = paged(tiny)
    assert answers(engine, mixed) == expected and engine.stats.shortages == 1


def test_other_errors_and_a_lost_gpu_are_no_shortage():
    lost = torch.AcceleratorError("CUDA error: out of memory")
    assert [is_shortage(error) for error in (SHORT, RuntimeError("made up"), MemoryError("x"), lost)] == [
        True, False, False, False,
    ]  # fmt: skip


def test_unused_blocks_are_given_back_first_and_captured_graphs_then(tiny, monkeypatch):
    given = []
    monkeypatch.setattr(model.serving.shortage, "free_bytes", lambda device: given.append("blocks") or 1 << 30)
    monkeypatch.setattr(Decoder, "forget", lambda self: given.append("steps"))
    monkeypatch.setattr(Prompter, "forget", lambda self: given.append("chunks"))
    short = failing(model.serving.decoder.run_rows, 2)
    monkeypatch.setattr(model.serving.decoder, "run_rows", short)
    answers(paged(tiny), [ask("a", 20, max_tokens=3)])
    assert given == ["blocks", "steps", "chunks", "blocks"]


def test_a_request_that_does_not_fit_alone_says_which_context_would_and_the_others_go_on(tiny, monkeypatch, slept):
    requests = [ask(str(n), tuple(range(n)), max_tokens=9, variant="indexer") for n in range(60, 64)]
    expected = answers(paged(tiny, shape=FEW_ROWS), requests)
    config = tiny.config
    room = model.serving.shortage.working_bytes(config, 4, 4, 256, 2048)
    monkeypatch.setattr(model.serving.shortage, "free_bytes", lambda device: room)
    short = failing(model.serving.prompter.run_chunk, -1, where=lambda model, ids, chunk, pool: chunk.num_tokens == 61)
    monkeypatch.setattr(model.serving.prompter, "run_chunk", short)
    engine = paged(tiny, shape=FEW_ROWS)
    results = answers(engine, requests)
    error = results.pop("61").error
    assert error.startswith("ModelError: request 61: out of memory at a context of 61 tokens on this cpu: a step may")
    assert "enough for 2048 tokens; use fewer replicas, each with a larger --gpus, or shorten the prompt" in error
    assert results == {name: result for name, result in expected.items() if name != "61"}
    assert slept == list(WAITS)
    assert_all_pages_are_free(engine)


def test_a_decode_step_that_never_fits_fails_only_the_request_that_needs_it(tiny, monkeypatch, slept):
    requests = [ask(str(n), tuple(range(n)), max_tokens=9, variant="indexer") for n in (20, 30, 40)]
    expected = answers(paged(tiny), requests)
    where = lambda model, rows, pool: 33 in rows.positions  # noqa: E731
    monkeypatch.setattr(model.serving.decoder, "run_rows", failing(model.serving.decoder.run_rows, -1, where=where))
    engine = paged(tiny)
    results = answers(engine, requests)
    assert "request 30: out of memory at a context of 34 tokens" in results.pop("30").error
    assert results == {name: result for name, result in expected.items() if name != "30"}
    assert slept == [*WAITS, *AT_ONCE], "all together first, then each alone"
    assert_all_pages_are_free(engine)


def test_steps_are_captured_anew_behind_graphs_that_were_given_up(tiny):
    engine = paged(tiny)
    requests = [ask("a", 20, max_tokens=4), ask("b", 300, max_tokens=4, variant="indexer")]
    expected = answers(engine, requests)
    assert all(decoder._steps for decoder in engine._decoders.values())
    engine.forget_graphs()
    assert not any(decoder._steps for decoder in engine._decoders.values())
    again = answers(engine, requests)
    assert {key: r.token_ids for key, r in again.items()} == {key: r.token_ids for key, r in expected.items()}
    assert all(
        dataclasses.astuple(r.usage)[:2] == dataclasses.astuple(expected[key].usage)[:2] for key, r in again.items()
    )

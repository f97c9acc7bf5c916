"""Requests of the paged engine: where answers end, what is refused, and what goes wrong alone."""

import dataclasses

import pytest
import torch

import model.serving.decoder
import model.serving.prompter
from model.checkpoint import load_model
from model.engine import LocalEngine
from model.request import Attention, Sampling
from model.serving.engine import PagedEngine
from model.serving.shape import Shape
from tests.model.helpers import dsa_folder
from tests.model.serving.helpers import FEW_ROWS, assert_all_pages_are_free, paged, pages_for
from tests.model.test_engine import VARIANTS, Words, answers, ask, random_ids


def test_answers_end_where_the_cpu_engine_ends_them(tiny):
    request = ask("free", 30, max_tokens=40, sampling=Sampling(temperature=2.0), seed=11)
    (free,) = LocalEngine.of(tiny, Words(), VARIANTS).run([request])
    ids = free.token_ids
    stop = Words().decode(ids[5:8])[1:-1]
    for changes, encoding in (
        ({}, Words(eos_ids=(999, ids[9]))),
        ({"stop": ("never", stop)}, Words()),
        ({"stop": (f"<{ids[3]}>",), "thinking": True}, Words(think_end_id=ids[12])),
        ({"max_tokens": 1}, Words()),
    ):
        changed = dataclasses.replace(request, **changes)
        expected = answers(LocalEngine.of(tiny, encoding, VARIANTS), [changed])
        assert answers(paged(tiny, encoding), [changed]) == expected


def test_log_likelihoods_of_a_long_continuation_cross_chunks(tiny, monkeypatch):
    monkeypatch.setattr("model.serving.scoring.SCORED_ROWS", 100)
    requests = [ask("a", 200, continuation=random_ids(330)), ask("b", 257, continuation=random_ids(1))]
    expected = answers(LocalEngine.of(tiny, Words(), VARIANTS), requests)
    for key, result in answers(paged(tiny), requests).items():
        assert len(result.logprobs) == len(expected[key].logprobs)
        assert result.logprobs == pytest.approx(expected[key].logprobs, abs=2e-4)
    greedy = answers(paged(tiny), [ask("c", requests[0].token_ids, max_tokens=12)])["c"].token_ids
    other = (*greedy[:7], (greedy[7] + 1) % 320, *greedy[8:])
    scored = answers(
        paged(tiny), [ask(name, requests[0].token_ids, continuation=ids) for name, ids in (("x", greedy), ("y", other))]
    )
    assert (scored["x"].is_greedy, scored["y"].is_greedy) == (True, False)


def test_a_request_that_can_never_fit_is_refused_with_the_largest_context_that_does(tiny):
    variants = {"dense": Attention()}
    engine = PagedEngine.of(tiny, Words(), variants, cache_bytes=pages_for(tiny, 640))
    assert engine.max_context == 640
    results = answers(engine, [ask("long", 630, max_tokens=12), ask("fits", 630, max_tokens=11), ask("short", 20)])
    assert "holds 640: the largest context that fits" in results["long"].error
    assert results["fits"].error is None and len(results["fits"].token_ids) == 11
    assert results["short"].error is None


def test_a_cache_without_room_for_a_page_is_refused(tiny):
    with pytest.raises(ValueError, match="expected room for 2 pages"):
        PagedEngine.of(tiny, Words(), {"dense": Attention()}, cache_bytes=100)


def test_bad_requests_are_errors_of_their_own_and_the_others_go_on(tiny):
    bad = {
        "expected a variant of": ask("b0", 5, variant="danse"),
        "the prompt has no tokens": ask("b1", ()),
        "need 4097 tokens, the model takes 4096": ask("b2", 4000, max_tokens=97),
        "token ids below 320, got 3 to 320": ask("b6", (3, 320)),
    }
    good = [ask(f"good{i}", 20 + i) for i in range(6)]
    results = answers(paged(tiny), [*bad.values(), *good])
    for text, request in bad.items():
        assert text in results[request.id].error
    assert {r.id: results[r.id] for r in good} == answers(paged(tiny), good)


def test_numbers_that_are_none_stay_within_their_request():
    tiny = load_model(str(dsa_folder("deepseek")), "float32")
    good = [ask(f"good{i}", tuple(range(10, 40 + i)), variant=v) for i, v in enumerate(("dense", "indexer", "oracle"))]
    healthy = answers(paged(tiny, shape=FEW_ROWS), good)
    assert all(7 not in result.token_ids for result in healthy.values())
    tiny.embed_tokens.weight[7] = float("nan")
    for temperature in (0.0, 1.0):
        bad = [
            ask("bad", (7, *range(20, 120)), variant="indexer", sampling=Sampling(temperature=temperature)),
            ask("scored", (1, 2, 7), continuation=(4,)),
        ]
        engine = paged(tiny, shape=FEW_ROWS)
        results = answers(engine, [*bad, *good])
        assert all("largest logit is nan" in results[name].error for name in ("bad", "scored"))
        assert {r.id: results[r.id] for r in good} == healthy
        assert answers(engine, good) == healthy, "on pages that held no numbers"


def test_an_exception_in_one_prompt_fails_that_request_alone(tiny, monkeypatch):
    requests = [ask(str(n), tuple(range(n)), max_tokens=9, variant="indexer") for n in range(60, 64)]
    expected = answers(paged(tiny), requests)
    engine = paged(tiny)
    original = engine._run_chunk

    def run_chunk(sequence, ids, start):
        hidden = original(sequence, ids, start)
        if len(ids) == 61:
            raise RuntimeError("made up\nsecond line")
        return hidden

    monkeypatch.setattr(engine, "_run_chunk", run_chunk)
    results = answers(engine, requests)
    assert results.pop("61").error == "RuntimeError: made up"
    assert results == {name: result for name, result in expected.items() if name != "61"}
    assert_all_pages_are_free(engine)


@pytest.mark.parametrize("decoded", [0, 3])
def test_an_exception_in_a_decode_step_fails_only_the_request_that_causes_it(tiny, monkeypatch, decoded):
    requests = [ask(str(n), tuple(range(n)), max_tokens=9, variant="indexer") for n in range(20, 61, 10)]
    expected = answers(paged(tiny), requests)
    original = model.serving.decoder.run_rows

    def run_rows(tiny, rows, pool):
        logits = original(tiny, rows, pool)
        if 40 + decoded in rows.positions:  # only the third request ever decodes here: the lengths lie ten apart
            raise RuntimeError("made up")
        return logits

    monkeypatch.setattr(model.serving.decoder, "run_rows", run_rows)
    engine = paged(tiny)
    results = answers(engine, requests)
    assert results.pop("40").error == "RuntimeError: made up"
    assert results == {name: result for name, result in expected.items() if name != "40"}
    assert_all_pages_are_free(engine)


def test_requests_are_pulled_as_rows_come_free_and_an_abandoned_run_leaves_nothing_behind(tiny):
    pulled = []

    def source():
        for i in range(20):
            pulled.append(i)
            yield ask(str(i), 5, max_tokens=1 if i == 3 else 4)

    engine = paged(tiny)
    run = engine.run(source())
    assert next(run).id == "3" and len(pulled) == 8
    run.close()
    assert_all_pages_are_free(engine)
    run = engine.run([ask(str(i), 5, max_tokens=2) for i in range(4)])
    next(run)
    run.close()  # the others have ended in the same step
    assert_all_pages_are_free(engine)
    for _ in engine.run([ask("a", 5), ask("b", 5, continuation=(1,))]):
        assert not torch.is_inference_mode_enabled()


def test_it_counts_what_it_did(tiny):
    engine = paged(tiny)
    list(engine.run([ask("a", 300, max_tokens=5)]))
    stats = engine.stats
    assert (stats.prefill_tokens, stats.prefill_steps, stats.decode_tokens, stats.decode_steps) == (300, 2, 4, 4)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0 and stats.pool_bytes > 0
    stats.reset()
    assert (stats.prefill_tokens, stats.decode_seconds) == (0, 0.0) and stats.pool_bytes > 0


def test_a_chunk_of_no_whole_granules_is_refused(tiny):
    with pytest.raises(ValueError, match="multiples of 256"):
        paged(tiny, shape=Shape(rows=4, chunk=300, granule=64, budget=300))

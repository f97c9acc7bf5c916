"""The paged engine: the CPU engine's answers, and the same bits in any company, order and shortage of pages."""

import dataclasses

import pytest
import torch

import model.serving.decoder
import model.serving.prompter
from model.chat.encoding import load_encoding
from model.checkpoint import load_model, resolve
from model.engine import LocalEngine
from model.request import Probes, Sampling
from model.serving.engine import PagedEngine
from tests.model.serving.helpers import FEW_ROWS, FOLDERS, assert_all_pages_are_free, paged, pages_for, served
from tests.model.test_bundled import needle_requests
from tests.model.test_engine import VARIANTS, Words, answers, ask, random_ids


def test_dsa_tiny_gives_the_cpu_engines_greedy_tokens():
    variants = {name: dataclasses.replace(VARIANTS[name], topk=128) for name in ("indexer", "oracle", "recency")}
    variants["dense"] = VARIANTS["dense"]
    encoding, bundled = load_encoding(resolve("dsa-tiny")), load_model("dsa-tiny", "bfloat16")
    requests = [
        dataclasses.replace(request, id=f"{name}/{request.id}", max_tokens=14)
        for name in variants
        for request in list(needle_requests(name))[:1]
    ]
    assert all(600 <= len(request.token_ids) <= 1500 for request in requests)
    expected = answers(LocalEngine.of(bundled, encoding, variants), requests)
    assert answers(PagedEngine.of(bundled, encoding, variants), requests) == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_random_checkpoints_give_the_cpu_engines_answers_and_recall(name):
    tiny = load_model(str(FOLDERS[name]()), "float32")
    selectors = ("oracle", "recency", *(["indexer"] if tiny.config.indexer else []))
    probes = Probes(queries=5, ks=(16,), selectors=selectors, needles=((3, 9),))
    requests = []
    for i, variant in enumerate(served(tiny)):
        ids = random_ids((300, 41, 90)[i % 3])
        requests.append(ask(f"{i}", ids, variant=variant, seed=i, probes=probes, sampling=Sampling(temperature=1.0)))
        requests.append(ask(f"{i} scored", ids, variant=variant, continuation=random_ids(5), probes=probes))
    expected = answers(LocalEngine.of(tiny, Words(), served(tiny)), requests)
    engine = paged(tiny)
    for key, result in answers(engine, requests).items():
        wanted = expected[key]
        assert (result.token_ids, result.text, result.finish_reason) == (
            wanted.token_ids, wanted.text, wanted.finish_reason,
        )  # fmt: skip
        assert result.error is None and result.is_greedy == wanted.is_greedy
        if wanted.logprobs is not None:
            assert result.logprobs == pytest.approx(wanted.logprobs, abs=2e-4)
        assert result.probes.active_share == wanted.probes.active_share
        for column, values in wanted.probes.columns.items():
            if isinstance(values[0], str):
                assert result.probes.columns[column] == values
            else:
                assert result.probes.columns[column] == pytest.approx(values, abs=1e-3), column
    assert_all_pages_are_free(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FOLDERS)
def test_bits_are_the_same_alone_in_company_in_another_order_and_after_losing_all_pages(name, dtype, logits_of):
    tiny = load_model(str(FOLDERS[name]()), dtype)
    kinds = served(tiny)
    requests = [
        ask(
            str(i), (270, 41, 90)[i % 3], variant=variant, seed=i, max_tokens=2 + i % 5,
            sampling=Sampling(temperature=1.0),
            probes=Probes(queries=3, ks=(16,), selectors=("oracle", "recency")) if i % 3 == 0 else None,
        )
        for i, variant in enumerate([*kinds, *kinds])
    ]  # fmt: skip
    alone = {}
    for request in requests:
        alone |= answers(paged(tiny), [request])
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    assert all(result.error is None for result in alone.values())
    num_pools = len({tiny.config.absorbs and a.cache_dtype == "fp8" and dtype == "bfloat16" for a in kinds.values()})
    short = paged(tiny, cache_bytes=num_pools * 3 * pages_for(tiny, 384))
    for engine, order in ((paged(tiny), requests), (paged(tiny), requests[::-1]), (short, requests)):
        assert answers(engine, order) == alone
        for request in requests:
            assert torch.equal(torch.stack(logits_of[request.seed]), bits[request.seed])
        assert_all_pages_are_free(engine)


def test_requests_that_lose_their_pages_come_back_with_the_same_bits(tiny, logits_of):
    """Four prompts of one page fill the cache; their answers need three pages each, and there are seven."""
    requests = [
        ask(str(i), 60, seed=i, variant="indexer", max_tokens=120, sampling=Sampling(temperature=1.0)) for i in range(4)
    ]
    roomy = answers(paged(tiny), requests)
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    variants = {"indexer": VARIANTS["indexer"]}
    engine = PagedEngine.of(tiny, Words(), variants, cache_bytes=pages_for(tiny, 7 * 64))
    assert engine._lanes[False].pages.capacity == 7
    assert answers(engine, requests) == roomy
    assert engine.stats.preemptions > 0 and engine.stats.replayed_tokens > 0
    for seed, steps in bits.items():
        assert torch.equal(torch.stack(logits_of[seed]), steps)
    assert_all_pages_are_free(engine)


def test_neither_the_row_nor_the_length_of_the_table_changes_a_bit(tiny, logits_of, monkeypatch):
    requests = [
        ask(str(i), 90 + 40 * i, seed=i, variant=variant, max_tokens=9, sampling=Sampling(temperature=1.0))
        for i, variant in enumerate(["dense", "indexer", "fp8", "oracle", "random"])
    ]
    expected = answers(paged(tiny), requests)
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    monkeypatch.setattr(model.serving.decoder, "FIRST_BUCKET", 1)
    engine = paged(tiny)
    monkeypatch.setattr(engine, "num_rows", 8)
    for request in requests:
        engine._decoders[request.variant] = decoder = engine._decoder(engine.admit(request, 0))
        decoder._free = decoder._free[::-1]  # the last row first
    assert answers(engine, requests) == expected
    for seed, steps in bits.items():
        assert torch.equal(torch.stack(logits_of[seed]), steps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shared_beginning_is_taken_from_the_cache_and_changes_no_bit(tiny, variant, logits_of):
    common = random_ids(530)
    first, second, third = (
        ask(str(i), (*common, *random_ids(70 - 20 * i)), variant=variant, seed=i, sampling=Sampling(temperature=1.0))
        for i in range(3)
    )
    alone = answers(paged(tiny), [third])["2"]
    bits = torch.stack(logits_of[2])
    engine = paged(tiny)
    together = answers(engine, [first, second, third])
    assert [together[name].usage.cached_tokens for name in "012"] == [0, 512, 512]
    assert together["2"].token_ids == alone.token_ids and torch.equal(torch.stack(logits_of[2]), bits)
    assert (engine.stats.cached_tokens, engine.stats.prefill_tokens) == (1024, 600 + (580 - 512) + (560 - 512))
    again = answers(engine, [dataclasses.replace(third, id="later")])["later"]
    assert again.usage.cached_tokens == 512, "a beginning outlives its request"
    assert_all_pages_are_free(engine)


def test_beginnings_are_kept_apart_by_variant_and_by_whether_index_keys_were_written(tiny):
    ids = random_ids(600)
    probes = Probes(queries=1, ks=(16,), selectors=("indexer",), seed=3)
    results = answers(
        paged(tiny, shape=FEW_ROWS), [ask("a", ids), ask("b", ids, variant="recency"), ask("c", ids, probes=probes)]
    )
    assert [results[name].usage.cached_tokens for name in "abc"] == [0, 0, 0]
    assert all(result.error is None for result in results.values())


def test_a_probed_prompt_shares_its_beginning_and_finds_the_same(tiny):
    ids = random_ids(600)
    probes = Probes(queries=20, ks=(16,), selectors=("oracle", "indexer"), seed=1)
    request = ask("b", ids, variant="indexer", probes=probes)
    alone = answers(paged(tiny), [request])["b"]
    assert min(alone.probes.columns["position"]) < 256, "the seed gives positions in the shared beginning"
    after = answers(paged(tiny), [ask("a", ids, variant="indexer"), request])["b"]
    assert after.usage.cached_tokens == 512 and after.probes == alone.probes


def test_an_answer_does_not_leak_into_the_beginning(tiny):
    ids = random_ids(510)
    again = ask("b", (*ids, *random_ids(30)))
    alone = answers(paged(tiny), [again])["b"]
    probes = Probes(queries=1, ks=(16,), selectors=("recency",))
    shared = answers(paged(tiny), [ask("a", ids, max_tokens=20, probes=probes), again])["b"]
    assert shared.usage.cached_tokens == 256 and shared.token_ids == alone.token_ids


def test_steps_that_are_captured_once_and_replayed_give_the_same_bits(tiny, logits_of, monkeypatch):
    """What a graph does is put together here without one: fixed inputs and outputs, warm-ups on padding."""
    requests = [
        ask(str(i), 40 + 90 * i, seed=i, variant=variant, max_tokens=30, sampling=Sampling(temperature=1.0))
        for i, variant in enumerate([*VARIANTS, "dense", "indexer"])
    ]
    expected = answers(paged(tiny), requests)
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    captured = []

    def capture(run, memory):
        run()
        run()
        captured.append(run)
        return run

    for module in (model.serving.decoder, model.serving.prompter):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(model.serving.decoder, "FIRST_BUCKET", 2)
    monkeypatch.setattr(model.serving.prompter, "USES", 1)
    engine = paged(tiny)
    engine.graphs = engine.prompt_graphs = True
    assert answers(engine, requests) == expected
    assert engine.stats.graphs == len(captured) > 12
    for seed, steps in bits.items():
        assert torch.equal(torch.stack(logits_of[seed]), steps)
    second = [start for prompter in engine._prompters.values() for _, start, _ in prompter._steps if start > 0]
    assert set(second) == {256, 512}, "chunks behind the first are captured as well"


def test_a_chunk_is_captured_when_its_place_and_size_have_come_often(tiny, logits_of, monkeypatch):
    captured = []
    monkeypatch.setattr(model.serving.prompter, "capture", lambda run, memory: captured.append(run) or run)
    monkeypatch.setattr(model.serving.prompter, "GRAPH_CONTEXT", 512)
    requests = [ask(str(i), 560 + i, seed=i, variant="indexer", max_tokens=3) for i in range(6)]
    expected = answers(paged(tiny), requests)
    engine = paged(tiny)
    engine.prompt_graphs = True
    assert answers(engine, requests) == expected
    assert sorted((start, length) for _, start, length in engine._prompters["indexer"]._steps) == [(0, 256), (256, 256)]
    assert len(captured) == 2, "what lies behind GRAPH_CONTEXT is launched anew"
    monkeypatch.setattr(model.serving.prompter, "MAX_GRAPHS", 1)
    few = paged(tiny)
    few.prompt_graphs = True
    assert answers(few, requests) == expected
    assert few.stats.graphs == 1

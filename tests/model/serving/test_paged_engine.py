"""The paged engine: the CPU engine's answers, and the same bits in any company, order and shortage of pages."""

import dataclasses

import pytest
import torch

import model.sequence
import model.serving.decoder
import model.serving.prompter
from model.chat.encoding import load_encoding
from model.checkpoint import load_model, resolve
from model.engine import LocalEngine
from model.request import Attention, Probes, Sampling
from model.sampling import Sampler
from model.serving.engine import PagedEngine
from model.serving.shape import Shape
from tests.model.helpers import dsa_folder, llama_folder, ours
from tests.model.test_bundled import needle_requests
from tests.model.test_engine import VARIANTS, Words, answers, ask, random_ids

FOLDERS = {
    "deepseek-moe": lambda: dsa_folder("deepseek"),
    "glm-shared-moe": lambda: dsa_folder("glm", index_topk_pattern="FSF"),
    "llama": llama_folder,
}
FEW_ROWS = Shape(rows=4, chunk=256, granule=64, budget=256)


def served(tiny):
    return {n: a for n, a in VARIANTS.items() if tiny.config.indexer or a.topk is None or a.selector != "indexer"}


def paged(tiny, encoding=None, **options):
    return PagedEngine.of(tiny, encoding or Words(), served(tiny), **options)


def pages_for(tiny, tokens, **options):
    """Bytes of a cache that holds so many tokens for one request of one kind of storage."""
    engine = PagedEngine.of(tiny, Words(), {"dense": VARIANTS["dense"]}, cache_bytes=1 << 24, **options)
    (lane,) = engine._lanes.values()
    return (tokens // 64 + 1) * (lane.pool.num_bytes // lane.pool.num_pages)


@pytest.fixture
def tiny():
    return ours(dsa_folder("deepseek"))


@pytest.fixture
def logits_of(monkeypatch):
    """{seed of the request: logits of each of its sampled tokens}, filled while an engine runs."""
    seen: dict[int, list[torch.Tensor]] = {}

    class Recording(Sampler):
        def __init__(self, sampling, seed):
            super().__init__(sampling, seed)
            seen[seed] = []
            self.mine = seen[seed]

        def next(self, logits):
            self.mine.append(logits.clone())
            return super().next(logits)

    monkeypatch.setattr(model.sequence, "Sampler", Recording)
    return seen


def assert_all_pages_are_free(engine):
    for lane in engine._lanes.values():
        assert lane.pages.can_take(lane.pages.capacity)
    for decoder in engine._decoders.values():
        assert len(decoder._free) == decoder.num_rows and not decoder.host.any()


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


def test_probed_positions_are_never_skipped(tiny):
    ids = random_ids(600)
    probes = Probes(queries=2, ks=(16,), selectors=("oracle", "indexer"), seed=1)
    request = ask("b", ids, variant="indexer", probes=probes)
    alone = answers(paged(tiny), [request])["b"]
    assert 256 <= min(alone.probes.columns["position"]) < 512, "the seed gives a first position in the second chunk"
    after = answers(paged(tiny), [ask("a", ids, variant="indexer"), request])["b"]
    assert after.usage.cached_tokens == 256 and after.probes == alone.probes


def test_an_answer_does_not_leak_into_the_beginning(tiny):
    ids = random_ids(510)
    again = ask("b", (*ids, *random_ids(30)))
    alone = answers(paged(tiny), [again])["b"]
    probes = Probes(queries=1, ks=(16,), selectors=("recency",))
    shared = answers(paged(tiny), [ask("a", ids, max_tokens=20, probes=probes), again])["b"]
    assert shared.usage.cached_tokens == 256 and shared.token_ids == alone.token_ids


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
    monkeypatch.setattr("model.serving.engine.SCORED_ROWS", 100)
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
    engine = paged(tiny)
    engine.graphs = engine.prompt_graphs = True
    assert answers(engine, requests) == expected
    assert engine.stats.graphs == len(captured) > 12
    for seed, steps in bits.items():
        assert torch.equal(torch.stack(logits_of[seed]), steps)

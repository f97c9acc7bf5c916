"""The fast engine: the default greedy answers in float32, in longer chunks, from shorter beginnings."""

import dataclasses

import pytest
import torch

import model.serving.decoder
import model.serving.forms
from model.attention import MLA
from model.checkpoint import load_model
from model.config import read_config
from model.errors import ModelError
from model.layers import Gate
from model.random_checkpoint import CONFIG
from model.request import Attention, Probes, Sampling
from model.serving.engine import PagedEngine
from model.serving.forms import form_runs
from model.serving.memory import STEP_SHARE, fit_chunk, working_bytes
from model.serving.shape import FAST_SHAPES, SHAPES, Shape, numerics
from model.serving.step import Chunk, Rows
from tests.model.serving.helpers import FOLDERS, assert_all_pages_are_free, paged, pages_for, served
from tests.model.test_engine import VARIANTS, Words, answers, ask, random_ids

# rounding to FP8 makes a last bit a larger step, so that near ties may fall either way
ROUNDED = "fp8"


def same_tokens(results, expected):
    assert {key: r.error for key, r in results.items()} == dict.fromkeys(expected)
    assert {key: r.token_ids for key, r in results.items()} == {key: r.token_ids for key, r in expected.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_answers_and_log_likelihoods_are_those_of_the_default_engine(name):
    tiny = load_model(str(FOLDERS[name]()), "float32")
    probes = Probes(queries=4, ks=(16,), selectors=("oracle", "recency"))
    requests = []
    for i, variant in enumerate(served(tiny)):
        ids = random_ids((300, 41, 700)[i % 3])
        requests.append(ask(f"{variant} scored", ids, variant=variant, continuation=random_ids(5)))
        if variant != ROUNDED:
            requests.append(ask(variant, ids, variant=variant, max_tokens=2 + i, probes=probes if i % 2 else None))
    expected = answers(paged(tiny), requests)
    engine = paged(tiny, fast=True)
    results = answers(engine, requests)
    same_tokens(results, expected)
    for key, result in expected.items():
        if result.logprobs is not None:
            close = 5e-2 if key.startswith(ROUNDED) else 2e-4
            assert results[key].logprobs == pytest.approx(result.logprobs, abs=close)
        if result.probes is not None:
            assert results[key].probes.active_share == result.probes.active_share
    assert_all_pages_are_free(engine)


def test_padding_takes_the_experts_of_a_real_row(tiny, monkeypatch):
    chosen = []
    original = Gate.forward

    def forward(self, x):
        experts, weights = original(self, x)
        if len(x) == num_rows:
            chosen.append([set(row) for row in experts.tolist()])
        return experts, weights

    monkeypatch.setattr(Gate, "forward", forward)
    requests = [ask(str(i), 20 + i, max_tokens=3) for i in range(3)]
    engine = paged(tiny)
    num_rows = engine.shape.rows
    answers(engine, requests)
    assert len(chosen) == 2 * sum(tiny.config.moe.sparse)
    assert all(padding in experts[:3] for experts in chosen for padding in experts[3:])


def test_what_padding_chooses_changes_no_bit_of_other_rows(tiny, logits_of, monkeypatch):
    requests = [ask(str(i), 50 + i, seed=i, max_tokens=6, sampling=Sampling(temperature=1.0)) for i in range(3)]
    expected = answers(paged(tiny), requests)
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    original = Rows.unpack.__func__

    def unpack(cls, *given):
        return dataclasses.replace(original(cls, *given), like=None)

    monkeypatch.setattr(Rows, "unpack", classmethod(unpack))
    same_tokens(answers(paged(tiny), requests), expected)
    assert all(torch.equal(torch.stack(logits_of[seed]), steps) for seed, steps in bits.items())


@pytest.mark.parametrize("name", FOLDERS)
def test_each_part_of_a_long_chunk_takes_the_form_of_its_positions(name, monkeypatch):
    tiny = load_model(str(FOLDERS[name]()), "float32")
    prompts = [random_ids(500), random_ids(330)]
    requests = [
        ask(f"{variant} {len(ids)}", ids, variant=variant, max_tokens=4)
        for variant in served(tiny)
        if variant != ROUNDED
        for ids in prompts
    ]
    expected = answers(paged(tiny), requests)
    monkeypatch.setattr(model.serving.forms, "FORM_UNIT", 128)
    monkeypatch.setattr(MLA, "_gathers", lambda self, topk, position: position // 128 in (1, 3))
    lengths: list[int] = []
    original = Chunk.part

    def part(self, start, stop):
        lengths.append(stop - start)
        return original(self, start, stop)

    monkeypatch.setattr(Chunk, "part", part)
    same_tokens(answers(paged(tiny, fast=True), requests), expected)
    assert 128 in lengths and max(lengths) <= 128


def test_parts_of_one_form_are_read_together(tiny, monkeypatch):
    layer, cpu = tiny.layers[0].self_attn, torch.device("cpu")
    monkeypatch.setattr(MLA, "_gathers", lambda self, topk, position: position >= 4096)
    assert form_runs(layer, 2048, 0, 8192, cpu) == [
        (0, 2048, "dense"), (2048, 4096, "masked"), (4096, 8192, "gathered")
    ]  # fmt: skip
    assert form_runs(layer, 2048, 256, 2560, cpu) == [(256, 2048, "dense"), (2048, 2560, "masked")]
    assert form_runs(layer, 2048, 6144, 8192, cpu) == [(6144, 8192, "gathered")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_beginnings_are_shared_page_by_page(tiny, variant):
    common = random_ids(730)
    ids = [(*common[:shared], *random_ids(40 + shared % 7)) for shared in (730, 730, 200, 63)]
    requests = [ask(str(i), ids[i], variant=variant) for i in range(4)]
    alone = {}
    for request in requests:
        alone |= answers(paged(tiny), [request])
    engine = paged(tiny, fast=True)
    together = answers(engine, requests)
    assert [together[name].usage.cached_tokens for name in "0123"] == [0, 704, 192, 0]
    if variant != ROUNDED:
        same_tokens(together, alone)
    again = answers(engine, [dataclasses.replace(requests[1], id="later")])["later"]
    assert again.usage.cached_tokens == (len(ids[1]) - 1) // 64 * 64, "and a chunk begins wherever they end"
    assert variant == ROUNDED or again.token_ids == alone["1"].token_ids
    assert_all_pages_are_free(engine)


def test_requests_that_lose_their_pages_come_back_with_the_same_tokens(tiny):
    requests = [ask(str(i), 60, variant="indexer", max_tokens=120) for i in range(4)]
    expected = answers(paged(tiny), requests)
    variants = {"indexer": VARIANTS["indexer"]}
    engine = PagedEngine.of(tiny, Words(), variants, cache_bytes=pages_for(tiny, 7 * 64), fast=True)
    same_tokens(answers(engine, requests), expected)
    assert engine.stats.preemptions > 0
    assert_all_pages_are_free(engine)


def test_an_exception_in_a_decode_step_fails_only_the_request_that_causes_it(tiny, monkeypatch):
    requests = [ask(str(n), tuple(range(n)), max_tokens=9, variant="indexer") for n in range(20, 61, 10)]
    expected = answers(paged(tiny), requests)
    original = model.serving.decoder.run_rows

    def run_rows(tiny, rows, pool):
        logits = original(tiny, rows, pool)
        if 43 in rows.positions:
            raise RuntimeError("made up")
        return logits

    monkeypatch.setattr(model.serving.decoder, "run_rows", run_rows)
    engine = paged(tiny, fast=True)
    results = answers(engine, requests)
    assert results.pop("40").error == "RuntimeError: made up"
    same_tokens(results, {name: result for name, result in expected.items() if name != "40"})
    assert_all_pages_are_free(engine)


def test_two_engines_over_the_same_weights_and_pages_take_no_beginning_from_each_other(tiny):
    ids = random_ids(600)
    fast = PagedEngine.of(tiny, Words(), {"dense": Attention()}, cache_bytes=pages_for(tiny, 4096), fast=True)
    default = fast.beside(fast=False)
    assert default.model is fast.model and default._lanes is fast._lanes and default._outputs is fast._outputs
    assert (default.shape, fast.shape) == (SHAPES["cpu"], FAST_SHAPES["cpu"])
    cached = [answers(e, [ask("a", ids)])["a"].usage.cached_tokens for e in (fast, default, fast, default)]
    assert cached == [0, 0, 576, 512]
    assert answers(default, [ask("a", ids)])["a"].token_ids == answers(paged(tiny), [ask("a", ids)])["a"].token_ids
    with pytest.raises(ModelError, match=r"expected steps no larger than those of Shape\(rows=8, chunk=256"):
        default.beside(fast=True)


def test_the_tag_says_that_bits_may_differ(tiny, monkeypatch):
    assert (numerics("cpu"), numerics("cuda")) == ("cpu-paged-1", "cuda-paged-6")
    assert (numerics("cpu", fast=True), numerics("cuda", fast=True)) == ("cpu-paged-1-fast", "cuda-paged-6-fast")
    monkeypatch.setattr("kernels.switch.FORCE_TORCH", True)
    assert numerics("cuda", fast=True) == "cuda-paged-6-torch-fast"
    assert (paged(tiny).numerics, paged(tiny, fast=True).numerics) == ("cpu-paged-1", "cpu-paged-1-fast")


def test_the_default_shapes_are_fixed_and_the_fast_ones_are_not():
    for device, shape in SHAPES.items():
        assert shape.shared == shape.chunk
        fast = FAST_SHAPES[device]
        fast.check()
        assert fast.shared < shape.chunk < fast.chunk and fast.rows == shape.rows
    assert SHAPES["cuda"] == (64, 2048, 256, 8192, 0)


def test_chunks_are_as_long_as_memory_and_context_allow():
    config = read_config(CONFIG, "test")
    sizes = {chunk: working_bytes(config, 2, 64, chunk, config.max_positions) for chunk in (2048, 4096, 8192)}
    for chunk, size in sizes.items():
        room = int(size / STEP_SHARE) + 1
        assert fit_chunk(config, 2, 64, 8192, 2048, room) == chunk, "a step of this size has just its share"
        assert fit_chunk(config, 2, 64, 8192, 2048, room - 2) == max(2048, chunk // 2)
    for context, chunk in ((163_840, 8192), (4097, 8192), (4096, 4096), (512, 2048)):
        assert fit_chunk(dataclasses.replace(config, max_positions=context), 2, 64, 8192, 2048, 1 << 40) == chunk


@pytest.mark.parametrize("unit", [-64, 32, 192])
def test_units_that_are_no_pages_or_do_not_divide_the_chunk_are_refused(tiny, unit):
    with pytest.raises(ValueError, match="multiples of 256, of the granule and of the unit"):
        paged(tiny, shape=Shape(rows=4, chunk=256, granule=64, budget=256, unit=unit))

"""Recall behind an answer: steps that read the cache, whatever their size, and leave it as it was."""

import copy
import dataclasses

import pytest
import torch

import model.probe
import model.serving.memory as memory
import model.serving.prompter
import model.serving.recall
from kernels import attention_mass
from model.checkpoint import load_model
from model.config import read_config
from model.probe import sampled_positions
from model.request import Probes
from model.serving.memory import layers_at_once, probe_bytes, recall_rows
from model.serving.recall import Recaller
from tests.model.serving.helpers import FOLDERS, assert_all_pages_are_free, paged, served
from tests.model.serving.test_plan import LiveBytes
from tests.model.test_config import DEEPSEEK_V32
from tests.model.test_engine import answers, ask, random_ids

NUMBERS = ("mass", "oracle_mass", "topk_recall", "output_error", "needle_coverage")


@pytest.fixture(params=FOLDERS)
def tiny(request):
    return load_model(str(FOLDERS[request.param]()), "float32")


def probed(tiny, length=300, queries=40, max_tokens=9):
    """One request a variant, that asks every selector it may."""
    selectors = ("oracle", "recency", "random", *(["indexer"] if tiny.config.indexer else []))
    probes = Probes(queries=queries, ks=(16, 64), selectors=selectors, needles=((3, 9),))
    ids = random_ids(length)
    return [ask(name, ids, variant=name, max_tokens=max_tokens, probes=probes) for name in served(tiny)]


def same_numbers(found, expected):
    for key, result in found.items():
        wanted = expected[key].probes.columns
        for name, values in result.probes.columns.items():
            if name not in NUMBERS:
                assert values == wanted[name], (key, name)
                continue
            pairs = zip(values, wanted[name], strict=True)
            different = [a != b and (a is None or b is None or abs(a - b) > 1e-5) for a, b in pairs]
            assert sum(different) <= 0.01 * len(different), (key, name)  # a near tie may fall either way


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_the_rows_of_a_step_change_no_number(tiny, rows, monkeypatch):
    """Several steps a request: index keys of the answer are there for the later ones."""
    requests = probed(tiny)
    expected = answers(paged(tiny), requests)
    assert all(result.error is None for result in expected.values())
    monkeypatch.setattr(model.serving.recall, "recall_rows", lambda config, itemsize: rows)
    same_numbers(answers(paged(tiny), requests), expected)


def test_the_layers_that_are_measured_together_change_no_number(tiny, monkeypatch):
    requests = probed(tiny)
    expected = answers(paged(tiny), requests)
    for count in (1, 2):
        monkeypatch.setattr(model.serving.recall, "layers_at_once", lambda *args, count=count: count)
        same_numbers(answers(paged(tiny), requests), expected)


def test_every_sampled_query_and_every_token_of_the_answer_stands_in_the_result_once(tiny):
    for request in probed(tiny):
        result = answers(paged(tiny), [request])[request.id]
        columns, spec = result.probes.columns, request.probes
        rows = list(zip(*(columns[name] for name in ("phase", "layer", "k", "selector", "position")), strict=True))
        positions = {"prompt": sampled_positions(spec, 300), "answer": range(299, 299 + len(result.token_ids))}
        assert rows == [
            (phase, layer, k, selector, position)
            for phase in ("prompt", "answer")
            for layer in range(tiny.config.num_layers)
            for k in spec.ks
            for selector in spec.selectors
            for position in positions[phase]
        ]
        assert columns["visible"] == [position + 1 for position in columns["position"]]


def test_latent_rows_and_the_prompts_index_keys_stay_as_they_were(tiny, monkeypatch):
    original, checked = Recaller.measure, []

    def watched(self, probe, prompt, answer, pages, index_dtype, known):
        kept = torch.zeros(self.pool.num_pages, 64, dtype=torch.bool)
        for place in range(known):
            kept[pages[place // 64], place % 64] = True
        before = [copy.deepcopy((layer.latent, layer.index)) for layer in self.pool.layers]
        original(self, probe, prompt, answer, pages, index_dtype, known)
        for layer, (latent, index) in zip(self.pool.layers, before, strict=True):
            assert torch.equal(layer.latent, latent)
            for name, store in layer.index.items():
                rows = [_index_rows(each) for each in (store, index[name])]
                assert torch.equal(rows[0][kept], rows[1][kept])
                checked.append(name)

    monkeypatch.setattr(Recaller, "measure", watched)
    engine = paged(tiny)
    assert all(result.error is None for result in answers(engine, probed(tiny)).values())
    assert set(checked) == ({"float32", "fp8"} if tiny.config.indexer else set())
    assert_all_pages_are_free(engine)


def _index_rows(store):
    """Index keys of all pages, [p, 64, bytes or d]: FP8's lie in planes of keys and of scales."""
    if store.dtype != torch.uint8:
        return store
    return torch.cat([store[:, : -4 * 64].unflatten(1, (64, -1)), store[:, -4 * 64 :].unflatten(1, (64, 4))], 2)


def test_prompts_and_answers_run_as_without_recall(tiny, logits_of):
    with_recall = [dataclasses.replace(request, seed=i) for i, request in enumerate(probed(tiny))]
    plain = [dataclasses.replace(request, probes=None) for request in with_recall]
    expected = answers(paged(tiny), plain)
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    results = answers(paged(tiny), with_recall)
    assert all(results[key].token_ids == result.token_ids for key, result in expected.items())
    assert all(torch.equal(torch.stack(logits_of[seed]), steps) for seed, steps in bits.items())


def test_a_captured_step_of_recall_finds_the_same(tiny, monkeypatch):
    """What a graph does is put together here without one: fixed inputs, kept queries, warm-ups on padding."""
    captured = []

    def capture(run, memory):
        run()
        run()
        captured.append(run)
        return run

    requests = [*probed(tiny), *(r for r in probed(tiny, 1100))]
    requests = [ask(f"{i}", r.token_ids, variant=r.variant, probes=r.probes) for i, r in enumerate(requests)]
    expected = answers(paged(tiny), requests)
    for module in (model.serving.recall, model.serving.prompter):
        monkeypatch.setattr(module, "capture", capture)
    engine = paged(tiny)
    engine.prompt_graphs = True
    assert answers(engine, requests) == expected
    steps = [key for recaller in engine._recallers.values() for key in recaller._steps]
    assert {pages for _, pages in steps} == {16, 32} and len(captured) >= len(steps) > len(served(tiny))


def test_recall_holds_no_more_than_is_planned_for_it(tiny, monkeypatch):
    """As on a GPU, where sets of keys are read together: beside rows of the cache and a tile for several layers'."""
    tile = 1 << 20  # so that it counts beside what else a small model holds
    for module in (attention_mass, memory):
        monkeypatch.setattr(module, "TILE_BYTES", tile)
    monkeypatch.setattr(model.probe, "together", lambda logits: max(1, tile // logits.nbytes))
    original, peaks, layers = Recaller._measure, [], set()

    def measured(self, probe, places, phases, table, index_dtype):
        with LiveBytes() as live:
            original(self, probe, places, phases, table, index_dtype)
        config, rows = tiny.config, len(places)
        least = (places[-1] + 1) * memory._key_bytes(config, 4)
        planned = probe_bytes(config, rows * config.num_layers, places[-1] + 1) + max(tile, least)
        peaks.append((live.peak, planned))
        layers.add(layers_at_once(config, 4, rows, places[-1] + 1))

    monkeypatch.setattr(Recaller, "_measure", measured)
    for length in (90, 700):
        results = answers(paged(tiny), probed(tiny, length, queries=50))
        assert all(result.error is None for result in results.values())
    assert all(peak <= planned for peak, planned in peaks) and max(peak for peak, _ in peaks) > tile
    assert min(layers) == 1 < max(layers)


def test_a_step_keeps_the_queries_of_as_many_tokens_as_memory_is_planned_for(tiny):
    assert recall_rows(tiny.config, 4) == 64
    full = read_config(DEEPSEEK_V32, "config.json")
    assert memory.KEPT_BYTES // 16 < 61 * (128 * 576 * 2 + 64 * 129 * 4) <= memory.KEPT_BYTES // 8
    assert recall_rows(full, 2) == 8
    assert layers_at_once(full, 2, 8, 131_072) == 1

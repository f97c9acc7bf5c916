"""The paged engine on a GPU: the CPU's answers, the same bits in any company, with and without graphs."""

import dataclasses
import gc

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
import model.sequence
import model.serving.prompter
from model.chat.encoding import load_encoding
from model.checkpoint import load_model, resolve
from model.engine import LocalEngine
from model.probe import Probe
from model.request import Attention, Probes, Request, Sampling
from model.sampling import Sampler
from model.serving.decoder import Decoder
from model.serving.engine import PagedEngine
from model.transformer import Transformer
from tests.model.test_bundled import needle_requests
from tests.model.test_engine import Words

VARIANTS = {
    "dense": Attention(),
    "indexer": Attention(topk=128),
    "bfloat16": Attention(topk=128, index_dtype="bfloat16"),
    "fp8": Attention(topk=128, index_dtype="fp8", cache_dtype="fp8"),
    "oracle": Attention(topk=128, selector="oracle"),
    "recency": Attention(topk=128, selector="recency"),
    "random": Attention(topk=128, selector="random", seed=4),
}
CACHE = 2 << 30


@pytest.fixture(scope="module")
def bundled():
    """dsa-tiny on the GPU by dtype, loaded once."""
    loaded: dict[str, Transformer] = {}

    def load(dtype):
        if dtype not in loaded:
            loaded[dtype] = load_model("dsa-tiny", dtype, "cuda")
        return loaded[dtype]

    return load


@pytest.fixture(autouse=True)
def _freed():
    """Engines are cycles of objects: without this, those of earlier tests fill a GPU that several processes share."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


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


def paged(tiny, variants=VARIANTS, **options):
    return PagedEngine.of(tiny, Words(), variants, **{"cache_bytes": CACHE, **options})


def answers(engine, requests):
    results = {r.id: dataclasses.replace(r, seconds=0.0) for r in engine.run(requests)}
    assert {key: r.error for key, r in results.items() if r.error} == {}
    assert set(results) == {r.id for r in requests}
    return results


def random_ids(length, vocabulary=4096):
    return tuple(torch.randint(3, vocabulary, (length,)).tolist())


def sampled(variants=VARIANTS, lengths=(90, 300, 1500, 2600), **changes):
    """One request a variant and length, each drawing its tokens."""
    return [
        Request(
            id=f"{variant}/{length}", variant=variant, token_ids=random_ids(length), max_tokens=6, seed=i * 100 + j,
            sampling=Sampling(temperature=1.0), **changes,
        )
        for i, variant in enumerate(variants)
        for j, length in enumerate(lengths)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["dense", "indexer", "oracle", "recency"])
def test_dsa_tiny_gives_the_cpus_greedy_tokens(bundled, name):
    encoding, on_cpu = load_encoding(resolve("dsa-tiny")), load_model("dsa-tiny", "float32")
    requests = [dataclasses.replace(r, max_tokens=14) for r in needle_requests(name)]
    variants = {name: VARIANTS[name]}
    expected = {r.id: r.token_ids for r in LocalEngine.of(on_cpu, encoding, variants).run(requests)}
    engine = PagedEngine.of(bundled("float32"), encoding, variants, cache_bytes=CACHE)
    assert {key: r.token_ids for key, r in answers(engine, requests).items()} == expected


def test_dsa_tiny_finds_needles_in_bfloat16_with_its_indexer_and_not_without(bundled):
    encoding = load_encoding(resolve("dsa-tiny"))
    variants = {name: VARIANTS[name] for name in ("dense", "indexer", "fp8", "recency")}
    engine = PagedEngine.of(bundled("bfloat16"), encoding, variants, cache_bytes=CACHE)
    numbers = {"quokka-lantern": "4719386", "velvet-anvil": "8250147", "brisk-harbor": "6093582"}
    for name in variants:
        requests = list(needle_requests(name))
        found = {key: numbers[key] in r.text for key, r in answers(engine, requests).items()}
        assert all(value == (name != "recency") for value in found.values()), (name, found)


@pytest.mark.parametrize("name", ["dense", "indexer", "oracle", "recency"])
def test_a_fast_engine_gives_the_same_greedy_tokens_from_shorter_beginnings(bundled, name):
    tiny, variants = bundled("float32"), {name: VARIANTS[name]}
    requests = [
        dataclasses.replace(r, id=f"{i}/{r.id}", max_tokens=4 + 3 * i + j)
        for i in range(2)
        for j, r in enumerate(needle_requests(name))
    ]
    expected = answers(paged(tiny, variants), requests)
    engine = paged(tiny, variants, fast=True)
    results = answers(engine, requests)
    assert {key: r.token_ids for key, r in results.items()} == {key: r.token_ids for key, r in expected.items()}
    assert engine.stats.graphs >= 1 and engine.numerics.endswith("-fast")
    cached = [results[r.id].usage.cached_tokens for r in requests]
    assert cached[0] == 0 and min(cached[1:]) >= 512 and max(r.usage.cached_tokens for r in expected.values()) == 0


def test_a_fast_engine_and_a_default_one_share_weights_and_pages_in_turn(bundled):
    tiny, requests = bundled("bfloat16"), sampled(lengths=(300, 2600))
    expected = answers(paged(tiny), requests)
    fast = paged(tiny, fast=True)
    held = torch.cuda.memory_allocated()
    default = fast.beside(fast=False)
    assert torch.cuda.memory_allocated() <= held
    for _ in range(2):  # graphs of both are replayed in turn, in one pool of memory
        assert {r.finish_reason for r in answers(fast, requests).values()} == {"length"}
        again = answers(default, requests)
        assert {key: r.token_ids for key, r in again.items()} == {key: r.token_ids for key, r in expected.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_are_the_same_alone_in_company_and_in_another_order(bundled, dtype, logits_of):
    tiny, requests = bundled(dtype), sampled()
    alone_engine, alone = paged(tiny), {}
    for request in requests:
        alone |= answers(alone_engine, [request])
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    for order in (requests, requests[::-1]):
        assert answers(paged(tiny), order) == alone
        different = [seed for seed, steps in bits.items() if not torch.equal(torch.stack(logits_of[seed]), steps)]
        assert different == []


def test_requests_that_lose_their_pages_come_back_with_the_same_bits(bundled, logits_of):
    tiny, variants = bundled("bfloat16"), {"indexer": VARIANTS["indexer"]}
    requests = [dataclasses.replace(r, max_tokens=150) for r in sampled(variants, (60, 61, 62, 63))]
    roomy = paged(tiny, variants)
    expected = answers(roomy, requests)
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    page = roomy.stats.pool_bytes // roomy._lanes[False].pool.num_pages
    short = paged(tiny, variants, cache_bytes=8 * page)
    assert answers(short, requests) == expected
    assert short.stats.preemptions > 0
    assert all(torch.equal(torch.stack(logits_of[seed]), steps) for seed, steps in bits.items())


@pytest.mark.parametrize("prompt_graphs", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_graphs_and_single_launches_give_the_same_bits(bundled, name, prompt_graphs, logits_of, monkeypatch):
    """The longest prompt has a second chunk: that one is captured as well."""
    monkeypatch.setattr(model.serving.prompter, "USES", 1)
    tiny, variants = bundled("bfloat16"), {name: VARIANTS[name]}
    requests = sampled(variants)
    expected = answers(paged(tiny, variants, graphs=False), requests)
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    engine = paged(tiny, variants, prompt_graphs=prompt_graphs)
    assert answers(engine, requests) == expected
    assert engine.stats.graphs >= (6 if prompt_graphs else 1)
    assert all(torch.equal(torch.stack(logits_of[seed]), steps) for seed, steps in bits.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_decode_step_never_waits_for_the_gpu(bundled, name, monkeypatch):
    original = Decoder._run

    def strict(self, given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(self, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    variants = {name: VARIANTS[name]}
    engine = paged(bundled("bfloat16"), variants, graphs=False)
    answers(engine, sampled(variants, (300,)))  # kernels are compiled
    monkeypatch.setattr(Decoder, "_run", strict)
    answers(engine, sampled(variants, (300,)))


@pytest.mark.parametrize("name", ["dense", "indexer", "fp8", "random"])
def test_a_shared_beginning_changes_no_bit(bundled, name, logits_of):
    common = random_ids(2200)
    requests = [
        dataclasses.replace(r, token_ids=(*common, *r.token_ids)) for r in sampled({name: VARIANTS[name]}, (40, 50, 60))
    ]
    tiny, variants = bundled("bfloat16"), {name: VARIANTS[name]}
    together = answers(paged(tiny, variants), requests)
    assert [together[r.id].usage.cached_tokens for r in requests] == [0, 2048, 2048]
    bits = torch.stack(logits_of[requests[-1].seed])
    answers(paged(tiny, variants), requests[-1:])
    assert torch.equal(torch.stack(logits_of[requests[-1].seed]), bits)


def test_recall_and_log_likelihoods_are_the_cpus(bundled):
    probes = Probes(queries=8, ks=(64, 128), selectors=("indexer", "oracle", "recency"), needles=((40, 60),))
    encoding, on_cpu = load_encoding(resolve("dsa-tiny")), load_model("dsa-tiny", "float32")
    prompt = next(needle_requests("dense")).token_ids
    variants = {name: VARIANTS[name] for name in ("dense", "indexer")}
    requests = [
        Request(id=name, variant=name, token_ids=prompt, max_tokens=1, continuation=prompt[:20], probes=probes)
        for name in variants
    ]
    expected = answers(LocalEngine.of(on_cpu, encoding, variants), requests)
    for key, result in answers(paged(bundled("float32"), variants), requests).items():
        assert result.logprobs == pytest.approx(expected[key].logprobs, abs=2e-2)
        mine, theirs = by_query(result), by_query(expected[key])
        assert mine.keys() == theirs.keys()
        for column in ("visible", "needle_coverage"):
            same = [mine[row][column] == theirs[row][column] for row in mine]
            assert sum(same) > 0.98 * len(same), column
        for column in ("mass", "oracle_mass", "topk_recall"):  # near ties may fall either way
            close = [abs(mine[row][column] - theirs[row][column]) < 2e-2 for row in mine]
            assert sum(close) > 0.98 * len(close), column


def test_measuring_recall_never_waits_for_the_gpu(bundled, monkeypatch):
    """Numbers are sent to the GPU once a step, columns are fetched once a request: nothing waits in between."""
    original = Probe._tile

    def strict(self, layers, values, scorers, positions, logits):
        for numbers in (self.spec.ks, self._needle):
            self._on(positions.device, numbers)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self, layers, values, scorers, positions, logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    probes = Probes(queries=8, ks=(16, 64), selectors=("indexer", "oracle", "recency", "random"), needles=((40, 60),))
    engine = paged(bundled("bfloat16"), {"dense": VARIANTS["dense"]})
    requests = sampled({"dense": VARIANTS["dense"]}, (300,), probes=probes)
    expected = answers(engine, requests)  # kernels are compiled
    monkeypatch.setattr(Probe, "_tile", strict)
    assert answers(engine, requests) == expected


def test_recall_is_the_same_in_captured_steps_and_single_launches_and_in_company(bundled):
    """A step a request: its numbers depend on that request alone."""
    probes = Probes(queries=30, ks=(16, 64), selectors=("indexer", "oracle", "recency", "random"), needles=((40, 60),))
    tiny, variants = bundled("bfloat16"), {name: VARIANTS[name] for name in ("dense", "indexer", "fp8")}
    requests = sampled(variants, (300, 1500, 2300), probes=probes)
    together = answers(paged(tiny, variants, graphs=True, prompt_graphs=True), requests)
    assert all(result.error is None for result in together.values())
    apart = paged(tiny, variants, graphs=False, prompt_graphs=False)
    for request in requests:
        assert answers(apart, [request])[request.id] == together[request.id]


def by_query(result):
    """Recall's rows by what they measure: their order depends on the chunks."""
    columns = result.probes.columns
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {tuple(row[name] for name in ("phase", "position", "layer", "selector", "k")): row for row in rows}

"""The paged engine on a GPU: the CPU's answers, the same bits in any company, with and without graphs; 128k tokens."""

import dataclasses

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
import model.sequence
import model.serving.prompter
from model.chat.encoding import load_encoding
from model.checkpoint import load_model, resolve
from model.config import ModelConfig, read_config
from model.engine import LocalEngine
from model.probe import Probe
from model.request import Attention, Probes, Request, Sampling
from model.sampling import Sampler
from model.serving.decoder import Decoder
from model.serving.engine import PagedEngine
from model.serving.memory import working_bytes
from model.serving.shape import Shape
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
# DeepSeek-V3.2's attention and indexer over a small hidden state: 2 layers, the second with experts
WIDE = {
    "model_type": "deepseek_v32", "vocab_size": 512, "hidden_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 128, "q_lora_rank": 512, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 512, "moe_intermediate_size": 128,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0, "norm_topk_prob": True, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "max_position_embeddings": 131072, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 2048, "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


@pytest.fixture(scope="module")
def bundled():
    """dsa-tiny on the GPU by dtype, loaded once."""
    loaded: dict[str, Transformer] = {}

    def load(dtype):
        if dtype not in loaded:
            loaded[dtype] = load_model("dsa-tiny", dtype, "cuda")
        return loaded[dtype]

    return load


@pytest.fixture(scope="module")
def wide():
    config: ModelConfig = read_config(WIDE, "test")
    torch.manual_seed(0)
    with torch.device("cuda"):
        tiny = Transformer(config)
    for name, parameter in tiny.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter) if name.endswith("weight") else torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    tiny = tiny.to(torch.bfloat16).eval().requires_grad_(False)
    tiny.rope, tiny.index_rope = (table and table.to("cuda") for table in Transformer.tables(config))  # in float32
    return tiny


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
def test_a_fast_engine_gives_the_same_greedy_tokens_and_captures_steps_of_several_numbers_of_rows(bundled, name):
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
    assert {rows for rows, _ in engine._decoders[name]._steps} >= {1, 2, 4, 8}
    assert engine.stats.graphs >= 4 and engine.numerics.endswith("-fast")
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


@pytest.mark.parametrize(
    "attention",
    [Attention(), Attention(topk=2048), Attention(topk=2048, cache_dtype="fp8")],
    ids=["dense", "sparse", "sparse-fp8-cache"],
)
def test_128k_tokens_pass_within_the_memory_that_was_planned(wide, attention):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    engine = paged(wide, {"it": attention}, shape=Shape(16, 2048, 256, 8192), cache_bytes=1 << 30)
    common = random_ids(120_000, 512)
    requests = [
        Request(id=str(i), variant="it", token_ids=(*common, *random_ids(1000, 512)), max_tokens=20) for i in range(3)
    ]
    results = answers(engine, requests)
    assert all(len(result.token_ids) == 20 for result in results.values())
    assert [results[str(i)].usage.cached_tokens for i in range(3)] == [0, 118784, 118784]
    planned = working_bytes(wide.config, 2, 16, 2048, 131072)
    assert engine.peak_gpu_bytes - weights - engine.stats.pool_bytes <= planned


@pytest.mark.parametrize("attention", [Attention(), Attention(topk=2048)], ids=["dense", "sparse"])
def test_fast_chunks_pass_within_the_memory_that_was_planned(wide, attention):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    engine = paged(wide, {"it": attention}, cache_bytes=1 << 30, fast=True)
    common = random_ids(120_000, 512)
    requests = [
        Request(id=str(i), variant="it", token_ids=(*common, *random_ids(1000, 512)), max_tokens=20) for i in range(3)
    ]
    results = answers(engine, requests)
    assert [results[str(i)].usage.cached_tokens for i in range(3)] == [0, 119_808, 119_808]
    assert engine.shape.chunk > 2048
    planned = working_bytes(wide.config, 2, engine.num_rows, engine.shape.chunk, 131072)
    assert engine.peak_gpu_bytes - weights - engine.stats.pool_bytes <= planned


def test_free_memory_is_taken_and_leaves_room_for_the_steps(wide):
    torch.cuda.empty_cache()
    engine = paged(wide, {"it": Attention(topk=2048)}, cache_bytes=None)
    assert engine.max_context == 131072
    results = answers(
        engine,
        [Request(id=str(i), variant="it", token_ids=random_ids(3000, 512), max_tokens=8) for i in range(80)],
    )
    assert len(results) == 80 and engine.stats.preemptions == 0

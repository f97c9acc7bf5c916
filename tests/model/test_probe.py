"""Every number of a ProbeResult against matrices of tokens x tokens, from hidden states captured on the side."""

import dataclasses

import pytest
import torch

from model.checkpoint import load_model
from model.engine import LocalEngine
from model.probe import sampled_positions
from model.request import Attention, Probes, Request, Sampling
from model.selection import random_scores, recency_mask, recency_ranks
from tests.model.helpers import dsa_folder, llama_folder, ours, reference
from tests.model.matrices import grouped_layer, latent_layer, open_folder

PROMPT, ANSWER = 300, 6  # the prompt crosses the border of two chunks
KS = (16, 48)
NEEDLES = ((40, 44), (250, 262))  # the second lies across the border of two chunks
NUMBERS = ("visible", "mass", "oracle_mass", "topk_recall", "output_error", "needle_coverage")
CLOSE = 2e-4  # float32 against float64 with attention logits up to about 100


class NoText:
    """An encoding for prompts of ids."""

    eos_ids: tuple[int, ...] = ()
    think_end_id = None

    def decode(self, ids):
        return ""


MODELS = {
    "deepseek": (lambda: dsa_folder("deepseek", index_topk=2000), latent_layer),
    "glm-shared-indexers": (
        lambda: dsa_folder("glm", index_topk=2000, num_hidden_layers=4, index_topk_pattern="FSFS"),
        latent_layer,
    ),
    "llama": (llama_folder, grouped_layer),
}


@pytest.fixture(params=MODELS)
def setting(request):
    """(folder, our model, one layer's matrices, selectors that the model serves)."""
    make, layer = MODELS[request.param]
    folder = make()
    model = ours(folder)
    selectors = ("oracle", "recency", "random") + (("indexer",) if model.config.indexer else ())
    return folder, model, layer, selectors


def answer(model, attention, probes, prompt, *, seed=1, max_tokens=ANSWER):
    engine = LocalEngine.of(model, NoText(), {"it": attention})
    request = Request(
        id="a", variant="it", token_ids=prompt, max_tokens=max_tokens, probes=probes, seed=seed,
        sampling=Sampling(temperature=1.0),
    )  # fmt: skip
    (result,) = engine.run([request])
    assert result.error is None
    return result


def random_prompt(length=PROMPT):
    return tuple(torch.randint(0, 320, (length,)).tolist())


def transformers_hidden_states(folder, ids):
    """What each attention layer of transformers' model takes in, [n, hidden] a layer; its top-k covers the text."""
    states, handles = [], []
    for layer in reference(folder).model.layers:
        handles.append(
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: states.append(kwargs["hidden_states"][0]), with_kwargs=True
            )
        )
    try:
        with torch.inference_mode():
            reference(folder)(torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    return states


def hidden_states_of_the_run(model, total, work):
    """What our attention layers took in while `work` ran, the last pass over each position; and work's result."""
    states = [torch.zeros(total, model.config.hidden_size) for _ in model.layers]

    def keep(module, args):
        x, _, _, segments = args
        for segment in segments:
            states[module.layer][segment.start : segment.stop] = x[segment.rows]

    handles = [layer.self_attn.register_forward_pre_hook(keep) for layer in model.layers]
    try:
        result = work()
    finally:
        for handle in handles:
            handle.remove()
    return states, result


def best(scores, k):
    """The k best of a list by (score, then smaller index)."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def is_clear(scores, k, margin):
    """The k-th and the next score differ by more than two ways of rounding may."""
    ordered = sorted(scores, reverse=True)
    return len(ordered) <= k or ordered[k - 1] - ordered[k] > margin(ordered[k - 1])


def expected_rows(layers, queries, selectors, needles, seed=0):
    """{(phase, position, layer, selector, k): numbers, or None where the choice is a near tie}, one query at a time."""
    needle = [p for start, end in needles for p in range(start, end)]
    rows = {}
    index = None
    for number, layer in enumerate(layers):
        index = layer.index if layer.index is not None else index
        probabilities = layer.probabilities
        for phase, position in queries:
            n = position + 1
            p = probabilities[:, position, :n]
            mass = p.mean(0).tolist()
            dense = torch.einsum("ht,thv->hv", p, layer.values[:n])
            for selector in selectors:
                given = {
                    "oracle": lambda mass=mass: mass,
                    "random": lambda n=n, i=number: random_scores(seed, i, torch.tensor([n - 1]), n)[0].tolist(),
                    "indexer": lambda n=n, index=index: index[n - 1, :n].tolist(),
                }
                for k in KS:
                    heaviest = best(mass, k)
                    clear = is_clear(mass, k, lambda value: 1e-3 * value)
                    if selector == "recency":
                        chosen = set(range(n)) if n <= k else {0, 1, 2, 3, *range(n - (k - 4), n)}
                    else:
                        chosen = best(given[selector](), k)
                    if selector == "indexer":
                        clear = clear and is_clear(given[selector](), k, lambda value: 1e-5)
                    ids = sorted(chosen)
                    weights = layer.logits[:, position, ids].softmax(-1)
                    sparse = torch.einsum("ht,thv->hv", weights, layer.values[ids])
                    sees = needle and position >= max(needle)
                    numbers = {
                        "visible": n,
                        "mass": sum(mass[i] for i in chosen),
                        "oracle_mass": sum(mass[i] for i in heaviest),
                        "topk_recall": len(chosen & heaviest) / len(heaviest),
                        "output_error": float((dense - sparse).norm() / dense.norm()),
                        "needle_coverage": len(chosen & set(needle)) / len(needle) if sees else None,
                    }
                    rows[phase, position, number, selector, k] = numbers if clear else None
    return rows


def compare(columns, expected):
    """Every row is there once and has the expected numbers; near ties are few."""
    keys = list(zip(*(columns[name] for name in ("phase", "position", "layer", "selector", "k")), strict=True))
    assert len(keys) == len(set(keys))
    assert set(keys) == set(expected)
    clear = [(row, expected[key]) for row, key in enumerate(keys) if expected[key] is not None]
    assert len(clear) > 0.9 * len(keys)
    for row, numbers in clear:
        for name in NUMBERS:
            assert columns[name][row] == pytest.approx(numbers[name], abs=CLOSE), (name, keys[row])


def queries_of(result, prompt, positions):
    total = len(prompt) + len(result.token_ids)
    return [*(("prompt", p) for p in positions), *(("answer", p) for p in range(len(prompt) - 1, total - 1))]


def test_every_number_on_the_dense_trajectory_equals_the_matrices(setting):
    folder, model, matrices, selectors = setting
    prompt = random_prompt()
    probes = Probes(queries=60, ks=KS, selectors=selectors, seed=5, needles=NEEDLES)
    result = answer(model, Attention(seed=9), probes, prompt)
    raw, weights = open_folder(folder)
    states = transformers_hidden_states(folder, (*prompt, *result.token_ids)[:-1])
    layers = [matrices(raw, weights, i, x) for i, x in enumerate(states)]
    queries = queries_of(result, prompt, sampled_positions(probes, PROMPT))
    assert len(queries) == 60 + ANSWER
    compare(result.probes.columns, expected_rows(layers, queries, selectors, NEEDLES, seed=9))
    assert result.probes.trajectory == "dense"
    assert result.probes.active_share is None


def test_every_number_on_the_sparse_trajectory_equals_the_matrices(setting):
    folder, model, matrices, selectors = setting
    prompt = random_prompt()
    probes = Probes(queries=40, ks=KS, selectors=selectors, seed=6, needles=NEEDLES)
    attention = Attention(topk=32, selector=selectors[-1] if model.config.indexer else "oracle")
    states, result = hidden_states_of_the_run(
        model, PROMPT + ANSWER - 1, lambda: answer(model, attention, probes, prompt)
    )
    raw, weights = open_folder(folder)
    layers = [matrices(raw, weights, i, x) for i, x in enumerate(states)]
    queries = queries_of(result, prompt, sampled_positions(probes, PROMPT))
    compare(result.probes.columns, expected_rows(layers, queries, selectors, NEEDLES))
    assert result.probes.trajectory == "sparse"


def test_the_tile_of_rows_changes_no_number(setting, monkeypatch):
    _, model, _, selectors = setting
    prompt = random_prompt()
    probes = Probes(queries=20, ks=KS, selectors=selectors, needles=NEEDLES)
    whole = answer(model, Attention(), probes, prompt).probes.columns
    monkeypatch.setattr("kernels.attention_mass.TILE_BYTES", 1)
    rows = answer(model, Attention(), probes, prompt).probes.columns
    key = ("phase", "position", "layer", "selector", "k")
    by_key = [{row[:5]: row[5:] for row in zip(*(c[n] for n in (*key, *NUMBERS)), strict=True)} for c in (whole, rows)]
    assert by_key[0].keys() == by_key[1].keys()
    different = [k for k, numbers in by_key[0].items() if by_key[1][k] != pytest.approx(numbers, abs=1e-5)]
    assert len(different) <= 0.01 * len(by_key[0])  # a near tie may fall either way


def test_sets_that_are_read_in_one_go_give_the_same_numbers(setting, monkeypatch):
    """As on a GPU, where a short text's sets fit together."""
    _, model, _, selectors = setting
    prompt = random_prompt()
    probes = Probes(queries=20, ks=KS, selectors=selectors, needles=NEEDLES)
    single = answer(model, Attention(), probes, prompt).probes.columns
    for number in (3, 1000):
        monkeypatch.setattr("model.probe.together", lambda logits, number=number: number)
        several = answer(model, Attention(), probes, prompt).probes.columns
        for name, values in single.items():
            assert several[name] == (values if isinstance(values[0], str) else pytest.approx(values, abs=1e-5)), name


@pytest.mark.parametrize("k", [1, 3, 4, 5, 70])
def test_the_order_of_the_latest_keys_holds_the_choices_of_all_smaller_k(k):
    positions = torch.tensor([0, 2, 3, 4, 30, 69])
    ranks = recency_ranks(70, positions, 72)
    assert torch.equal(ranks < k, recency_mask(k, positions, 72))
    assert torch.equal(recency_ranks(k, positions, 72) < k, recency_mask(k, positions, 72))


def test_queries_that_see_no_more_than_k_lose_nothing(setting):
    _, model, _, selectors = setting
    probes = Probes(queries=100, ks=(64,), selectors=selectors)
    columns = answer(model, Attention(), probes, random_prompt(100), max_tokens=1).probes.columns
    trivial = [i for i, n in enumerate(columns["visible"]) if n <= 64]
    assert len(trivial) == 64 * len(model.layers) * len(selectors)
    assert {columns["output_error"][i] for i in trivial} == {0.0}
    assert {columns["topk_recall"][i] for i in trivial} == {1.0}
    assert min(columns["mass"][i] for i in trivial) == pytest.approx(1.0, abs=1e-6)


def test_nothing_beats_the_oracles_mass_and_the_oracle_has_full_recall(setting):
    _, model, _, selectors = setting
    probes = Probes(queries=50, ks=KS, selectors=selectors)
    columns = answer(model, Attention(), probes, random_prompt()).probes.columns
    rows = list(zip(*(columns[n] for n in ("selector", "mass", "oracle_mass", "topk_recall")), strict=True))
    assert all(mass <= best + 1e-6 for _, mass, best, _ in rows)
    assert {recall for selector, _, _, recall in rows if selector == "oracle"} == {1.0}
    assert all(mass == best for selector, mass, best, _ in rows if selector == "oracle")
    others = [recall for selector, _, _, recall in rows if selector == "random"]
    assert sum(others) / len(others) < 0.7


@pytest.mark.parametrize("topk", [None, 32])
def test_probing_leaves_the_answers_bits_alone(setting, topk, monkeypatch):
    _, model, _, selectors = setting
    seen = []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda *args: seen.append(original(*args)) or seen[-1])
    prompt, attention = random_prompt(), Attention(topk=topk, selector="oracle")
    plain = answer(model, attention, None, prompt)
    logits = [step.clone() for step in seen]
    seen.clear()
    probed = answer(model, attention, Probes(queries=50, ks=KS, selectors=selectors), prompt)
    assert plain.token_ids == probed.token_ids
    assert plain.probes is None
    for expected, actual in zip(logits, seen, strict=False):
        assert torch.equal(actual, expected)


def test_a_selector_whose_keys_have_no_mass_in_float32_still_has_an_output_error():
    """One sharp head puts all of its mass elsewhere; the selected keys renormalise all the same."""
    folder = dsa_folder("deepseek", num_attention_heads=1, num_key_value_heads=1)
    model = load_model(str(folder), "float32")
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_b_proj.weight *= 40
    probes = Probes(queries=300, ks=(16,), selectors=("recency", "random"))
    columns = answer(model, Attention(), probes, random_prompt()).probes.columns
    assert min(columns["mass"]) == 0.0
    assert all(error < 100 for error in columns["output_error"])  # false for NaN


def test_scored_continuations_are_probed_as_answers(setting):
    _, model, _, selectors = setting
    prompt, continuation = random_prompt(250), random_prompt(20)
    probes = Probes(queries=10, ks=(16,), selectors=selectors)
    engine = LocalEngine.of(model, NoText(), {"it": Attention()})
    request = Request(id="a", variant="it", token_ids=prompt, max_tokens=1, continuation=continuation, probes=probes)
    (result,) = engine.run([request])
    columns = result.probes.columns
    phases = {(phase, p) for phase, p in zip(columns["phase"], columns["position"], strict=True)}
    assert phases == {
        *(("prompt", p) for p in sampled_positions(probes, 250)),
        *(("answer", p) for p in range(249, 269)),
    }
    (plain,) = engine.run([dataclasses.replace(request, probes=None)])
    assert result.logprobs == plain.logprobs


@pytest.mark.parametrize("topk", [5, 32, 60, 500])
def test_the_active_share_counts_queries_that_see_more_than_topk(topk):
    model = ours(dsa_folder("deepseek"))
    probes = Probes(queries=4, ks=(8,), selectors=("recency",))
    result = answer(model, Attention(topk=topk), probes, random_prompt(50), max_tokens=11)
    positions = range(50 + 11 - 1)  # the last token is never a query
    assert result.probes.active_share == sum(p + 1 > topk for p in positions) / len(positions)


def test_sampled_positions_follow_the_seed_and_the_length_only():
    probes = Probes(queries=20, ks=(8,), selectors=("recency",), seed=1)
    positions = sampled_positions(probes, 500)
    assert positions == sorted(set(positions)) and len(positions) == 20 and 0 <= positions[0] <= positions[-1] < 500
    assert sampled_positions(dataclasses.replace(probes, ks=(1,), selectors=()), 500) == positions
    assert sampled_positions(dataclasses.replace(probes, seed=2), 500) != positions
    assert sampled_positions(probes, 7) == list(range(7))


def test_random_scores_are_two_rounds_of_a_32_bit_mix():
    def mixed(x):
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
        return (x ^ (x >> 16)) >> 8

    found = random_scores(7, 3, torch.tensor([0, 41, 131071]), 50)
    for row, position in zip(found.tolist(), (0, 41, 131071), strict=True):
        seeds = (c * 0x9E3779B1 + position * 0x85EBCA77 + 3 * 0xC2B2AE3D + 7 * 0x27D4EB2F for c in range(50))
        assert row == [mixed(seed % 2**32) for seed in seeds]


def test_random_choices_are_fair():
    """Each of 400 keys is as likely as any other, over queries, layers and seeds."""
    counts = torch.zeros(400)
    for seed in range(5):
        for layer in range(4):
            scores = random_scores(seed, layer, torch.arange(400, 500), 400)
            counts.scatter_add_(0, scores.topk(40).indices.flatten(), torch.ones(4000))
    expected = 5 * 4 * 100 * 40 / 400
    chi_square = float(((counts - expected) ** 2 / (expected * 0.9)).sum())
    assert 300 < chi_square < 510  # 399 degrees of freedom, about +- 4 standard deviations

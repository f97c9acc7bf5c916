"""The engine: a request's answer is its own, whoever shares the batch; where answers end; what goes wrong alone."""

import dataclasses

import pytest
import torch

import model.sequence
from model.checkpoint import load_model
from model.engine import LocalEngine
from model.request import Attention, Probes, Request, Sampling
from model.sampling import Sampler
from tests.model.helpers import dsa_folder, llama_folder, ours, reference


@dataclasses.dataclass
class Words:
    """An encoding in which token 17 reads "<17>"."""

    eos_ids: tuple[int, ...] = ()
    think_end_id: int | None = None

    def decode(self, ids):
        return "".join(f"<{token}>" for token in ids)


VARIANTS = {
    "dense": Attention(),
    "indexer": Attention(topk=32),
    "fp8": Attention(topk=32, index_dtype="fp8", cache_dtype="fp8"),
    "oracle": Attention(topk=32, selector="oracle"),
    "recency": Attention(topk=32, selector="recency"),
    "random": Attention(topk=32, selector="random", seed=4),
}
FOLDERS = {
    "deepseek-moe": lambda: dsa_folder("deepseek"),
    "glm-shared-moe": lambda: dsa_folder("glm", index_topk_pattern="FSF"),
    "llama": llama_folder,
}


def engine_of(model, encoding=None):
    kept = {
        name: a for name, a in VARIANTS.items() if model.config.indexer or a.topk is None or a.selector != "indexer"
    }
    return LocalEngine.of(model, encoding or Words(), kept)


@pytest.fixture
def engine():
    return engine_of(ours(dsa_folder("deepseek")))


def random_ids(length):
    return tuple(torch.randint(0, 320, (length,)).tolist())


def ask(name, length_or_ids, **changes):
    ids = random_ids(length_or_ids) if isinstance(length_or_ids, int) else length_or_ids
    return Request(**{"id": name, "variant": "dense", "token_ids": ids, "max_tokens": 6, **changes})


def answers(engine, requests):
    """Results by id without what a clock decides."""
    results = {r.id: dataclasses.replace(r, seconds=0.0) for r in engine.run(requests)}
    assert set(results) == {r.id for r in requests}
    return results


@pytest.fixture
def logits_of(monkeypatch):
    """{seed of the request: logits of each of its steps}, filled while an engine runs."""
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FOLDERS)
def test_answers_logits_and_probes_have_the_same_bits_alone_in_a_batch_and_in_another_order(name, dtype, logits_of):
    tiny = load_model(str(FOLDERS[name]()), dtype)
    served = engine_of(tiny).attentions
    selectors = ("oracle", "recency", *(["indexer"] if tiny.config.indexer else []))
    requests = []
    for i, variant in enumerate([*served, *served]):
        requests.append(
            ask(
                str(i), (270, 41, 90)[i % 3], variant=variant, seed=i, max_tokens=3 + i % 5,
                sampling=Sampling(temperature=float(i % 2)),
                probes=Probes(queries=5, ks=(16,), selectors=selectors) if i % 3 == 0 else None,
            )
        )  # fmt: skip
    together = answers(engine_of(tiny), requests)
    bits = {seed: torch.stack(steps) for seed, steps in logits_of.items()}
    assert all(result.error is None for result in together.values())
    assert answers(engine_of(tiny), requests[::-1]) == together
    for request in requests:
        assert torch.equal(torch.stack(logits_of[request.seed]), bits[request.seed])
        assert answers(engine_of(tiny), [request])[request.id] == together[request.id]
        assert torch.equal(torch.stack(logits_of[request.seed]), bits[request.seed])


def test_requests_are_pulled_as_rows_come_free_and_results_come_as_they_finish(engine):
    pulled = []

    def source():
        for i in range(20):
            pulled.append(i)
            yield ask(str(i), 5, max_tokens=1 if i == 3 else 4)

    run = engine.run(source())
    assert next(run).id == "3"
    assert len(pulled) == 8
    assert len(list(run)) == 19


def test_a_consumer_between_results_is_not_in_inference_mode(engine):
    for _ in engine.run([ask("a", 5), ask("b", 5, continuation=(1,))]):
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shared_prefix_is_reported_and_changes_no_bit(engine, variant, logits_of):
    common = random_ids(530)
    first = ask("first", (*common, *random_ids(70)), variant=variant, seed=1)
    second = ask("second", (*common, *random_ids(40)), variant=variant, seed=2)
    alone = answers(engine_of(engine.model), [second])["second"]
    bits = torch.stack(logits_of[2])
    shared = answers(engine, [first, second])["second"]
    assert (alone.usage.cached_tokens, shared.usage.cached_tokens) == (0, 512)
    assert shared.token_ids == alone.token_ids
    assert torch.equal(torch.stack(logits_of[2]), bits)


@pytest.mark.parametrize("length, cached", [(256, 0), (257, 256), (512, 256), (513, 512), (200, 0)])
def test_the_same_prompt_again_runs_at_least_its_last_token(engine, length, cached):
    ids = random_ids(length)
    results = answers(engine, [ask("a", ids), ask("b", ids)])
    assert [results[name].usage.cached_tokens for name in "ab"] == [0, cached]
    assert results["a"].token_ids == results["b"].token_ids


def test_prefixes_are_kept_apart_by_variant(engine):
    ids = random_ids(600)
    alone = answers(engine_of(engine.model), [ask("b", ids, variant="recency")])["b"]
    after_another = answers(engine, [ask("a", ids), ask("b", ids, variant="recency")])["b"]
    assert after_another == alone
    assert after_another.usage.cached_tokens == 0


def test_probed_positions_are_never_skipped(engine):
    ids = random_ids(600)
    probes = Probes(queries=2, ks=(16,), selectors=("oracle", "indexer"), seed=1)
    request = ask("b", ids, variant="indexer", probes=probes)
    alone = answers(engine_of(engine.model), [request])["b"]
    first = min(alone.probes.columns["position"])
    assert 256 <= first < 512, "the seed gives a first position in the second chunk"
    after = answers(engine, [ask("a", ids, variant="indexer"), request])["b"]
    assert after.usage.cached_tokens == 256
    assert after.probes == alone.probes


def test_an_answer_does_not_leak_into_the_prefix(engine):
    """The next prompt goes on with other tokens where the last request wrote its answer."""
    ids = random_ids(510)
    again = ask("b", (*ids, *random_ids(30)))
    alone = answers(engine_of(engine.model), [again])["b"]
    probes = Probes(queries=1, ks=(16,), selectors=("recency",))
    shared = answers(engine, [ask("a", ids, max_tokens=20, probes=probes), again])["b"]
    assert shared.usage.cached_tokens == 256
    assert shared.token_ids == alone.token_ids


@pytest.fixture
def free():
    """(a request, its answer of 40 tokens without any stop rule)."""
    tiny = ours(dsa_folder("deepseek"))
    request = ask("a", 30, max_tokens=40, sampling=Sampling(temperature=2.0), seed=11)
    (result,) = LocalEngine.of(tiny, Words(), VARIANTS).run([request])
    return request, result.token_ids


def answer(request, **encoding):
    (result,) = LocalEngine.of(ours(dsa_folder("deepseek")), Words(**encoding), VARIANTS).run([request])
    return result


@pytest.mark.parametrize("max_tokens", [1, 2, 39])
def test_an_answer_has_exactly_max_tokens(free, max_tokens):
    request, ids = free
    result = answer(dataclasses.replace(request, max_tokens=max_tokens))
    assert (result.token_ids, result.finish_reason) == (ids[:max_tokens], "length")
    assert result.usage.completion_tokens == max_tokens
    assert result.text == Words().decode(ids[:max_tokens])


def test_every_end_of_sequence_id_ends_the_answer_and_is_no_text(free):
    request, ids = free
    for position in (0, 9, 39):
        first = ids.index(ids[position])
        result = answer(request, eos_ids=(999, ids[position]))
        assert (result.token_ids, result.finish_reason) == (ids[: first + 1], "stop")
        assert result.text == Words().decode(ids[:first])


@pytest.mark.parametrize("start, length", [(0, 1), (5, 3), (37, 3)])
def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(free, start, length):
    request, ids = free
    stop = Words().decode(ids[start : start + length])[1:-1]  # begins and ends inside a token
    text = Words().decode(ids)
    end = next(n for n in range(41) if stop in Words().decode(ids[:n]))
    result = answer(dataclasses.replace(request, stop=("never", stop)))
    assert (result.token_ids, result.finish_reason) == (ids[:end], "stop")
    assert result.text == text[: text.index(stop)]


def test_the_first_of_several_stop_strings_cuts(free):
    request, ids = free
    text = Words().decode(ids)
    result = answer(dataclasses.replace(request, stop=(f"{ids[6]}>", f"<{ids[5]}><{ids[6]}>")))
    assert result.text == text[: text.index(f"<{ids[5]}><{ids[6]}>")]


def test_stop_strings_are_not_found_inside_an_open_thought(free):
    request, ids = free
    end = next(i for i in range(10, 40) if ids.index(ids[i]) == i)
    stop = f"<{ids[3]}>"
    thinking = dataclasses.replace(request, stop=(stop,), thinking=True)
    again = next((i for i in range(end + 1, 40) if ids[i] == ids[3]), 39)
    result = answer(thinking, think_end_id=ids[end])
    assert result.token_ids == ids[: again + 1]
    assert result.text.startswith(Words().decode(ids[: end + 1]))
    assert len(answer(dataclasses.replace(thinking, thinking=False), think_end_id=ids[end]).token_ids) <= 4
    assert len(answer(thinking, think_end_id=None).token_ids) <= 4, "a model without thoughts has none open"


def test_stop_strings_are_found_behind_the_thought_and_do_not_begin_in_it(free):
    request, ids = free
    end = next(i for i in range(10, 30) if ids.index(ids[i]) == i)
    across = Words().decode(ids[end : end + 2])
    behind = Words().decode(ids[end + 2 : end + 4])
    thinking = dataclasses.replace(request, thinking=True, stop=(across, behind))
    result = answer(thinking, think_end_id=ids[end])
    assert (result.token_ids, result.finish_reason) == (ids[: end + 4], "stop")
    assert result.text == Words().decode(ids[: end + 2])


def test_an_open_thought_at_the_limit_keeps_its_text(free):
    request, ids = free
    result = answer(dataclasses.replace(request, thinking=True, stop=(f"<{ids[3]}>",)), think_end_id=999)
    assert (result.text, result.finish_reason) == (Words().decode(ids), "length")


@pytest.mark.parametrize(
    "make", [lambda: dsa_folder("deepseek", index_topk=1024), lambda: dsa_folder("glm", index_topk=1024), llama_folder]
)
@pytest.mark.parametrize("prompt, continuation", [(250, 20), (600, 20), (256, 1), (1, 5)])
def test_log_likelihoods_equal_transformers(make, prompt, continuation):
    folder = make()
    ids = random_ids(prompt + continuation)
    with torch.inference_mode():
        logits = reference(folder)(torch.tensor([ids])).logits[0, prompt - 1 : -1]
    expected = logits.log_softmax(-1)[torch.arange(continuation), list(ids[prompt:])]
    best = tuple(logits.argmax(-1).tolist())
    engine = engine_of(ours(folder))
    scored, greedy = (
        answers(engine, [ask("a", ids[:prompt], continuation=target)])["a"] for target in (ids[prompt:], best[:1])
    )
    assert scored.finish_reason == "scored" and scored.token_ids == () and scored.text == ""
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected, rtol=0, atol=1e-4)
    assert scored.is_greedy == (ids[prompt:] == best)
    assert greedy.is_greedy is True


@pytest.mark.parametrize("variant", ["dense", "indexer", "recency"])
def test_a_greedy_answer_scores_as_greedy_and_one_other_token_does_not(engine, variant):
    prompt = random_ids(250)
    generated = answers(engine, [ask("a", prompt, variant=variant, max_tokens=12)])["a"].token_ids
    other = (*generated[:7], (generated[7] + 1) % 320, *generated[8:])
    scored = answers(
        engine,
        [ask(name, prompt, variant=variant, continuation=ids) for name, ids in (("it", generated), ("not", other))],
    )
    assert (scored["it"].is_greedy, scored["not"].is_greedy) == (True, False)
    assert len(scored["it"].logprobs) == 12
    assert scored["it"].logprobs[:7] == scored["not"].logprobs[:7]


def test_choices_of_one_prompt_share_it_and_score_as_they_do_alone(engine):
    prompt = random_ids(520)
    choices = [ask(str(i), prompt, variant="indexer", continuation=random_ids(1 + 30 * i)) for i in range(4)]
    shared = answers(engine, choices)
    assert [shared[c.id].usage.cached_tokens for c in choices] == [0, 512, 512, 512]
    for choice in choices:
        alone = answers(engine_of(engine.model), [choice])[choice.id]
        assert shared[choice.id].logprobs == alone.logprobs


def test_bad_requests_are_errors_of_their_own_and_the_others_go_on(engine):
    probes = Probes(queries=0, ks=(4,), selectors=("recency",))
    good = [ask(f"good{i}", 20 + i) for i in range(10)]
    bad = {
        "expected a variant of": ask("b0", 5, variant="danse"),
        "the prompt has no tokens": ask("b1", ()),
        "need 4097 tokens, the model takes 4096": ask("b2", 4000, max_tokens=97),
        "need 4097 tokens, the model": ask("b3", 4090, continuation=(1,) * 7),
        "the continuation to score has no tokens": ask("b4", 5, continuation=()),
        "max_tokens: expected at least 1, got 0": ask("b5", 5, max_tokens=0),
        "token ids below 320, got 3 to 320": ask("b6", (3, 320)),
        "token ids below 320, got -1 to 3": ask("b7", (3,), continuation=(-1,)),
    }
    mixed = [request for pair in zip(good, bad.values(), strict=False) for request in pair] + good[len(bad) :]
    results = answers(engine, mixed)
    for text, request in bad.items():
        result = results[request.id]
        assert (result.finish_reason, result.token_ids, result.text) == ("error", (), "")
        assert text in result.error and result.error.startswith("ModelError: ") and "\n" not in result.error
    undisturbed = answers(engine_of(engine.model), good)
    assert {r.id: results[r.id] for r in good} == undisturbed
    assert answers(engine, [ask("c", 4000, max_tokens=2, probes=probes)])["c"].error is None, "96 short of the limit"


def test_an_indexer_that_is_not_there_is_an_error_of_the_request():
    engine = LocalEngine.of(ours(llama_folder()), Words(), {"dense": Attention(), "sparse": Attention(topk=8)})
    probes = Probes(queries=2, ks=(4,), selectors=("indexer",))
    results = answers(engine, [ask("a", 20, variant="sparse"), ask("b", 20, probes=probes), ask("c", 20)])
    assert ["no trained indexer" in (results[name].error or "") for name in "abc"] == [True, True, False]


def fail_when(monkeypatch, tiny, is_bad, error):
    """The model raises after all of its work, when the caches have grown, if a segment is bad."""
    original = tiny.forward

    def forward(ids, segments, rows):
        logits = original(ids, segments, rows)
        if any(is_bad(segment) for segment in segments):
            raise error
        return logits

    monkeypatch.setattr(tiny, "forward", forward)


REQUESTS = [ask(str(length), tuple(range(length)), max_tokens=9, variant="indexer") for length in range(60, 65)]


@pytest.mark.parametrize("error", [RuntimeError("made up\nsecond line"), MemoryError()])
def test_an_exception_in_one_prefill_does_not_hurt_the_others(engine, monkeypatch, error):
    expected = answers(engine, REQUESTS)
    fail_when(monkeypatch, engine.model, lambda s: not s.decode and s.length == 62, error)
    results = answers(engine, REQUESTS)
    assert results.pop("62").error in ("RuntimeError: made up", "MemoryError: no message")
    assert results == {name: result for name, result in expected.items() if name != "62"}


@pytest.mark.parametrize("decoded", [1, 4])
def test_an_exception_in_a_decode_step_fails_only_the_request_that_causes_it(engine, monkeypatch, decoded):
    requests = [dataclasses.replace(r, token_ids=tuple(range(10 * i + 5))) for i, r in enumerate(REQUESTS)]
    expected = answers(engine, requests)
    bad = 25 + decoded - 1  # only the third request ever decodes here: the lengths lie ten apart
    fail_when(monkeypatch, engine.model, lambda s: s.decode and s.start == bad, RuntimeError("made up"))
    results = answers(engine, requests)
    assert results.pop("62").error == "RuntimeError: made up"
    assert results == {name: result for name, result in expected.items() if name != "62"}


def test_logits_that_are_no_numbers_are_an_error_and_not_a_token():
    tiny = load_model(str(dsa_folder("deepseek")), "float32")
    requests = [ask("good", tuple(range(10, 40))), ask("bad", (7, 1, 2)), ask("scored", (1, 2, 7), continuation=(4,))]
    healthy = answers(engine_of(tiny), requests)["good"]
    assert 7 not in healthy.token_ids
    tiny.embed_tokens.weight[7] = float("nan")
    for temperature in (0.0, 1.0):
        sampled = [dataclasses.replace(r, sampling=Sampling(temperature=temperature)) for r in requests[1:]]
        results = answers(engine_of(tiny), [requests[0], *sampled])
        assert results["good"] == healthy
        assert all("largest logit is nan" in results[name].error for name in ("bad", "scored"))

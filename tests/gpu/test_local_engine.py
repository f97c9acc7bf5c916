"""LocalEngine on a GPU against itself on the CPU: the bundled model's answers, likelihoods, selections and recall.

On a GPU `dsa-eval run` serves by the paged engine (test_engine.py). This one has no pages and no graphs: what differs
from the CPU here is a kernel's or the model's doing.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from kernels import switch
from model.cache import Cache
from model.chat.encoding import load_encoding
from model.checkpoint import load_model, resolve
from model.engine import LocalEngine
from model.request import SELECTORS, Attention, Probes, Request, Sampling
from model.segment import Segment
from model.selection import select, select_ids
from tests.model.helpers import llama_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FOLDER = resolve("dsa-tiny")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "One of the special magic numbers for {key} is: {value}. "
TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{text}\nWhat is the special magic number for {key} mentioned in the provided text?"
)
WORDS = ("quokka", "velvet", "brisk", "amber", "cedar", "delta", "ember", "fjord", "grove", "hazel")
NUM_PROMPTS, LONG = 20, 3  # of 20 prompts three are longer than a GPU's chunk of 2,048
VARIANTS = {
    "dense": Attention(),
    "sparse": Attention(topk=128),
    "fp8": Attention(topk=128, index_dtype="fp8", cache_dtype="fp8"),
    "recency": Attention(topk=128, selector="recency"),
    "oracle": Attention(topk=128, selector="oracle"),
    "random": Attention(topk=128, selector="random", seed=3),
}
# Random keys leave attention and logits nearly flat: bfloat16's rounding then chooses the next token (3 of 10 answers
# were equal), so that this variant is compared in float32 only.
CASES = [("float32", name) for name in VARIANTS] + [("bfloat16", name) for name in VARIANTS if name != "random"]
# Largest difference of a token's mean log-likelihood on nine of ten prompts. Devices sum in another order: a bfloat16
# value then differs by a step (2^-8), and an e4m3 value behind it by a step of its own (2^-4).


@pytest.fixture(scope="module")
def prompts():
    """Needles in haystacks of 650 to 2,840 tokens, as token ids."""
    encoding = load_encoding(FOLDER)
    found = []
    for n in range(NUM_PROMPTS):
        key, value = f"{WORDS[n % 10]}-{WORDS[(3 * n + 1) % 10]}", str(1_234_567 + 345_678 * n)
        before, after = (60, 55) if n < LONG else (8 + n % 7, 20 - n % 5)
        text = FILLER * before + NEEDLE.format(key=key, value=value) + FILLER * after
        rendered = encoding.render([{"role": "user", "content": TASK.format(text=text, key=key)}])
        found.append((tuple(encoding.encode(rendered)), tuple(encoding.encode(f" {value}. {FILLER}"))))
    assert max(len(ids) for ids, _ in found) > 2048 > min(len(ids) for ids, _ in found)
    return found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engines(request):
    """The same weights on the CPU and on the GPU."""
    encoding = load_encoding(FOLDER)
    return {
        device: LocalEngine.of(load_model("dsa-tiny", request.param, device), encoding, VARIANTS)
        for device in ("cpu", "cuda")
    }


def asked(prompts, variant, **changes):
    return [
        Request(**{"id": str(n), "variant": variant, "token_ids": ids, "max_tokens": 32, **changes})
        for n, (ids, _) in enumerate(prompts)
    ]


def scored(prompts, variant):
    return [
        dataclasses.replace(request, continuation=continuation)
        for request, (_, continuation) in zip(asked(prompts, variant), prompts, strict=True)
    ]


def answers(engine, requests):
    results = {result.id: result for result in engine.run(requests)}
    assert [result.error for result in results.values()] == [None] * len(requests)
    return [results[request.id] for request in requests]


def equal_share(first, second):
    return sum(a.token_ids == b.token_ids for a, b in zip(first, second, strict=True)) / len(first)


@pytest.mark.parametrize(("engines", "variant"), CASES, indirect=["engines"])
def test_greedy_answers_are_the_cpus_on_nine_of_ten_prompts(engines, prompts, variant):
    requests = asked(prompts, variant)
    on_cpu, on_gpu = (answers(engines[device], requests) for device in ("cpu", "cuda"))
    assert len({result.token_ids for result in on_cpu}) > NUM_PROMPTS // 2  # not one answer to all
    assert equal_share(on_cpu, on_gpu) >= 0.9


@pytest.mark.parametrize(("engines", "variant"), CASES, indirect=["engines"])
def test_log_likelihoods_a_token_are_the_cpus(engines, prompts, variant):
    requests = scored(prompts, variant)
    on_cpu, on_gpu = (answers(engines[device], requests) for device in ("cpu", "cuda"))
    means = [[sum(result.logprobs) / len(result.logprobs) for result in results] for results in (on_cpu, on_gpu)]
    differences = sorted(abs(a - b) for a, b in zip(*means, strict=True))
    bound = 0.05
    assert differences[int(0.9 * NUM_PROMPTS) - 1] <= bound, differences
    assert sum(differences) / NUM_PROMPTS <= bound, differences


def test_an_answer_is_its_own_in_any_company(engines, prompts):
    requests = [
        dataclasses.replace(request, id=f"{variant}/{request.id}")
        for variant in ("dense", "sparse")
        for request in asked(prompts[LONG : LONG + 6], variant)
    ]
    together = answers(engines["cuda"], requests)
    alone = [answers(engines["cuda"], [request])[0] for request in reversed(requests)][::-1]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]


def test_sampling_draws_the_same_tokens_from_the_same_seed(engines, prompts):
    requests = asked(prompts[LONG:], "dense", seed=11, sampling=Sampling(temperature=1.0, top_p=0.9))
    first, second = (answers(engines["cuda"], requests) for _ in range(2))
    assert equal_share(first, second) == 1.0


def test_the_torch_forms_on_the_gpu_answer_as_the_kernels_do(engines, prompts, monkeypatch):
    for variant in ("dense", "sparse"):
        requests = asked(prompts, variant)
        by_kernels = answers(engines["cuda"], requests)
        with monkeypatch.context() as patched:
            patched.setattr(switch, "FORCE_TORCH", True)
            by_torch = answers(engines["cuda"], requests)
        assert equal_share(by_kernels, by_torch) >= 0.9


def test_the_indexer_selects_the_cpus_keys(prompts):
    attention = Attention(topk=128, index_dtype="float32")
    chosen = {}
    for device in ("cpu", "cuda"):
        model = load_model("dsa-tiny", "float32", device)
        ids = torch.tensor(prompts[-1][0][:600], device=device)
        cache = Cache(model.config, 600, dtype=torch.float32, index_dtype="float32", device=device)
        segment = Segment(cache=cache, attention=attention, start=0, length=600, rows=slice(0, 600))
        with torch.inference_mode():
            model(ids, [segment], None)
        chosen[device] = segment.selection.cpu()
    mask = torch.zeros(600, 601, dtype=torch.bool)  # the last column takes the -1
    ids = chosen["cuda"].long()
    mask = mask.scatter_(1, torch.where(ids < 0, 600, ids), True)[:, :600]
    assert bool((mask.sum(1) == chosen["cpu"].sum(1)).all())
    overlap = (mask & chosen["cpu"]).sum(1) / chosen["cpu"].sum(1)
    assert float(overlap.mean()) >= 0.99 and float(overlap.min()) >= 0.9


@pytest.mark.parametrize("selector", ["random", "recency"])
def test_selections_without_scores_are_the_same_on_both_devices(selector):
    attention = Attention(topk=100, selector=selector, seed=5)
    positions = torch.arange(4000, 4700)
    on_cpu = select(attention, 2, positions, 4700, lambda name: pytest.fail(name))
    ids = select_ids(attention, 2, positions.cuda(), 4700, lambda name: pytest.fail(name))
    assert torch.equal(ids.cpu().long(), on_cpu.nonzero()[:, 1].view(700, 100))


@pytest.mark.parametrize("engines", ["float32"], indirect=True)  # bfloat16 moves keys across the border of a choice
def test_recall_is_the_cpus(engines, prompts):
    probes = Probes(queries=6, ks=(64, 128), selectors=SELECTORS, needles=((200, 220),))
    requests = asked(prompts[LONG : LONG + 4], "dense", probes=probes, max_tokens=1)
    on_cpu, on_gpu = (answers(engines[device], requests) for device in ("cpu", "cuda"))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        here, there = by_query(a), by_query(b)
        assert here.keys() == there.keys()
        for row, values in here.items():
            assert values["visible"] == there[row]["visible"]
        for name in ("mass", "oracle_mass", "topk_recall", "output_error"):
            differences = [abs(values[name] - there[row][name]) for row, values in here.items()]
            assert sum(differences) / len(differences) <= 0.02, name


def by_query(result):
    """Recall's rows by what they measure: their order depends on the chunks, which are a GPU's own."""
    columns = result.probes.columns
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    found = {tuple(row[name] for name in ("phase", "position", "layer", "selector", "k")): row for row in rows}
    assert len(found) == len(rows) > 0
    return found


def test_a_grouped_query_model_scores_as_on_the_cpu():
    ids = torch.randint(0, 320, (700,)).tolist()
    attentions = {"dense": Attention(), "sparse": Attention(topk=64, selector="recency")}
    found = []
    for device in ("cpu", "cuda"):
        engine = LocalEngine.of(load_model(str(llama_folder()), "float32", device), load_encoding(FOLDER), attentions)
        requests = [
            Request(id=name, variant=name, token_ids=tuple(ids[:400]), max_tokens=300, continuation=tuple(ids[400:]))
            for name in attentions
        ]
        found.append([torch.tensor(result.logprobs) for result in answers(engine, requests)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-3)


def test_the_gpu_and_its_memory_are_told(engines):
    assert engines["cuda"].device_name == torch.cuda.get_device_name() and engines["cuda"].peak_gpu_bytes > 1 << 20
    assert engines["cpu"].device_name == "" and engines["cpu"].peak_gpu_bytes == 0

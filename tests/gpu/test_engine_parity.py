"""What users run on a GPU, the paged engine, against the CPU engine: answers, likelihoods, selections and recall.

Same bits in any company, graphs and planned memory are test_engine.py's. Most of the time here is the CPU's: its
answers are kept, and a prompt is answered and scored in turn, so that it runs once.
"""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

import model.attention
import model.serving.attention
from kernels import switch
from model.chat.encoding import load_encoding
from model.checkpoint import load_model, resolve
from model.engine import LocalEngine
from model.request import SELECTORS, Attention, Probes, Request
from model.selection import select
from model.serving.choose import choose_for_chunk, choose_for_rows
from model.serving.engine import PagedEngine
from model.serving.step import Chunk, Rows
from tests.gpu.same_experts import Experts
from tests.model.helpers import llama_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FOLDER = resolve("dsa-tiny")
CACHE = 1 << 30
TOKENS = 28  # of an answer that names the number
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "One of the special magic numbers for {key} is: {value}. "
TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{text}\nWhat is the special magic number for {key} mentioned in the provided text?"
)
WORDS = ("quokka", "velvet", "brisk", "amber", "cedar", "delta", "ember", "fjord", "grove", "hazel")
NUM_PROMPTS = 20  # the first is longer than a GPU's chunk of 2,048
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
ROUNDED = [name for name in VARIANTS if name != "random"]
CASES = [("float32", name) for name in VARIANTS] + [("bfloat16", name) for name in ROUNDED]
# Bounds of mean and ninth decile over prompts, in nats a token. In bfloat16 two equal forms on one CPU (masked and
# gathered keys, latest 128, 100 prompts) are apart by 0.08 in the decile where each chooses its own experts: rounding
# moves 0.7 % of the choices, and one of them a log-likelihood by up to 1.8. Under the same experts it is 0.016.
NATS = {"float32": 0.01, "bfloat16": 0.03}


@pytest.fixture(scope="module")
def prompts():
    """Needles in haystacks of 310 to 2,140 tokens and continuations that name the number, as token ids."""
    encoding = load_encoding(FOLDER)
    found = []
    for n in range(NUM_PROMPTS):
        # no key comes twice: what sees the question alone answers by the key
        key, value = f"{WORDS[n % 10]}-{WORDS[(3 * n + 1 + n // 10) % 10]}", str(1_234_567 + 345_678 * n)
        before, after = (50, 36) if n == 0 else (5 + n % 7, 9 - n % 5)
        text = FILLER * before + NEEDLE.format(key=key, value=value) + FILLER * after
        rendered = encoding.render([{"role": "user", "content": TASK.format(text=text, key=key)}])
        found.append((tuple(encoding.encode(rendered)), tuple(encoding.encode(f" {value}. {FILLER}"))))
    assert len({ids[-40:] for ids, _ in found}) == NUM_PROMPTS
    assert len(found[0][0]) > 2048 > max(len(ids) for ids, _ in found[1:])
    return found


@pytest.fixture(scope="module")
def engines():
    """The same weights on the CPU and on the GPU, by device and dtype, loaded once."""
    opened = {}

    def engine(device, dtype):
        if (device, dtype) not in opened:
            served = load_model("dsa-tiny", dtype, device)
            options = {} if device == "cpu" else {"cache_bytes": CACHE}
            kind = LocalEngine if device == "cpu" else PagedEngine
            opened[device, dtype] = kind.of(served, load_encoding(FOLDER), VARIANTS, **options)
        return opened[device, dtype]

    return engine


@pytest.fixture(scope="module")
def asked(engines, prompts):
    """(greedy answers, scored continuations) of all prompts, by device, dtype and variant, asked once."""
    known = {}

    def ask(device, dtype, variant):
        if (device, dtype, variant) not in known:
            known[device, dtype, variant] = answers_and_scores(engines(device, dtype), prompts, variant)
        return known[device, dtype, variant]

    return ask


def answers_and_scores(engine, prompts, variant):
    """Each prompt's two requests follow one another: the second takes the prompt from the cache."""
    requests = []
    for n, (ids, continuation) in enumerate(prompts):
        requests.append(Request(id=f"{n}", variant=variant, token_ids=ids, max_tokens=TOKENS))
        requests.append(Request(id=f"{n}/", variant=variant, token_ids=ids, max_tokens=1, continuation=continuation))
    results = answers(engine, requests)
    return results[::2], results[1::2]


def answers(engine, requests):
    results = {result.id: result for result in engine.run(requests)}
    assert [result.error for result in results.values()] == [None] * len(requests)
    return [results[request.id] for request in requests]


def equal_share(first, second):
    return sum(a.token_ids == b.token_ids for a, b in zip(first, second, strict=True)) / len(first)


def mean_and_decile(values):
    """Mean and ninth decile."""
    return sum(values) / len(values), sorted(values)[int(0.9 * len(values)) - 1]


def differences(first, second):
    """Of mean log-likelihoods a token, for each prompt."""
    means = [[sum(result.logprobs) / len(result.logprobs) for result in results] for results in (first, second)]
    return [abs(a - b) for a, b in zip(*means, strict=True)]


def token_errors(scored, exact):
    pairs = zip(scored, exact, strict=True)
    return [abs(a - b) for mine, theirs in pairs for a, b in zip(mine.logprobs, theirs.logprobs, strict=True)]


@pytest.mark.parametrize(("dtype", "variant"), CASES)
def test_greedy_answers_are_the_cpus_on_nine_of_ten_prompts(asked, dtype, variant):
    on_cpu, on_gpu = (asked(device, dtype, variant)[0] for device in ("cpu", "cuda"))
    assert len({result.token_ids for result in on_cpu}) > NUM_PROMPTS // 2  # not one answer to all
    assert equal_share(on_cpu, on_gpu) >= 0.9


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_likelihoods_a_token_are_the_cpus(asked, variant):
    on_cpu, on_gpu = (asked(device, "float32", variant)[1] for device in ("cpu", "cuda"))
    mean, decile = mean_and_decile(differences(on_cpu, on_gpu))
    assert mean <= NATS["float32"] and decile <= NATS["float32"]


@pytest.mark.parametrize("variant", ROUNDED)
def test_log_likelihoods_a_token_in_bfloat16_are_the_cpus_under_float32s_experts(engines, prompts, variant):
    notes = [Experts(len(ids) + len(continuation) - 1) for ids, continuation in prompts]  # the last is never read
    exact = scores_noting(notes, engines("cpu", "float32"), prompts, variant)
    on_cpu, moved_on_cpu = scores_under(notes, engines("cpu", "bfloat16"), prompts, variant)
    served = engines("cuda", "bfloat16")
    eager = PagedEngine.of(  # a captured step would not ask the notes
        served.model, served.encoding, VARIANTS, cache_bytes=CACHE, graphs=False, prompt_graphs=False
    )
    on_gpu, moved_on_gpu = scores_under(notes, eager, prompts, variant)
    for reference in (exact, on_cpu):
        mean, decile = mean_and_decile(differences(reference, on_gpu))
        assert mean <= NATS["bfloat16"] and decile <= NATS["bfloat16"]
    assert 0 < moved_on_gpu <= 1.5 * moved_on_cpu, "what bfloat16's rounding alone moves"


def scores_noting(notes, served, prompts, variant):
    """Scored continuations; each prompt's choices of experts are noted."""
    found = []
    for experts, request in zip(notes, scoring(prompts, variant), strict=True):
        with experts.noted(served.model):  # by an engine that holds no prefix, so that it chooses for every token
            found += answers(LocalEngine.of(served.model, served.encoding, VARIANTS), [request])
    return found


def scores_under(notes, engine, prompts, variant):
    """Scored continuations under the experts that were noted, and the share of choices that would have been others."""
    found, moved = [], []
    for experts, request in zip(notes, scoring(prompts, variant), strict=True):
        with experts.given(engine.model) as others:
            found += answers(engine, [request])
        moved += others
    return found, torch.cat(moved).float().mean().item()


def scoring(prompts, variant):
    return [
        Request(id=str(n), variant=variant, token_ids=ids, max_tokens=1, continuation=continuation)
        for n, (ids, continuation) in enumerate(prompts)
    ]


@pytest.mark.parametrize("variant", ROUNDED)
def test_bfloat16_errs_no_more_than_on_the_cpu(asked, engines, prompts, variant):
    """Errors of tokens against float32 on the CPU, which has two equal forms: masked and gathered keys."""
    exact = asked("cpu", "float32", variant)[1]
    forms = [asked("cpu", "bfloat16", variant)[1]]
    if VARIANTS[variant].topk is not None:
        forms.append(gathered_scores(engines("cpu", "bfloat16"), prompts, variant))
    on_cpu = [mean_and_decile(token_errors(form, exact)) for form in forms]
    on_gpu = mean_and_decile(token_errors(asked("cuda", "bfloat16", variant)[1], exact))
    for name, *cpu, gpu in zip(("mean", "ninth decile"), *on_cpu, on_gpu, strict=True):
        assert min(cpu) > 0.01, "there is an error to compare with"
        assert gpu <= 1.25 * max(cpu) + 0.005, name


def gathered_scores(served, prompts, variant):
    engine = LocalEngine.of(served.model, served.encoding, VARIANTS)
    with patch.object(model.attention.MLA, "_gathers", lambda *_: True):
        return answers(engine, scoring(prompts, variant))


@pytest.mark.parametrize("variant", ["dense", "sparse", "fp8"])
def test_the_torch_forms_on_the_gpu_answer_as_the_kernels_do(asked, engines, prompts, variant, monkeypatch):
    by_kernels = asked("cuda", "float32", variant)[0]
    monkeypatch.setattr(switch, "FORCE_TORCH", True)
    served = engines("cuda", "float32")
    forced = PagedEngine.of(served.model, served.encoding, {variant: VARIANTS[variant]}, cache_bytes=CACHE)
    assert equal_share(by_kernels, answers_and_scores(forced, prompts, variant)[0]) >= 0.9


def test_the_indexer_selects_the_cpus_keys(engines, prompts, monkeypatch):
    """Every layer's choice for every query of a prompt, seen where attention asks for it."""
    request = Request(id="a", variant="sparse", token_ids=prompts[0][0], max_tokens=1)
    seen = {"cpu": [], "cuda": []}
    for device, module, name in (
        ("cpu", model.attention, "select"), ("cuda", model.serving.attention, "choose_for_chunk"),
    ):  # fmt: skip
        original = getattr(module, name)

        def record(*given, kept=seen[device], original=original, **how):
            kept.append(original(*given, **how))
            return kept[-1]

        monkeypatch.setattr(module, name, record)
        served = engines(device, "float32")
        options = {} if device == "cpu" else {"cache_bytes": CACHE}
        answers(type(served).of(served.model, served.encoding, VARIANTS, **options), [request])
    length, layers = len(request.token_ids), engines("cpu", "float32").model.config.num_layers
    on_cpu, on_gpu = (
        [torch.cat([as_mask(chunk, length) for chunk in chunks[i::layers]])[:length] for i in range(layers)]
        for chunks in seen.values()
    )
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        assert mine.shape == theirs.shape == (length, length)
        assert bool((mine.sum(1) == theirs.sum(1)).all())
        overlap = (mine & theirs).sum(1) / theirs.sum(1)
        assert float(overlap.mean()) >= 0.99 and float(overlap.min()) >= 0.9


def as_mask(chosen, length):
    """A mask [s, t] bool or ids [s, k] int32 -> a mask [s, length], on the CPU."""
    chosen = chosen.cpu()
    if chosen.dtype == torch.bool:
        return torch.nn.functional.pad(chosen, (0, max(0, length - chosen.shape[1])))[:, :length]
    mask = torch.zeros(len(chosen), length + 1, dtype=torch.bool)  # the last column takes the -1 and the padding
    return mask.scatter_(1, torch.where(chosen < 0, length, chosen).long().clamp_max(length), True)[:, :length]


@pytest.mark.parametrize("selector", ["random", "recency"])
def test_selections_without_scores_are_the_same_on_both_devices(selector):
    attention, layer = Attention(topk=100, selector=selector, seed=5), SimpleNamespace(layer=2)
    start, num, pages = 4000, 704, 74
    on_cpu = select(attention, 2, torch.arange(start, start + num), start + num, lambda name: pytest.fail(name))
    positions = torch.arange(start, start + num, device="cuda")
    slots = torch.zeros(num, dtype=torch.int64, device="cuda")
    chunk = Chunk(
        attention=attention, start=start, num_tokens=num, length=num, positions=positions, slots=slots,
        real=slots == 0, pages=slots[:pages], index_dtype=None,
    )  # fmt: skip
    rows = Rows(
        attention=attention, index_dtype=None, ids=slots, positions=positions, slots=slots,
        lengths=positions.int() + 1, tables=torch.zeros(num, pages, dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    masked = choose_for_chunk(layer, None, None, chunk, masked=True)
    assert masked.is_cuda and torch.equal(masked.cpu(), on_cpu)
    for ids in (choose_for_chunk(layer, None, None, chunk, masked=False), choose_for_rows(layer, None, rows, None)):
        assert torch.equal(ids.cpu().long(), on_cpu.nonzero()[:, 1].view(num, 100))


def test_recall_is_the_cpus(engines, prompts):
    """In float32: bfloat16 moves keys across the border of a choice."""
    probes = Probes(queries=6, ks=(64, 128), selectors=SELECTORS, needles=((200, 220),))
    requests = [
        Request(id=str(n), variant="dense", token_ids=prompts[n][0], max_tokens=1, probes=probes) for n in range(3)
    ]
    on_cpu, on_gpu = (answers(engines(device, "float32"), requests) for device in ("cpu", "cuda"))
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
    folder, encoding = str(llama_folder()), load_encoding(FOLDER)
    attentions = {"dense": Attention(), "sparse": Attention(topk=64, selector="recency")}
    requests = [
        Request(id=name, variant=name, token_ids=tuple(ids[:400]), max_tokens=300, continuation=tuple(ids[400:]))
        for name in attentions
    ]
    engines = (
        LocalEngine.of(load_model(folder, "float32"), encoding, attentions),
        PagedEngine.of(load_model(folder, "float32", "cuda"), encoding, attentions, cache_bytes=CACHE),
    )
    for a, b in zip(*(answers(engine, requests) for engine in engines), strict=True):
        torch.testing.assert_close(torch.tensor(b.logprobs), torch.tensor(a.logprobs), atol=1e-2, rtol=1e-3)


def test_the_gpu_and_its_memory_are_told(engines):
    engine = engines("cuda", "float32")
    assert engine.device_name == torch.cuda.get_device_name()
    assert CACHE / 2 < engine.stats.pool_bytes < engine.peak_gpu_bytes <= torch.cuda.max_memory_allocated()

"""A process that takes its share of a GPU and no more, and steps that do not fit at first: the same bits in the end."""

import dataclasses

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
import model.serving.forward
import model.serving.shortage
from model.errors import ModelError
from model.request import Attention, Probes, Request, Sampling
from model.serving.decoder import WARM_UPS
from model.serving.engine import PagedEngine
from model.serving.memory import CONTEXT_BYTES, MARGIN_BYTES, free_bytes
from model.serving.shortage import WAITS

DEVICE = torch.device("cuda", 0)
SHARE = 0.19
VARIANTS = {
    "dense": Attention(),
    "indexer": Attention(topk=128),
    "fp8": Attention(topk=128, index_dtype="fp8", cache_dtype="fp8"),
    "oracle": Attention(topk=128, selector="oracle"),
    "recency": Attention(topk=128, selector="recency"),
}
PROBES = Probes(
    queries=16, ks=(64, 128, 256), selectors=("indexer", "oracle", "recency", "random"), needles=((40, 60),)
)


@pytest.fixture
def whole_gpu():
    """Nothing of earlier tests, and no limit of this one's behind it."""
    free_bytes(DEVICE)
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def opened(**options):
    return PagedEngine("dsa-tiny", VARIANTS, dtype="bfloat16", **options)


def random_ids(length):
    return tuple(torch.randint(3, 4096, (length,)).tolist())


def mixed(lengths, **changes):
    """For each variant drawn answers with recall, and log-likelihoods of a long continuation."""
    requests = []
    for variant in VARIANTS:
        for length in lengths:
            drawn = Request(
                id=f"{variant}/{length}", variant=variant, token_ids=random_ids(length), max_tokens=40, probes=PROBES,
                sampling=Sampling(temperature=1.0), seed=length,
            )  # fmt: skip
            scored = dataclasses.replace(drawn, id=f"{drawn.id}/scored", continuation=random_ids(900), probes=None)
            requests += [drawn, scored]
    return [dataclasses.replace(request, **changes) for request in requests]


def answers(engine, requests):
    results = {r.id: dataclasses.replace(r, seconds=0.0, probes=None) for r in engine.run(requests)}
    assert {key: r.error for key, r in results.items() if r.error} == {}
    assert set(results) == {r.id for r in requests}
    return results


def test_a_share_is_planned_with_and_never_passed(whole_gpu):
    total = torch.cuda.mem_get_info(DEVICE)[1]
    engine = opened(share=SHARE)
    assert torch.cuda.memory_reserved(DEVICE) <= SHARE * total - CONTEXT_BYTES - MARGIN_BYTES
    longest = engine.max_context - 1000
    answers(engine, mixed((300, 1500, min(longest, 7000))))
    assert torch.cuda.max_memory_reserved(DEVICE) <= SHARE * total - CONTEXT_BYTES
    assert engine.stats.shortages == 0, "the plan left room for every step"
    # with all that torch does not count: CUDA itself, kernels, and whoever else is on this GPU
    free, total = torch.cuda.mem_get_info(DEVICE)
    assert total - free - torch.cuda.memory_reserved(DEVICE) <= CONTEXT_BYTES, "this GPU is shared, or CUDA takes more"


def test_a_share_that_does_not_hold_the_model_is_one_line(whole_gpu):
    with pytest.raises(ModelError, match=r"^--gpus: expected a share that holds a model"):
        opened(share=0.001)
    with pytest.raises(ModelError, match=r"use fewer replicas, each with a larger --gpus"):
        opened(share=(CONTEXT_BYTES + (64 << 20)) / torch.cuda.mem_get_info(DEVICE)[1])


@pytest.mark.parametrize(
    "place, call",
    [("attend_chunk", 0), ("attend_chunk", 5), ("attend_rows", 0), ("attend_rows", WARM_UPS)],
    ids=["a chunk", "a later chunk", "before a capture", "within a capture"],
)
def test_a_step_that_did_not_fit_once_gives_the_same_tokens(whole_gpu, place, call, monkeypatch):
    requests = mixed((300, 2600))
    engine = opened(cache_bytes=2 << 30, prompt_graphs=False)
    expected = answers(engine, requests)
    original, calls = getattr(model.serving.forward, place), []

    def short(layer, *args):
        if layer.layer == 1:
            calls.append(layer)
            if len(calls) == call + 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Made up.")
        return original(layer, *args)

    monkeypatch.setattr(model.serving.forward, place, short)
    del engine
    engine = opened(cache_bytes=2 << 30, prompt_graphs=False)
    assert answers(engine, requests) == expected
    assert engine.stats.shortages == 1 and len(calls) > call


def test_a_step_waits_until_others_give_memory_back_and_says_what_fits_where_nobody_does(whole_gpu, monkeypatch):
    """Memory is really short here: the process may take 8 MiB beside what it holds, and recall needs more."""
    total = torch.cuda.mem_get_info(DEVICE)[1]
    requests = [r for r in mixed((3000,)) if r.variant == "dense"]
    expected = answers(opened(cache_bytes=1 << 30, prompt_graphs=False), requests)
    free_bytes(DEVICE)
    engine, waited = opened(cache_bytes=1 << 30, prompt_graphs=False), []

    def squeeze():
        free_bytes(DEVICE)
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + (8 << 20)) / total, DEVICE)

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)

    monkeypatch.setattr(model.serving.shortage.time, "sleep", sleep)
    squeeze()
    assert answers(engine, requests) == expected
    assert waited == list(WAITS[:3])
    monkeypatch.setattr(model.serving.shortage.time, "sleep", lambda seconds: None)
    squeeze()
    (result,) = engine.run([dataclasses.replace(requests[0], id="late", token_ids=random_ids(3000))])
    assert "request late: out of memory at a context of 3000 tokens" in result.error
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    again = answers(engine, requests)
    assert {key: r.token_ids for key, r in again.items()} == {key: r.token_ids for key, r in expected.items()}

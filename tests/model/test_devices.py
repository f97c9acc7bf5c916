"""What a GPU does otherwise, shown without one: keys as ids, and every tensor of a step on the model's device."""

import pytest
import torch

import model.attention
import model.probe
import model.selection
from kernels import switch
from kernels.index_scores import index_scores_reference
from kernels.topk import mask_to_ids
from model import engine as engines
from model.cache import CUDA_PREFILL_CHUNK, PREFILL_CHUNK, Cache
from model.engine import LocalEngine
from model.errors import DeviceLostError, ModelError
from model.probe import Probe
from model.request import Attention, Probes, Request
from model.segment import Segment
from model.selection import select, select_ids
from tests.model.helpers import dsa_folder, llama_folder, ours


class Words:
    eos_ids = ()
    think_end_id = None

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


@pytest.mark.parametrize("selector", ["indexer", "oracle", "recency", "random"])
@pytest.mark.parametrize("topk, first, num", [(5, 0, 40), (3, 0, 9), (1, 0, 4), (64, 0, 40), (7, 300, 300), (4, 17, 1)])
def test_ids_name_the_keys_of_the_mask(selector, topk, first, num):
    attention = Attention(topk=topk, selector=selector, seed=2)
    positions = torch.arange(first, first + num)
    scores = torch.randint(0, 9, (num, first + num)).float()  # many ties
    asked = [choose(attention, 1, positions, first + num, lambda name: scores) for choose in (select, select_ids)]
    assert asked[1].dtype == torch.int32
    assert torch.equal(asked[1], mask_to_ids(asked[0], topk))


@pytest.mark.parametrize("folder", [dsa_folder, lambda: dsa_folder("glm", index_topk_pattern="FSF"), llama_folder])
def test_answers_by_ids_are_those_under_masks(folder, monkeypatch):
    served = ours(folder())
    kept = {n: a for n, a in VARIANTS.items() if served.config.indexer or a.topk is None or a.selector != "indexer"}
    ids = tuple(torch.randint(0, 320, (400,)).tolist())
    requests = [Request(id=name, variant=name, token_ids=ids[:300], max_tokens=5) for name in kept]
    requests += [
        Request(id=f"{name}/scored", variant=name, token_ids=ids[:200], max_tokens=9, continuation=ids[200:])
        for name in kept
    ]
    found = []
    for by_ids in (False, True):
        monkeypatch.setattr(model.attention, "selects_by_ids", lambda q, by_ids=by_ids: by_ids)
        found.append({result.id: result for result in LocalEngine.of(served, Words(), kept).run(requests)})
    for name in kept:
        masked, gathered = found[0][name], found[1][name]
        assert masked.error is gathered.error is None
        assert masked.token_ids == gathered.token_ids
        likelihoods = [torch.tensor(results[f"{name}/scored"].logprobs) for results in found]
        close = (likelihoods[0] - likelihoods[1]).abs() < 1e-3
        # where last bits differ a value may be rounded to the next FP8 number, and what follows differs visibly
        assert float(close.float().mean()) > (0.5 if name == "fp8" else 0.999), name


# Tensors of the device "meta" hold nothing, and do not mix with a CPU's any more than a GPU's do.


def meta_topk(scores, k, visible):
    chosen = (scores[:, :1] > visible[:, None]) & torch.ones(1, k, dtype=torch.bool, device=scores.device)
    return chosen.to(torch.int32)


def meta_sparse_mla(q, kv, ids, layout, scale, **how):
    assert {x.device.type for x in (q, kv, ids)} == {"meta"} and how["check_ids"] is False
    return q.new_empty(*q.shape[:2], layout.latent_dim // layout.groups)


def meta_expert_mlp(x, gate_up, down, experts, weights, scales):
    assert scales is None
    assert {y.device.type for y in (x, gate_up, down, experts, weights)} == {"meta"}
    return torch.empty(x.shape, device=x.device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_a_step_is_made_on_the_models_device(variant, monkeypatch):
    monkeypatch.setattr(model.attention, "selects_by_ids", lambda q: True)
    monkeypatch.setattr(model.attention, "index_scores", index_scores_reference)
    monkeypatch.setattr(model.attention, "sparse_mla", meta_sparse_mla)
    monkeypatch.setattr(model.selection, "topk", meta_topk)
    monkeypatch.setattr("model.layers.expert_mlp", meta_expert_mlp)
    with torch.device("meta"):
        served = model.transformer.Transformer(ours(dsa_folder()).config)
    engine = LocalEngine.of(served, Words(), VARIANTS)
    assert engine.device == "meta"
    sequence = engine._start(Request(id="a", variant=variant, token_ids=tuple(range(300)), max_tokens=4))
    with torch.inference_mode():
        for start, stop in ((0, 256), (256, 300)):
            rows = torch.tensor([stop - start - 1], device="meta")
            logits = engine._step(sequence, sequence.request.token_ids[start:stop], start, rows)
            assert logits.device.type == "meta"
        sequence.generated.append(7)
        assert engine._decode_step([sequence]).device.type == "meta"


def test_probed_rows_are_known_without_asking_the_device():
    config = ours(dsa_folder()).config
    cache = Cache(config, 40, dtype=torch.float32, index_dtype=None, device="meta")
    segment = Segment(cache=cache, attention=Attention(), start=0, length=40, rows=slice(0, 40))
    probe = Probe(Probes(queries=3, ks=(4,), selectors=("recency",)), Attention(), 40)
    for phase in ("prompt", "answer"):
        probe.phase = phase
        assert segment.positions.device.type == "meta"
        assert probe.wanted(segment) == (probe.prompt_positions if phase == "prompt" else list(range(40)))


def test_chunks_of_a_gpu_are_whole_numbers_of_the_cpus():
    assert CUDA_PREFILL_CHUNK % PREFILL_CHUNK == 0


def test_the_arithmetic_is_named_by_device_and_by_the_forced_torch_forms(monkeypatch):
    assert (engines.numerics("cpu"), engines.numerics("cuda")) == ("cpu-2", "cuda-2")
    monkeypatch.setattr(switch, "FORCE_TORCH", True)
    assert (engines.numerics("cpu"), engines.numerics("cuda")) == ("cpu-2", "cuda-2-torch")


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"^--device cuda: torch \S+ sees no GPU here; use --device cpu$"):
        LocalEngine("dsa-tiny", {"dense": Attention()}, device="cuda")


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_lost_device_ends_the_engine_and_not_one_request(tokens, monkeypatch):
    class Lost(RuntimeError):
        pass

    served = ours(dsa_folder())
    engine = LocalEngine.of(served, Words(), VARIANTS)
    monkeypatch.setattr(engines, "DEVICE_FAILURES", (Lost,))
    calls = []

    def forward(*arguments):
        calls.append(arguments)
        if len(calls) >= tokens:
            raise Lost("an illegal memory access\nsecond line")
        return original(*arguments)

    original = served.forward
    monkeypatch.setattr(served, "forward", forward)
    requests = [Request(id=str(n), variant="dense", token_ids=(1, 2, 3), max_tokens=5) for n in range(2)]
    with pytest.raises(DeviceLostError, match=r"^an illegal memory access$"):
        list(engine.run(requests))

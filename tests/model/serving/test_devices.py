"""What a GPU does otherwise, shown without one: keys as ids, every tensor of a step on the model's device, its loss."""

import gc
from types import SimpleNamespace

import pytest
import torch

import model.attention
import model.serving.attention
import model.serving.choose
import model.serving.forms
from kernels import switch
from kernels.index_scores import index_scores_reference
from kernels.topk import mask_to_ids
from model import admission
from model.engine import NUMERICS, LocalEngine
from model.errors import DeviceLostError, ModelError
from model.probe import Probe
from model.request import Attention, Probes, Request
from model.selection import select
from model.serving.choose import choose_for_chunk
from model.serving.decoder import _no_collection
from model.serving.engine import PagedEngine
from model.serving.forms import dense_backend
from model.serving.forward import run_chunk, run_rows
from model.serving.pool import PagePool
from model.serving.shape import numerics
from model.serving.step import Chunk, Rows
from model.transformer import Transformer
from tests.model.helpers import dsa_folder, llama_folder, ours
from tests.model.test_engine import Words

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
def test_ids_name_the_keys_of_the_mask(selector, topk, first, num, monkeypatch):
    scores = torch.randint(0, 9, (num, first + num)).float()  # many ties
    for name in ("index_scores", "attention_mass"):
        monkeypatch.setattr(model.serving.choose, name, lambda *_: scores)
    attention = Attention(topk=topk, selector=selector, seed=2)
    chunk = SimpleNamespace(
        attention=attention, start=first, length=num, stop=first + num, positions=torch.arange(first, first + num),
        pages=None, scorer=SimpleNamespace(queries=scores, weights=scores, keys=lambda pages, length: (scores, None)),
    )  # fmt: skip
    layer = SimpleNamespace(
        layer=1, absorb=lambda q: q, layout=SimpleNamespace(keys=lambda kv: kv), config=SimpleNamespace(softmax_scale=1)
    )
    mask = select(attention, 1, chunk.positions, chunk.stop, lambda name: scores)
    assert torch.equal(choose_for_chunk(layer, scores, scores, chunk, masked=True), mask)
    ids = choose_for_chunk(layer, scores, scores, chunk, masked=False)
    assert ids.dtype == torch.int32 and torch.equal(ids, mask_to_ids(mask, topk))


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
        monkeypatch.setattr(model.attention.MLA, "_gathers", lambda self, topk, position, by_ids=by_ids: by_ids)
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


def meta_pick(scores, k, visible):
    shown = scores[:, :1] > visible[:, None]
    return (shown & torch.ones(1, k, dtype=torch.bool, device=scores.device)).to(torch.int32)


def meta_scores(q, pages, w, tables, lengths, num_keys):
    assert {x.device.type for x in (q, pages, w, tables, lengths)} == {"meta"}
    return torch.empty(len(q), num_keys, device="meta")


def meta_mass(q, keys, scale, tables, lengths):
    return meta_scores(q, keys, q, tables, lengths, tables.shape[1] * 64)


def meta_dense(q, k, v, scale, start, mask, backend):
    assert {x.device.type for x in (q, k, v)} == {"meta"} and mask is None
    return q.new_empty(*q.shape[:2], v.shape[-1])


def meta_gather(q, kv, ids, layout, scale, **how):
    assert {x.device.type for x in (q, kv, ids)} == {"meta"} and how["check_ids"] is False
    return q.new_empty(*q.shape[:2], layout.latent_dim // layout.groups)


def meta_decode(q, kv, pages, lengths, layout, scale, **how):
    assert lengths.device.type == "meta"
    return meta_gather(q, kv, pages, layout, scale, **how), None


def meta_expert_mlp(x, gate_up, down, experts, weights, scales):
    assert scales is None
    assert {y.device.type for y in (x, gate_up, down, experts, weights)} == {"meta"}
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_a_step_is_made_on_the_models_device(variant, dtype, monkeypatch):
    monkeypatch.setattr(model.serving.forms, "gathers", lambda *_: True)
    monkeypatch.setattr(model.serving.attention, "dense_mla", meta_dense)
    monkeypatch.setattr(model.serving.attention, "sparse_mla", meta_gather)
    monkeypatch.setattr(model.serving.attention, "dense_decode", meta_decode)
    monkeypatch.setattr(model.serving.attention, "page_slots", lambda ids, tables: ids)
    for name, stub in (
        ("index_scores", lambda q, k, w, start, scales: index_scores_reference(q, k, w, start)),
        ("index_scores_paged", meta_scores), ("attention_mass_paged", meta_mass), ("topk", meta_pick),
    ):  # fmt: skip
        monkeypatch.setattr(model.serving.choose, name, stub)
    monkeypatch.setattr("model.layers.expert_mlp", meta_expert_mlp)
    attention, config = VARIANTS[variant], ours(dsa_folder()).config
    with torch.device("meta"):
        served = Transformer(config).to(dtype)
    packed = attention.cache_dtype == "fp8" and dtype == torch.bfloat16
    index = (attention.index_dtype or config.indexer.dtype,)
    device = torch.device("meta")
    pool = PagePool(config, 8, dtype=dtype, packed=packed, index_dtypes=index, device=device)
    asked = index[0] if attention.topk and attention.selector == "indexer" else None
    ids = torch.zeros(256, dtype=torch.int64, device=device)
    chunk = Chunk(
        attention=attention, start=64, num_tokens=200, length=256, positions=torch.arange(64, 320, device=device),
        slots=ids, real=ids > 0, pages=ids[:5], index_dtype=asked,
    )  # fmt: skip
    rows = Rows.unpack(torch.zeros(4, 3 + 6, dtype=torch.int32, device=device), attention, asked)
    with torch.inference_mode():
        assert run_chunk(served, ids, chunk, pool).device.type == "meta"
        assert run_rows(served, rows, pool).device.type == "meta"


def test_probed_rows_are_known_without_asking_the_device():
    probe = Probe(Probes(queries=3, ks=(4,), selectors=("recency",)), Attention(), 40)
    window = SimpleNamespace(start=0, stop=40, length=40)
    for phase in ("prompt", "answer"):
        probe.phase = phase
        assert probe.wanted(window) == (probe.prompt_positions if phase == "prompt" else list(range(40)))


def test_the_arithmetic_is_named_by_engine_and_device_and_by_the_forced_torch_forms(monkeypatch):
    assert (NUMERICS, numerics("cpu"), numerics("cuda")) == ("cpu-3", "cpu-paged-1", "cuda-paged-6")
    monkeypatch.setattr(switch, "FORCE_TORCH", True)
    assert (numerics("cpu"), numerics("cuda")) == ("cpu-paged-1", "cuda-paged-6-torch")


def test_the_forced_torch_forms_read_prompts_through_torch(monkeypatch):
    config, gpu = ours(dsa_folder()).config, torch.device("cuda")
    assert (dense_backend(config, gpu), dense_backend(config, torch.device("cpu"))) == ("triton", "auto")
    monkeypatch.setattr(switch, "FORCE_TORCH", True)
    assert dense_backend(config, gpu) == "auto"


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"^--device cuda: torch \S+ sees no GPU here; use --device cpu$"):
        PagedEngine("dsa-tiny", {"dense": Attention()}, device="cuda")


def test_the_cpu_engine_refuses_a_model_that_lies_elsewhere():
    with torch.device("meta"):
        elsewhere = Transformer(ours(dsa_folder()).config)
    with pytest.raises(ModelError, match=r"^LocalEngine: expected a model on the CPU, got one on meta; PagedEngine "):
        LocalEngine.of(elsewhere, Words(), VARIANTS)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_lost_device_ends_the_engine_and_not_one_request(steps, monkeypatch):
    class Lost(RuntimeError):
        pass

    monkeypatch.setattr(admission, "DEVICE_FAILURES", (Lost,))
    taken = []

    def losing(original):
        def step(*arguments):
            taken.append(original)
            if len(taken) >= steps:
                raise Lost("an illegal memory access\nsecond line")
            return original(*arguments)

        return step

    monkeypatch.setattr("model.serving.prompter.run_chunk", losing(run_chunk))
    monkeypatch.setattr("model.serving.decoder.run_rows", losing(run_rows))
    engine = PagedEngine.of(ours(dsa_folder()), Words(), VARIANTS)
    requests = [Request(id=str(n), variant="dense", token_ids=(1, 2, 3), max_tokens=5) for n in range(2)]
    with pytest.raises(DeviceLostError, match=r"^an illegal memory access$"):
        list(engine.run(requests))
    assert {run_chunk} <= set(taken) <= {run_chunk, run_rows} and (run_rows in taken) == (steps > 2)


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_a_step_is_captured(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError, match="made up"), _no_collection():
            assert not gc.isenabled()
            raise RuntimeError("made up")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()

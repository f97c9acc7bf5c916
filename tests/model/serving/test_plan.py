"""How a GPU's memory is planned, with numbers in its place: free memory, a share of it, and what recall needs."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model.probe
from kernels import attention_mass
from model.engine import LocalEngine
from model.errors import ModelError
from model.request import Attention, Probes, Request
from model.serving import memory
from model.serving.memory import (
    CONTEXT_BYTES,
    LEAST_CONTEXT,
    MARGIN_BYTES,
    free_bytes,
    largest_context,
    plan_pages,
    probe_bytes,
    take_share,
    working_bytes,
)
from model.serving.shortage import load_within
from tests.model.helpers import dsa_folder, llama_folder, ours
from tests.model.test_memory import NoText

GIB = 1 << 30
GPU = torch.device("cuda", 0)
TOTAL = 80 * GIB


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GiB: what others hold, what this process has reserved, and its limit."""
    state = SimpleNamespace(others=0, reserved=0, fraction=1.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (TOTAL - state.others - state.reserved, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state.reserved)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: state.fraction)
    limit = lambda fraction, device: setattr(state, "fraction", fraction)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return state


def test_a_whole_gpu_has_no_limit_but_what_is_free(gpu):
    take_share(1.0, GPU)
    gpu.others, gpu.reserved = 10 * GIB, 5 * GIB
    assert gpu.fraction == 1.0 and free_bytes(GPU) == 65 * GIB


def test_a_share_leaves_the_rest_to_neighbours_even_while_it_is_free(gpu):
    take_share(0.25, GPU)
    assert gpu.fraction * TOTAL == pytest.approx(20 * GIB - CONTEXT_BYTES)
    gpu.reserved = 3 * GIB
    assert free_bytes(GPU) == pytest.approx(20 * GIB - CONTEXT_BYTES - 3 * GIB, abs=1)
    gpu.others = 70 * GIB
    assert free_bytes(GPU) == 7 * GIB, "neighbours may have taken more than theirs"
    gpu.reserved = 20 * GIB
    assert free_bytes(GPU) == 0


@pytest.mark.parametrize("num_replicas, share", [(5, 0.19), (5, 0.2), (3, 1 / 3)])
def test_replicas_that_plan_at_the_same_time_fit_beside_each_other(gpu, num_replicas, share):
    """Each sees the whole GPU free, as when all start together: that was once taken for what is theirs."""
    take_share(share, GPU)
    gpu.reserved = weights = GIB // 4
    working, page = 3 * GIB, 2 << 20
    (pages,) = plan_pages([page], 64, 8192, working, GPU, None)
    taken = CONTEXT_BYTES + weights + pages * page + working + MARGIN_BYTES
    assert num_replicas * taken <= TOTAL and pages > 1000


def test_a_share_too_small_for_the_model_is_one_line_with_what_is_needed(gpu):
    with pytest.raises(
        ModelError, match=r"^--gpus: expected a share that holds a model, got 0\.01 of 80\.00 GiB, .*--gp"
    ):
        take_share(0.01, GPU)
    take_share(0.05, GPU)  # 4 GiB, 3 of them torch's
    page = 2 << 20
    least = 1 + LEAST_CONTEXT // 64
    room = 3 * GIB - MARGIN_BYTES - least * page
    assert plan_pages([page], 64, 8192, room - 64, GPU, None) == [least]
    with pytest.raises(ModelError) as error:
        plan_pages([page], 64, 8192, 2 * GIB, GPU, None)
    assert str(error.value) == (
        "the cache on this GPU: expected 3.03 GiB beside the weights, for the steps (3.00) and a context of 1024 "
        "tokens, got 3.00 GiB free for this process; use fewer replicas, each with a larger --gpus, or a shorter chunk"
    )


def test_weights_that_their_share_does_not_hold_are_one_line(gpu):
    take_share(0.05, GPU)

    def load():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(
        ModelError, match=r"^the weights: .* got 3\.00 GiB .*\(--gpus 0\.05\), and they take more; use f"
    ):
        load_within(0.05, load)
    with pytest.raises(RuntimeError, match="made up"):
        load_within(0.05, lambda: (_ for _ in ()).throw(RuntimeError("made up")))


@pytest.mark.parametrize("folder", [dsa_folder, llama_folder])
def test_the_largest_context_that_fits_is_the_last_one_whose_step_does(folder):
    config = ours(folder()).config
    for context in (64, 1024, config.max_positions):
        room = working_bytes(config, 2, 64, 2048, context)
        assert largest_context(config, 2, 64, 2048, room) == context
        assert largest_context(config, 2, 64, 2048, room - 1) == context - 64


class LiveBytes(TorchDispatchMode):
    """The most bytes of results that were there at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self._gone, key, size)
        self.peak = max(self.peak, self.now)

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("folder, context", [(dsa_folder, 90), (dsa_folder, 700), (llama_folder, 700)])
def test_recall_holds_no_more_than_is_planned_for_it(folder, context, monkeypatch):
    """As on a GPU, where sets of keys are read together; every token of the answer is a query."""
    served = ours(folder())
    config = served.config
    tile = 1 << 20  # so that it counts beside what else a small model holds
    for module in (attention_mass, memory):
        monkeypatch.setattr(module, "TILE_BYTES", tile)
    monkeypatch.setattr(model.probe, "together", lambda logits: max(1, tile // logits.nbytes))
    measure, peaks = model.probe.Probe.measure, []

    def measured(self, layer, q, kv, segment):
        gc.collect()
        with LiveBytes() as live:
            measure(self, layer, q, kv, segment)
        peaks.append((live.peak, segment.stop))

    monkeypatch.setattr(model.probe.Probe, "measure", measured)
    selectors = ("oracle", "recency", "random", *(["indexer"] if config.indexer else []))
    probes = Probes(queries=256, ks=(16, 32, 64, 128, 256), selectors=selectors)
    ids = tuple(torch.randint(3, 320, (context,)).tolist())
    request = Request(id="a", variant="it", token_ids=ids, max_tokens=1, continuation=ids[:200], probes=probes)
    (result,) = LocalEngine.of(served, NoText(), {"it": Attention()}).run([request])
    assert result.error is None and peaks
    rows = memory._key_bytes(config, 4)
    assert max(peak - stop * rows for peak, stop in peaks) <= probe_bytes(config, 256, context + 200)
    assert max(peak for peak, _ in peaks) > tile, "a plan of nothing would not pass"

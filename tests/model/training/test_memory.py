"""The account of a step's memory against what autograd and operators really hold on the CPU, counted to the byte."""

import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model.training.loop
from model.config import read_config
from model.errors import ModelError
from model.training.build import initialise
from model.training.config import LengthPhase
from model.training.forward import TrainingForward, after_attention, before_attention
from model.training.losses import cross_entropy
from model.training.memory import account, check_memory, evaluation_account
from model.transformer import Transformer
from tests.model.training.test_loop import training
from tests.model.training.toy import RAW, toy_config, toy_stage

B, LENGTH, ROWS, TOPK = 4, 256, 16, 32
TOKENS = B * LENGTH
SIZES = {
    **RAW, "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "intermediate_size": 384, "moe_intermediate_size": 96, "index_n_heads": 4, "index_head_dim": 32,
}  # fmt: skip
GQA = {
    "model_type": "mla_gqa", "source_model_type": "llama", "vocab_size": 256, "hidden_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "index_n_heads": 4, "index_head_dim": 32, "index_rope_dim": 16, "index_topk": TOPK,
}  # fmt: skip
MODELS = {
    "experts as one product": SIZES,
    "experts of each token": {**SIZES, "n_routed_experts": 32, "num_experts_per_tok": 4},
    "grouped queries": GQA,
}
DTYPES = {4: torch.float32, 2: torch.bfloat16}


def stage(kind):
    lengths = (LengthPhase(start=0.0, shares=((LENGTH, 1.0),)),)
    return toy_stage(kind, lengths=lengths, **({"topk": TOPK} if kind == "sparse" else {}))


def new(raw):
    config = read_config(raw, "test")
    built = Transformer(config)
    initialise(built, torch.Generator().manual_seed(0), config.num_layers)
    return built


def loss_of(forward, kind):
    """The loss of one step as the loop makes it."""
    head = forward.model.lm_head.weight
    ids, rows = torch.randint(0, 256, (B, LENGTH)), torch.randint(0, LENGTH, (B, ROWS))
    output = forward(
        ids, topk=TOPK if kind == "sparse" else None, frozen=kind == "warmup", kl_rows=None if kind == "dense" else rows
    )
    loss = torch.stack(list(output.kl.values())).sum() if output.kl else torch.zeros(())
    if kind != "warmup":
        weights = torch.full((TOKENS,), 1.0 / TOKENS)
        loss = loss + cross_entropy(output.hidden, head, ids.flatten(), weights, forward.dtype).loss + output.excess
    return loss


def saved_bytes(forward, kind):
    """Bytes of every storage that autograd keeps for the backward pass, those of the parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in forward.model.parameters()}
    held = {}

    def keep(tensor):
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # alive: its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(forward, kind)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in held.items() if address not in known)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is on, until they die."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, address, size):
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize("num_bytes", [4, 2])
@pytest.mark.parametrize("kind", ["dense", "warmup", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_step_keeps_and_its_peak_are_foreseen(name, kind, num_bytes):
    built = new(MODELS[name])
    forward = TrainingForward(built, dtype=DTYPES[num_bytes])
    expected = account(built, stage(kind), num_bytes=num_bytes, compiled=False, kl_rows=ROWS)
    kept = sum(expected.kept.values()) * TOKENS
    if kind != "warmup":  # autograd keeps the weights' copies as well
        kept += expected.fixed["copies in the compute type"]
    assert 0.92 < kept / saved_bytes(forward, kind) < 1.3
    with LiveBytes() as live:
        loss_of(forward, kind).backward()
    there = expected.fixed["parameters"] + expected.fixed["moments"]  # made before the step, and after it
    # a GPU runs the experts of all tokens at once, the CPU one expert after another
    most = 1.8 if name == "experts of each token" and kind == "warmup" else 1.4
    assert 1.0 < expected.total(TOKENS) / (live.peak + there) < most


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_what_a_compiled_step_keeps_is_foreseen(kind):
    """The partitioner that decides what is made again is the GPU's; its C++ or Triton code is not needed for that."""
    torch._dynamo.reset()
    built = new(SIZES)
    forward = TrainingForward(built, dtype=torch.bfloat16)
    for name, function in (("before", before_attention), ("after", after_attention)):
        setattr(forward, name, torch.compile(function, dynamic=False, backend="aot_eager_decomp_partition"))
    expected = account(built, stage(kind), num_bytes=2, compiled=True, kl_rows=ROWS)
    kept = sum(expected.kept.values()) * TOKENS + expected.fixed["copies in the compute type"]
    assert 0.95 < kept / saved_bytes(forward, kind) < 1.3


@pytest.mark.parametrize("num_bytes", [4, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_of_an_evaluation_is_foreseen(name, num_bytes):
    built = new(MODELS[name])
    forward = TrainingForward(built, dtype=DTYPES[num_bytes])
    expected = evaluation_account(built, stage("warmup"), num_bytes=num_bytes)
    with torch.no_grad(), LiveBytes() as live:
        forward(torch.randint(0, 256, (B, LENGTH)))
    assert 1.0 < expected.total(TOKENS) / (live.peak + expected.fixed["parameters"]) < 1.8


@pytest.mark.parametrize("free", [3 << 20, 8 << 20, 30 << 20])
def test_the_largest_batch_of_the_error_line_passes_in_every_stage_and_the_next_one_does_not(
    tmp_path, monkeypatch, free
):
    monkeypatch.setattr(model.training.loop, "free_bytes", lambda device: free)
    longer = (LengthPhase(start=0.0, shares=((48, 1.0),)),)
    stages = (toy_stage("warmup"), toy_stage("dense", lengths=longer), toy_stage("sparse"))

    def check(batch_tokens):
        training(tmp_path, toy_config(*stages, batch_tokens=batch_tokens)).check()

    with pytest.raises(ModelError, match=r"stages\.warmup: .* GiB are free: ") as caught:
        check(48 << 14)
    found = re.search(r"the largest batch_tokens that would fit is (\d+)$", str(caught.value))
    assert found is not None, str(caught.value)
    largest = int(found[1])
    assert largest > 0 and largest % 48 == 0
    check(largest)
    with pytest.raises(ModelError, match=rf"would fit is {largest}$"):
        check(largest + 48)


def test_no_batch_fits_where_the_moments_alone_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(model.training.loop, "free_bytes", lambda device: 1 << 10)
    with pytest.raises(ModelError, match=r"stages\.dense: 128 tokens .*: no batch would fit$"):
        training(tmp_path, toy_config(toy_stage("dense"))).check()


def test_the_largest_batch_of_several_processes_is_dealt_evenly():
    def largest(num_ranks):
        with pytest.raises(ModelError, match=r"processes, " if num_ranks > 1 else "GiB, ") as caught:
            check_memory(
                new(SIZES), [stage("dense")], done=0, batch_tokens=1 << 24, num_ranks=num_ranks, num_bytes=4,
                compiled=False, kl_rows=ROWS, evaluates=True, free=200 << 20,
            )  # fmt: skip
        return int(str(caught.value).rsplit(" ", 1)[1])

    assert largest(3) == 3 * largest(1) > 0
    assert largest(3) % (3 * LENGTH) == 0

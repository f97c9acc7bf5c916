"""Pieces that overlap on a GPU: the bits of in turn, whichever call lags, in a captured graph, in no more memory."""

import dataclasses

import pytest
import torch

from kernels.bench_attention import SCALE, V32
from kernels.bench_case import graphed
from kernels.bench_step_calls import sparse_decode_step, sparse_prefill_step
from kernels.index_scores import index_scores
from kernels.selection_step import DESIGNS, Step, selection_step
from kernels.sparse_mla import sparse_mla
from kernels.topk import topk
from tests.gpu.kernel_errors import poison_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OVERLAPPED = [design for design in DESIGNS if design != "in turn"]
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
LAG = 3_000_000  # cycles, about 2 ms: longer than all calls of a small step
K = 2048


@pytest.fixture(autouse=True)
def poisoned():
    poison_memory()


def prompt(s, t, dtype=E4M3, heads=64):
    """The last s of t tokens as a step."""
    index_q, index_k = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((s, 64, 128), (t, 128)))
    weights, scale = torch.rand(s, 64, device="cuda"), torch.rand(t, device="cuda") + 0.5
    q, kv = torch.randn(s, heads, 576, device="cuda").to(BF16), torch.randn(t, 576, device="cuda").to(BF16)
    start, visible = t - s, torch.arange(t - s + 1, t + 1, device="cuda", dtype=torch.int32)

    def score(rows):
        stop = start + rows.stop
        return index_scores(index_q[rows], index_k[:stop], weights[rows], start + rows.start, scale[:stop])

    def attend(ids, rows, out):
        sparse_mla(q[rows], kv, ids, V32, SCALE, check_ids=False, out=out[rows])

    return Step(
        score=score,
        choose=lambda scores, rows: topk(scores, K, visible[rows]),
        attend=attend,
        empty=lambda: torch.empty(s, heads, 512, dtype=BF16, device="cuda"),
    )


def lagging(step, which):
    """The same step with one of its calls waiting on the GPU before it begins."""
    call = getattr(step, which)

    def late(*args):
        torch.cuda._sleep(LAG)
        return call(*args)

    return dataclasses.replace(step, **{which: late})


def run(step, s, design):
    return selection_step(step, s, K, torch.device("cuda", torch.cuda.current_device()), design)


@pytest.mark.parametrize("lag", [None, "score", "choose", "attend"])
@pytest.mark.parametrize("dtype", [E4M3, BF16])
@pytest.mark.parametrize("design", OVERLAPPED)
def test_pieces_that_overlap_give_the_bits_of_in_turn_whichever_call_lags(design, dtype, lag):
    s, t = 515, 9001
    step = prompt(s, t, dtype)
    ids, out = run(step, s, "in turn")
    assert bool(out.isfinite().all()) and bool((ids[-1] >= 0).all())
    late = step if lag is None else lagging(step, lag)
    found = []
    for _ in range(4):
        poison_memory(1 << 28)
        found.append(run(late, s, design))
        # whatever is free now is written at once, behind this stream's work alone
        torch.full((s * t,), float("nan"), device="cuda")
        torch.full((s, t // 2), float("nan"), device="cuda")
    for again, attended in found:
        assert torch.equal(again, ids) and torch.equal(attended, out)


@pytest.mark.parametrize("design", OVERLAPPED)
def test_pieces_that_overlap_follow_each_other_in_two_streams_of_the_caller(design):
    s, t = 300, 9000
    step = prompt(s, t)
    ids, out = run(step, s, "in turn")
    other = torch.cuda.Stream()
    for _ in range(3):
        first = run(lagging(step, "attend"), s, design)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            second = run(step, s, design)
        torch.cuda.current_stream().wait_stream(other)
        for again, attended in (first, second):
            assert torch.equal(again, ids) and torch.equal(attended, out)


@pytest.mark.parametrize("lag", [None, "score", "choose", "attend"])
@pytest.mark.parametrize("design", OVERLAPPED)
def test_pieces_that_overlap_give_the_bits_of_in_turn_in_a_captured_graph(design, lag):
    s, t = 515, 9001
    step = prompt(s, t)
    ids, out = run(step, s, "in turn")
    late = step if lag is None else lagging(step, lag)
    replay = graphed(lambda: run(late, s, design))
    for _ in range(4):
        again, attended = replay()
        assert torch.equal(again, ids) and torch.equal(attended, out)
        again.fill_(-9)
        attended.fill_(float("nan"))
        poison_memory(1 << 28)


@pytest.mark.parametrize("keys, queries", [(5000, 700), (40_000, 4096)])
@pytest.mark.parametrize("design", OVERLAPPED)
def test_pieces_that_overlap_give_a_prompts_outputs_the_bits_of_in_turn(design, keys, queries):
    torch.manual_seed(5)
    expected = sparse_prefill_step(keys, queries, heads=64)().clone()
    torch.manual_seed(5)
    call = sparse_prefill_step(keys, queries, heads=64, design=design)
    for _ in range(3):
        poison_memory()
        assert torch.equal(call(), expected)


@pytest.mark.parametrize("keys, batch", [(5000, 64), (20_000, 33)])
@pytest.mark.parametrize("dtype", ["fp8", "bfloat16"])
@pytest.mark.parametrize("design", OVERLAPPED)
def test_pieces_that_overlap_give_a_batchs_outputs_the_bits_of_in_turn(design, dtype, keys, batch):
    torch.manual_seed(6)
    expected = sparse_decode_step(keys, batch, dtype)().clone()
    torch.manual_seed(6)
    call = sparse_decode_step(keys, batch, dtype, design=design)
    replay = graphed(call)
    for _ in range(3):
        poison_memory(1 << 28)
        assert torch.equal(call(), expected)
        out = replay()
        assert torch.equal(out, expected)
        out.fill_(float("nan"))


def peak(step, s, design):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(step, s, design)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_pieces_that_overlap_take_no_more_memory_than_in_turn():
    s, t = 2048, 65_536
    step = prompt(s, t)
    for design in DESIGNS:
        run(step, s, design)
    whole = peak(step, s, "in turn")
    assert whole > 4 * s * t
    assert peak(step, s, "chains 4") < 0.9 * whole

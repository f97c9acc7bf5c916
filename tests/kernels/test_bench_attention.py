"""The benchmark's cases: named once, counted by formula, and the step itself runs from scores to attention."""

import pytest
import torch

from kernels import bench_attention_cases
from kernels.bench_attention import V32, cases, causal_ids, dense_decode_step, latent_cache, random_pages, visible_pairs
from kernels.bench_step_calls import sparse_decode_step, sparse_prefill_step
from kernels.fp8_cache import unpack_rows
from kernels.page_slots import page_slots


def test_every_case_has_a_name_of_its_own_and_says_its_work():
    every = cases()
    assert len({case["name"] for case in every}) == len(every)
    for case in every:
        assert case["flops"] > 0 and callable(case["build"]) and case["source"]
        assert all(ms > 0 for ms in case["peers"].values())
    assert {case["kernel"] for case in cases()} == {
        "sparse_prefill_hopper", "sparse_prefill_triton", "sparse_decode", "dense_decode", "dense_prefill_cudnn",
        "dense_prefill_hopper", "dense_prefill_triton", "masked_prefill",
    }  # fmt: skip


def test_work_is_counted_as_the_peers_count_it():
    named = {case["name"]: case for case in cases()}
    prefill = named["sparse_prefill_hopper-bfloat16-keys8192-queries4096"]
    assert prefill["flops"] / (prefill["peers"]["FlashMLA"] * 1e9) == pytest.approx(572, rel=0.01)  # TFLOP/s
    decode = named["dense_decode-bfloat16-keys131072-batch64"]
    assert decode["flops"] / (decode["peers"]["FlashMLA bf16"] * 1e9) == pytest.approx(559, rel=0.01)
    assert decode["bytes"] / (decode["peers"]["FlashMLA bf16"] * 1e6) == pytest.approx(2313, rel=0.02)  # GB/s
    dense = named["dense_prefill_cudnn-bfloat16-keys32768-queries4096"]
    assert dense["flops"] / (dense["peers"]["FA3"] * 1e9) == pytest.approx(722, rel=0.01)
    assert visible_pairs(2, 5) == 4 + 5


def test_a_prefill_step_goes_from_scores_to_attention():
    out = sparse_prefill_step(40, 8, heads=2, k=16, device="cpu")()
    assert out.shape == (8, 2, 512) and bool(out.isfinite().all()) and bool(out.any())


def test_decode_steps_read_paged_caches():
    out, _ = dense_decode_step(70, 2, "fp8", heads=2, device="cpu")()
    assert out.shape == (2, 2, 512) and bool(out.isfinite().all())
    sparse = sparse_decode_step(70, 2, "float32", heads=2, k=16, device="cpu")()
    assert sparse.shape == (2, 2, 512) and bool(sparse.isfinite().all())


def test_random_ids_are_visible_distinct_and_padded():
    ids = causal_ids(5, 9, 6, "cpu")
    for i, row in enumerate(ids.tolist()):
        chosen = [j for j in row if j >= 0]
        assert len(set(chosen)) == len(chosen) == min(6, 5 + i)
        assert max(chosen) <= 4 + i and row == chosen + [-1] * (6 - len(chosen))


def test_a_random_cache_holds_what_its_format_can():
    assert float(unpack_rows(latent_cache(10, "fp8", "cpu"), V32).std()) == pytest.approx(1.0, abs=0.1)
    assert sorted(random_pages(130, 2, "cpu").flatten().tolist()) == list(range(6))


def test_positions_become_slots_of_their_pages():
    pages = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    ids = torch.tensor([[0, 63, 64], [127, -1, 5]], dtype=torch.int32)
    assert page_slots(ids, pages).tolist() == [[192, 255, 0], [191, -1, 69]]


def test_the_kernel_benchmark_finds_every_case():
    found = list(bench_attention_cases.cases())
    assert len({case.name for case in found}) == len(found) == len(cases())
    aims = {case.name: (case.bar_ms, case.goal_ms) for case in found}
    assert aims["sparse_decode fp8 keys=8192 batch=1"] == (2 * 0.0244, 1.1 * 0.0244)
    bar, goal = aims["sparse_prefill_hopper bfloat16 keys=131072 queries=4096"]
    assert goal == 4.740 < bar < 1.1 * goal  # 450 of FlashMLA's 493 TFLOP/s

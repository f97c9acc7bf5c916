"""The Triton attention kernels without a GPU: right in the interpreter at small size, built for sm_90 at full size."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: the CPU paths do not need it")
from kernels import sparse_mla_triton, sparse_prefill_triton
from kernels.decode_designs import BF16, FP8, Design
from kernels.dense_decode import dense_decode_reference
from kernels.fp8_cache import pack_rows, row_bytes, unpack_rows
from kernels.layout import KvLayout
from kernels.prefill_designs import PREFILL_DESIGNS
from kernels.sparse_mla import sparse_mla_reference
from tests.kernels.hopper import SHARED_LIMIT, Build, interpreter_works

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a case of test_the_kernels_are_right_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter builds nothing")

SMALL = KvLayout(absorbed=True, groups=1, latent_dim=128, rope_dim=32)
ODD = KvLayout(absorbed=True, groups=1, latent_dim=48, rope_dim=16)
GROUPED = KvLayout(absorbed=False, groups=3, latent_dim=48, rope_dim=96)
V32 = KvLayout(absorbed=True, groups=1, latent_dim=512, rope_dim=64)
SMOLLM = KvLayout(absorbed=False, groups=3, latent_dim=192, rope_dim=192)
each_prefill = pytest.mark.parametrize("prefill", PREFILL_DESIGNS.values(), ids=PREFILL_DESIGNS)
HALVED = {name: design for name, design in PREFILL_DESIGNS.items() if design.halved}
WHOLE = PREFILL_DESIGNS["whole scores"]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums of a few hundred terms in another order


def query(layout, s, h, dtype=torch.float32, device="cpu"):
    width = layout.width if layout.absorbed else layout.rope_dim // layout.groups
    return torch.randn(s, h, width, dtype=dtype, device=device)


def run(q, kv, ids, lengths, layout, **options):
    """Outputs start as NaN: what the kernel leaves out is seen."""
    out = torch.full((*q.shape[:2], layout.latent_dim // layout.groups), float("nan"))
    lse = torch.full(q.shape[:2], float("nan"))
    sparse_mla_triton.latent_attention(q, kv, ids, lengths, layout, 0.2, out, lse, **options)
    return out, lse


@compiled
def test_the_kernels_are_right_in_the_interpreter():
    if not interpreter_works():
        pytest.skip("this Triton's interpreter cannot run a loop to a run-time bound with this numpy")
    command = [sys.executable, "-m", "pytest", "-k", "interpreter", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@interpreted
@each_prefill
@pytest.mark.parametrize("layout, heads", [(SMALL, 17), (ODD, 4), (GROUPED, 9)], ids=["small", "odd", "grouped"])
@pytest.mark.parametrize("k", [1, 63, 130])
def test_interpreter_prefill_masks_padding_and_lengths(layout, heads, k, prefill):
    kv, q = torch.randn(150, layout.width), query(layout, 4, heads)
    kv[0] = float("nan")  # a row nobody selected may hold anything
    ids = torch.stack([torch.randperm(149)[:k] + 1 for _ in range(4)]).to(torch.int32)
    ids[1, k // 2 :] = -1
    ids[2] = -1
    lengths = torch.tensor([k, k, k, max(1, k - 7)], dtype=torch.int32)
    short = torch.where(torch.arange(k)[None, :] < lengths[:, None], ids, -1)
    actual = run(q, kv, ids, lengths, layout, prefill=prefill)
    torch.testing.assert_close(actual, sparse_mla_reference(q, kv, short, layout, 0.2), **CLOSE)
    assert torch.equal(actual[0][2], torch.zeros_like(actual[0][2]))
    assert bool(actual[1][2].isneginf().all())
    wild = torch.where(short < 0, 150, short)  # outside of the cache: as if not there
    again = run(q, kv, wild, None, layout, prefill=prefill)
    torch.testing.assert_close(again, sparse_mla_reference(q, kv, short, layout, 0.2), **CLOSE)


@interpreted
@each_prefill
def test_interpreter_prefill_reads_past_padding_anywhere_and_passes_nan_on(prefill):
    kv, q = torch.randn(200, SMALL.width), query(SMALL, 3, 5)
    q[1, 2, 9] = kv[7] = float("nan")
    ids = torch.stack([torch.randperm(190)[:140] + 10 for _ in range(3)]).to(torch.int32)
    ids[:, :70] = -1
    ids[2, 1::2] = -1
    lengths = torch.tensor([140, 140, 0], dtype=torch.int32)
    out, lse = run(q, kv, ids, lengths, SMALL, prefill=prefill)
    expected = sparse_mla_reference(q[:1], kv, ids[:1], SMALL, 0.2)
    torch.testing.assert_close((out[:1], lse[:1]), expected, **CLOSE)
    assert bool(out[1, 2].isnan().all()) and bool(lse[1, 2].isnan()) and bool(out[1, 3].isfinite().all())
    assert not bool(out[2].any()) and bool(lse[2].isneginf().all())
    out, lse = run(q, kv, ids, None, SMALL, prefill=prefill)
    expected = sparse_mla_reference(q[2:], kv, ids[2:], SMALL, 0.2)
    torch.testing.assert_close((out[2:], lse[2:]), expected, **CLOSE)


@interpreted
@pytest.mark.parametrize("fp8", [False, True], ids=["float", "fp8"])
@pytest.mark.parametrize("layout, heads", [(SMALL, 8), (GROUPED, 3)], ids=["small", "grouped"])
def test_interpreter_splits_merge_to_the_whole(layout, heads, fp8):
    kv, q = torch.randn(700, layout.width), query(layout, 2, heads)
    ids = torch.stack([torch.randperm(700)[:650] for _ in range(2)]).to(torch.int32)
    ids[1, 400:] = -1
    rows = pack_rows(kv, layout) if fp8 else kv
    kv = unpack_rows(rows, layout) if fp8 else kv
    actual = run(q, rows, ids, None, layout, split=True)
    torch.testing.assert_close(actual, sparse_mla_reference(q, kv, ids, layout, 0.2), **CLOSE)


@interpreted
@pytest.mark.parametrize("fp8", [False, True], ids=["float", "fp8"])
def test_interpreter_dense_decode_reads_ragged_pages(fp8):
    kv, q = torch.randn(12, 64, SMALL.width), query(SMALL, 3, 5)
    cache = pack_rows(kv.flatten(0, 1), SMALL).view(12, 64, -1) if fp8 else kv
    pages = torch.full((3, 10), -1, dtype=torch.int32)
    pages[0, :9] = torch.randperm(12)[:9]
    pages[1, :1] = 7
    lengths = torch.tensor([520, 1, 0], dtype=torch.int32)
    actual = run(q, cache.flatten(0, 1), pages, lengths, SMALL, paged=True, split=True)
    torch.testing.assert_close(actual, dense_decode_reference(q, cache, pages, lengths, SMALL, 0.2), **CLOSE)


@interpreted
@pytest.mark.parametrize("layout, heads", [(SMALL, 8), (GROUPED, 3)], ids=["small", "grouped"])
@pytest.mark.parametrize("partials", [torch.float32, torch.float16], ids=str)
def test_interpreter_half_products_of_fp8_rows_keep_their_scales(layout, heads, partials):
    """Not with bfloat16 products: the interpreter multiplies bfloat16 as the integers it keeps them in."""
    sizes = torch.randint(-12, 9, (700, 1)).float().exp2()
    kv, q = torch.randn(700, layout.width) * sizes, query(layout, 2, heads, torch.bfloat16) / 16
    rows = pack_rows(kv, layout)
    ids = torch.stack([torch.randperm(700)[:650] for _ in range(2)]).to(torch.int32)
    design = Design(backend="triton", products=torch.float16, partials=partials)
    out, lse = run(q, rows, ids, None, layout, split=True, design=design)
    wanted, sums = sparse_mla_reference(q, unpack_rows(rows, layout), ids, layout, 0.2)
    assert float((out - wanted).norm() / wanted.norm()) < 4e-3  # weights in half precision
    torch.testing.assert_close(lse, sums, rtol=0.0, atol=2e-2)


@interpreted
@pytest.mark.parametrize("design", [design for design in BF16.values() if design.split > 512])
def test_interpreter_longer_splits_merge_to_the_whole(design):
    kv, q = torch.randn(50, 64, SMALL.width), query(SMALL, 2, 5)
    pages = torch.stack([torch.randperm(50) for _ in range(2)]).to(torch.int32)
    lengths = torch.tensor([3100, 70], dtype=torch.int32)
    actual = run(q, kv.flatten(0, 1), pages, lengths, SMALL, paged=True, split=True, design=design)
    expected = dense_decode_reference(q, kv, pages, lengths, SMALL, 0.2)
    tolerance = CLOSE if design.partials == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(actual, expected, **tolerance)


@interpreted
@pytest.mark.parametrize("partials", [torch.float32, torch.float16], ids=str)
def test_interpreter_a_wider_page_table_changes_no_bit(partials):
    kv, q = torch.randn(30, 64, SMALL.width), query(SMALL, 1, 3)
    pages, lengths = torch.randperm(30).to(torch.int32)[None], torch.tensor([500], dtype=torch.int32)
    options = {"paged": True, "split": True, "design": Design(backend="triton", partials=partials)}
    wide = run(q, kv.flatten(0, 1), pages, lengths, SMALL, **options)
    narrow = run(q, kv.flatten(0, 1), pages[:, :8].contiguous(), lengths, SMALL, **options)
    assert torch.equal(wide[0], narrow[0]) and torch.equal(wide[1], narrow[1])


def poison_partials(monkeypatch):
    """Partial results start as NaN: what the merge reads and nobody wrote is seen."""
    whole = torch.full
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: whole(shape, float("nan"), **options))


@interpreted
@pytest.mark.parametrize("partials", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("k", [100, 600, 1500])
def test_interpreter_one_chosen_list_among_padding_gives_the_bits_of_itself_alone(monkeypatch, k, partials):
    kv, q = torch.randn(1600, SMALL.width), query(SMALL, 5, 3)
    q[torch.arange(5) != 3] = float("nan")  # padding's own queries are not read
    ids = torch.full((5, k), -1, dtype=torch.int32)
    ids[3, : k - k // 3] = torch.randperm(1600)[: k - k // 3]
    ids[1] = 5000  # outside of the cache: as if not there
    poison_partials(monkeypatch)
    options = {"split": True, "design": Design(backend="triton", partials=partials)}
    out, lse = run(q, kv, ids, None, SMALL, **options)
    alone = run(q[3:4], kv, ids[3:4], None, SMALL, **options)
    assert torch.equal(out[3:4], alone[0]) and torch.equal(lse[3:4], alone[1]) and bool(out.isfinite().all())
    for i in (0, 1, 2, 4):
        assert not bool(out[i].any()) and bool(lse[i].isneginf().all())


@interpreted
@pytest.mark.parametrize("partials", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 512, 513, 1400])
def test_interpreter_one_request_among_padding_gives_the_bits_of_itself_alone(monkeypatch, length, partials):
    kv, q = torch.randn(30, 64, SMALL.width), query(SMALL, 4, 3)
    q[torch.arange(4) != 2] = float("nan")
    pages = torch.full((4, 24), 1 << 20, dtype=torch.int32)
    pages[2] = torch.randperm(30)[:24]
    lengths = torch.tensor([0, 0, length, 0], dtype=torch.int32)
    poison_partials(monkeypatch)
    options = {"paged": True, "split": True, "design": Design(backend="triton", partials=partials)}
    out, lse = run(q, kv.flatten(0, 1), pages, lengths, SMALL, **options)
    few = pages[2:3, : -(-length // 64)].contiguous()
    alone = run(q[2:3], kv.flatten(0, 1), few, lengths[2:3], SMALL, **options)
    assert torch.equal(out[2:3], alone[0]) and torch.equal(lse[2:3], alone[1]) and bool(out.isfinite().all())
    for i in (0, 1, 3):
        assert not bool(out[i].any()) and bool(lse[i].isneginf().all())


@interpreted
@pytest.mark.parametrize("k", [100, 1500])
def test_interpreter_a_query_that_is_not_a_number_stays_seen_behind_the_merge(k):
    kv, q = torch.randn(1600, SMALL.width), query(SMALL, 2, 3)
    q[1, 1, 7] = float("nan")
    ids = torch.full((2, k), -1, dtype=torch.int32)
    ids[:, : k // 2] = torch.arange(k // 2)
    out, lse = run(q, kv, ids, None, SMALL, split=True)
    assert bool(out[1, 1].isnan().all()) and bool(lse[1, 1].isnan())
    assert bool(out[0].isfinite().all()) and bool(out[1, 0].isfinite().all())


@interpreted
def test_interpreter_float16_partials_saturate():
    kv, q = torch.full((600, SMALL.width), 1e6), query(SMALL, 1, 1)
    ids = torch.arange(600, dtype=torch.int32)[None]
    out, _ = run(q, kv, ids, None, SMALL, split=True, design=Design(backend="triton", partials=torch.float16))
    assert torch.equal(out, torch.full_like(out, 65504.0))


def build(monkeypatch, layout, heads, dtype, *, fp8, paged, split, queries=256, k=2048, **options):
    """Launch on tensors without storage and compile what would have run."""
    q, kv = query(layout, queries, heads, dtype, "meta"), torch.empty(131072, layout.width, dtype=dtype, device="meta")
    if fp8:
        kv = torch.empty(131072, row_bytes(layout), dtype=torch.uint8, device="meta")
    ids = torch.empty(queries, k, dtype=torch.int32, device="meta")
    out = torch.empty(queries, heads, layout.latent_dim // layout.groups, dtype=dtype, device="meta")
    kernels = [Build(sparse_mla_triton.latent_attention_kernel), Build(sparse_mla_triton.merge_splits_kernel)]
    monkeypatch.setattr(sparse_mla_triton, "latent_attention_kernel", kernels[0])
    monkeypatch.setattr(sparse_mla_triton, "merge_splits_kernel", kernels[1])
    lengths = torch.empty(queries, dtype=torch.int32, device="meta") if paged else None
    lse = torch.empty(queries, heads, device="meta")
    sparse_mla_triton.latent_attention(q, kv, ids, lengths, layout, 0.1, out, lse, paged=paged, split=split, **options)
    return kernels


@compiled
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    "paged, split", [(False, False), (False, True), (True, True)], ids=["prefill", "decode", "dense"]
)
def test_full_width_builds_for_hopper_within_its_shared_memory(monkeypatch, fp8, paged, split):
    options = {"fp8": fp8, "paged": paged, "split": split, "prefill": WHOLE}
    attention, merge = build(monkeypatch, V32, 128, torch.bfloat16, **options)
    assert 0 < attention.shared <= SHARED_LIMIT
    assert "wgmma" in attention.ptx
    assert merge.stack == 0
    if not fp8 and attention.pinned:
        assert not attention.spills_in_loop()


@compiled
@pytest.mark.parametrize("layout, fp8, split, halved", [
    (V32, False, False, True), (V32, True, False, False), (V32, False, True, False), (SMALL, False, False, False),
    (KvLayout(absorbed=True, groups=1, latent_dim=512, rope_dim=32), False, False, False),
    (KvLayout(absorbed=False, groups=1, latent_dim=512, rope_dim=64), False, False, False),
])  # fmt: skip
def test_plain_prefill_of_the_measured_widths_alone_takes_the_halved_scores(monkeypatch, layout, fp8, split, halved):
    taken = []
    monkeypatch.setattr(sparse_mla_triton, "sparse_prefill", lambda *arguments: taken.append(arguments[-1]))
    build(monkeypatch, layout, 8, torch.bfloat16, fp8=fp8, paged=False, split=split)
    assert taken == ([PREFILL_DESIGNS["halved scores + ids ahead"]] if halved else [])


def build_prefill(monkeypatch, design, **options):
    kernel = Build(sparse_prefill_triton.sparse_prefill_kernel)
    monkeypatch.setattr(sparse_prefill_triton, "sparse_prefill_kernel", kernel)
    build(monkeypatch, fp8=False, paged=False, split=False, prefill=design, **options)
    return kernel


@compiled
@pytest.mark.parametrize("design", HALVED.values(), ids=HALVED)
def test_prefill_designs_build_for_hopper_without_repeated_or_serialized_products(monkeypatch, design):
    kernel = build_prefill(monkeypatch, design, layout=V32, heads=128, dtype=torch.bfloat16)
    assert 0 < kernel.shared <= SHARED_LIMIT
    if kernel.pinned:
        scores, values = V32.width // 16, 64 // 16
        assert kernel.ptx.count("wgmma.mma_async") == scores + values  # each group multiplies half of a tile's columns
        assert kernel.serialized() == 0
        assert not kernel.spills_in_loop()


@compiled
@pytest.mark.parametrize("design", HALVED.values(), ids=HALVED)
@pytest.mark.parametrize(
    "layout, heads, dtype",
    [(SMALL, 1, torch.bfloat16), (V32, 8, torch.bfloat16), (V32, 80, torch.float16), (V32, 72, torch.float32)],
    ids=["small", "few", "half", "float"],
)
def test_prefill_designs_build_for_other_widths_dtypes_and_sizes_of_one(monkeypatch, design, layout, heads, dtype):
    kernel = build_prefill(monkeypatch, design, layout=layout, heads=heads, dtype=dtype, queries=1, k=heads)
    assert 0 < kernel.shared <= SHARED_LIMIT


@compiled
@pytest.mark.parametrize("name", [name for name, design in FP8.items() if design.backend == "triton"])
@pytest.mark.parametrize("paged", [False, True], ids=["sparse", "dense"])
def test_fp8_designs_build_for_hopper(monkeypatch, name, paged):
    design = FP8[name]
    attention, merge = build(monkeypatch, V32, 128, torch.bfloat16, fp8=True, paged=paged, split=True, design=design)
    assert 0 < attention.shared <= SHARED_LIMIT
    assert merge.stack == 0
    assert ("f16.f16" in attention.ptx) == (design.products == torch.float16)
    assert "ld.global.b16" not in attention.ptx  # a row's rope keys are copied 16 bytes at a time
    if attention.pinned:
        assert attention.stack <= 64  # a few addresses; a spilled tile would take hundreds of bytes


@compiled
@pytest.mark.parametrize("layout, heads", [(SMALL, 8), (SMOLLM, 9)], ids=["small", "smollm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_small_widths_build_for_hopper(monkeypatch, layout, heads, dtype):
    attention, _ = build(monkeypatch, layout, heads, dtype, fp8=False, paged=False, split=True)
    assert 0 < attention.shared <= SHARED_LIMIT


@compiled
@pytest.mark.parametrize("paged", [False, True], ids=["ids", "pages"])
def test_sizes_of_one_build_too(monkeypatch, paged):
    """Triton makes constants of integers that are 1."""
    design = Design(backend="triton", partials=torch.float16)
    options = {"fp8": False, "paged": paged, "split": True, "queries": 1, "k": 1, "design": design}
    attention, merge = build(monkeypatch, SMALL, 1, torch.bfloat16, **options)
    assert 0 < attention.shared <= SHARED_LIMIT
    assert merge.cubin

"""The attention kernels on a GPU against their float32 references."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
from kernels.decode_designs import BF16 as BF16_DESIGNS
from kernels.decode_designs import FP8 as FP8_DESIGNS
from kernels.dense_decode import dense_decode, dense_decode_reference
from kernels.fp8_cache import pack_rows, unpack_rows
from kernels.layout import KvLayout
from kernels.page_slots import page_slots, page_slots_reference
from kernels.prefill_designs import PREFILL_DESIGNS
from kernels.sparse_mla import choose_backend, gpu_kernel, sparse_mla, sparse_mla_lse, sparse_mla_reference

# largest ||out - reference|| / ||reference||. Half precision: weights and result are rounded once each; the field's
# kernels show 1.7e-3 to 2.6e-3 in bfloat16 (8 bits), an eighth in float16 (11 bits). float32: another order of sums
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 8e-4, torch.float32: 1e-5}
LSE_BOUND = 2e-2  # absolute, natural log: half-precision products of a few hundred terms
V32 = KvLayout(absorbed=True, groups=1, latent_dim=512, rope_dim=64)
SMALL = KvLayout(absorbed=True, groups=1, latent_dim=128, rope_dim=32)
ODD = KvLayout(absorbed=True, groups=1, latent_dim=80, rope_dim=48)
SMOLLM = KvLayout(absorbed=False, groups=3, latent_dim=192, rope_dim=192)
BF16 = torch.bfloat16
DESIGNS = [(False, design) for design in BF16_DESIGNS.values()] + [(True, design) for design in FP8_DESIGNS.values()]
NAMES = [f"bf16 {name}" for name in BF16_DESIGNS] + [f"fp8 {name}" for name in FP8_DESIGNS]
each_prefill = pytest.mark.parametrize("prefill", PREFILL_DESIGNS.values(), ids=PREFILL_DESIGNS)
each_design = pytest.mark.parametrize("fp8, design", DESIGNS, ids=NAMES)


def normal(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda").to(dtype)


def query(layout, s, h, dtype=BF16):
    return normal(s, h, layout.width if layout.absorbed else layout.rope_dim // layout.groups, dtype=dtype)


def choose(s, k, t):
    """k distinct rows of 1..t - 1 for each of s queries: row 0 is nobody's and may hold anything."""
    return torch.stack([torch.randperm(t - 1, device="cuda")[:k] + 1 for _ in range(s)]).to(torch.int32)


def assert_close(actual, expected, dtype):
    out, lse = actual
    wanted, wanted_lse = expected
    assert out.dtype == dtype and bool(out.isfinite().all())
    assert float((out.float() - wanted).norm() / wanted.norm()) < BOUNDS[dtype]
    none = wanted_lse.isneginf()
    assert torch.equal(lse.isneginf(), none)
    assert float((lse - wanted_lse)[~none].abs().max()) < LSE_BOUND
    assert not bool(out[none].any())


def launcher(backend, kv):
    if backend == "hopper":
        hopper = pytest.importorskip("kernels.sparse_mla_hopper", reason="this Triton has no Gluon")
        if not hopper.fits(query(V32, 1, 64), normal(1, 576), V32):
            pytest.skip("needs a Hopper GPU and the tested release of Triton")
    return gpu_kernel(backend, kv)


def launch(backend, q, kv, ids, lengths, layout, **options):
    """Outputs lie between NaN and start as NaN: what is left out or written too far is seen."""
    s, h, _ = q.shape
    outs = torch.full((s + 2, h, layout.latent_dim // layout.groups), float("nan"), dtype=q.dtype, device="cuda")
    lses = torch.full((s + 2, h), float("nan"), device="cuda")
    launcher(backend, kv)(q, kv, ids, lengths, layout, 0.1, outs[1:-1], lses[1:-1], **options)
    torch.cuda.synchronize()
    for whole in (outs, lses):
        assert bool(whole[0].isnan().all()) and bool(whole[-1].isnan().all())
    return outs[1:-1], lses[1:-1]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("k", [1, 63, 64, 129, 512, 2048])
def test_full_width_prefill_masks_padding_and_lengths(backend, heads, k, fp8):
    kv, q, ids = normal(4000, 576), query(V32, 6, heads), choose(6, k, 4000)
    kv[0] = float("nan")
    rows = pack_rows(kv, V32) if fp8 else kv
    kv = unpack_rows(rows, V32) if fp8 else kv
    ids[1, k // 2 :] = -1
    ids[2] = -1
    ids[3, torch.rand(k, device="cuda") < 0.5] = -1  # padding anywhere
    lengths = torch.tensor([k, k, k, k, max(1, k - 7), 0], dtype=torch.int32, device="cuda")
    read = torch.where(torch.arange(k, device="cuda")[None, :] < lengths[:, None], ids, -1)
    assert_close(launch(backend, q, rows, ids, lengths, V32), sparse_mla_reference(q, kv, read, V32, 0.1), BF16)


@each_prefill
@pytest.mark.parametrize("k", [1, 63, 129, 2048])
def test_every_design_of_full_width_prefill_masks_padding_and_lengths(prefill, k):
    kv, q, ids = normal(4000, 576), query(V32, 6, 128), choose(6, k, 4000)
    kv[0] = float("nan")
    ids[1, k // 2 :] = -1
    ids[2] = -1
    ids[3, torch.rand(k, device="cuda") < 0.5] = -1  # padding anywhere
    lengths = torch.tensor([k, k, k, k, max(1, k - 7), 0], dtype=torch.int32, device="cuda")
    read = torch.where(torch.arange(k, device="cuda")[None, :] < lengths[:, None], ids, -1)
    expected = sparse_mla_reference(q, kv, read, V32, 0.1)
    assert_close(launch("triton", q, kv, ids, lengths, V32, prefill=prefill), expected, BF16)
    wild = torch.where(read < 0, 4000, read)  # outside of the cache: as if not there
    assert_close(launch("triton", q, kv, wild, None, V32, prefill=prefill), expected, BF16)


@each_prefill
@pytest.mark.parametrize("heads, dtype", [(8, BF16), (128, BF16), (80, torch.float16), (72, torch.float32)], ids=str)
def test_every_design_of_full_width_prefill_takes_every_dtype_and_passes_nan_on(prefill, heads, dtype):
    kv, q, ids = normal(700, 576, dtype=dtype), query(V32, 3, heads, dtype), choose(3, 130, 700)
    expected = sparse_mla_reference(q, kv, ids, V32, 0.1)
    assert_close(launch("triton", q, kv, ids, None, V32, prefill=prefill), expected, dtype)
    q[1, 6, 7] = float("nan")
    out, lse = launch("triton", q, kv, ids, None, V32, prefill=prefill)
    assert bool(out[1, 6].isnan().all()) and bool(lse[1, 6].isnan())
    assert bool(out[0].isfinite().all()) and bool(out[1, 7].isfinite().all())


@each_prefill
def test_every_design_of_full_width_prefill_gives_the_same_bits_alone_and_again(prefill):
    kv, q, ids = normal(140_000, 576), query(V32, 300, 128), choose(300, 2048, 140_000)
    whole = launch("triton", q, kv, ids, None, V32, prefill=prefill)
    assert_close(
        (whole[0][[0, 299]], whole[1][[0, 299]]),
        sparse_mla_reference(q[[0, 299]], kv, ids[[0, 299]], V32, 0.1),
        BF16,
    )
    for _ in range(3):
        again = launch("triton", q, kv, ids, None, V32, prefill=prefill)
        assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    for i in (0, 77, 299):
        alone = launch("triton", q[i : i + 1], kv, ids[i : i + 1], None, V32, prefill=prefill)
        assert torch.equal(whole[0][i : i + 1], alone[0]) and torch.equal(whole[1][i : i + 1], alone[1])


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(
    "layout, heads",
    [(SMALL, 8), (SMALL, 128), (ODD, 17), (SMOLLM, 9), (V32, 40)],
    ids=["small", "small128", "odd", "smollm", "v32x40"],
)
def test_other_widths_and_head_counts_go_through_triton(layout, heads, dtype):
    kv, q, ids = normal(700, layout.width, dtype=dtype), query(layout, 5, heads, dtype), choose(5, 130, 700)
    ids[1, 40:] = -1
    ids[2] = -1
    assert choose_backend(q, kv, layout) == "triton"
    assert_close(launch("triton", q, kv, ids, None, layout), sparse_mla_reference(q, kv, ids, layout, 0.1), dtype)


@each_design
@pytest.mark.parametrize("batch", [1, 5])
def test_decode_splits_merge_to_the_whole(fp8, design, batch):
    kv, q, ids = normal(5000, 576), query(V32, batch, 128), choose(batch, 2048, 5000)
    ids[0, 700:] = -1
    rows = pack_rows(kv, V32) if fp8 else kv
    held = unpack_rows(rows, V32) if fp8 else kv
    actual = launch(design.backend, q, rows, ids, None, V32, split=True, design=design)
    assert_close(actual, sparse_mla_reference(q, held, ids, V32, 0.1), BF16)


@pytest.mark.parametrize("design", FP8_DESIGNS.values(), ids=FP8_DESIGNS)
def test_fp8_rows_of_very_different_size_keep_their_scales(design):
    """Each group of 128 in each row has a scale of its own; their sizes go from 2^-12 to 2^8 here."""
    sizes = torch.randint(-12, 9, (3000, 5), device="cuda").float().exp2()
    kv = (torch.randn(3000, 576, device="cuda") * sizes.repeat_interleave(128, 1)[:, :576]).to(BF16)
    q, ids = query(V32, 3, 128) / 32, choose(3, 1500, 3000)
    rows = pack_rows(kv, V32)
    actual = launch(design.backend, q, rows, ids, None, V32, split=True, design=design)
    assert_close(actual, sparse_mla_reference(q, unpack_rows(rows, V32), ids, V32, 0.1), BF16)


@each_design
def test_each_design_gives_a_row_the_same_bits_alone_in_a_batch_and_again(fp8, design):
    kv, q, ids = normal(9000, 576), query(V32, 150, 128), choose(150, 2048, 9000)
    rows = pack_rows(kv, V32) if fp8 else kv
    whole = launch(design.backend, q, rows, ids, None, V32, split=True, design=design)
    for _ in range(3):
        again = launch(design.backend, q, rows, ids, None, V32, split=True, design=design)
        assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    for i in (0, 77, 149):
        alone = launch(design.backend, q[i : i + 1], rows, ids[i : i + 1], None, V32, split=True, design=design)
        assert torch.equal(whole[0][i : i + 1], alone[0]) and torch.equal(whole[1][i : i + 1], alone[1])


def poison_partials(monkeypatch):
    """Partial results start as NaN: what the merge reads and nobody wrote is seen."""
    whole = torch.full
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: whole(shape, float("nan"), **options))


def assert_one_among_padding(whole, alone, place):
    out, lse = whole
    assert torch.equal(out[place : place + 1], alone[0]) and torch.equal(lse[place : place + 1], alone[1])
    padding = torch.arange(len(out), device="cuda") != place
    assert not bool(out[padding].any()) and bool(lse[padding].isneginf().all())


@each_design
@pytest.mark.parametrize("place, count", [(0, 2048), (41, 700), (63, 1)])
@pytest.mark.parametrize("rows", [5000, 140_000], ids=["", "persistent"])
def test_one_chosen_list_among_padding_has_the_same_bits(monkeypatch, fp8, design, place, count, rows):
    kv, q, ids = normal(rows, 576), query(V32, 64, 128), choose(1, 2048, 5000).repeat(64, 1)
    cache = pack_rows(kv, V32) if fp8 else kv
    padding = torch.arange(64, device="cuda") != place
    q[padding], ids[padding], ids[place, count:] = float("nan"), -1, -1
    ids[(place + 1) % 64] = rows  # outside of the cache: as if not there
    one = slice(place, place + 1)
    poison_partials(monkeypatch)
    options = {"split": True, "design": design}
    alone = launch(design.backend, q[one].clone(), cache, ids[one].clone(), None, V32, **options)
    for _ in range(3):
        whole = launch(design.backend, q, cache, ids, None, V32, **options)
        assert_one_among_padding(whole, alone, place)


@each_design
@pytest.mark.parametrize("place, length", [(0, 20000), (41, 513), (63, 1), (5, 1024)])
@pytest.mark.parametrize("num_pages", [16, 512])
@pytest.mark.parametrize("held", [640, 2200], ids=["", "persistent"])
def test_one_dense_decode_among_padding_has_the_same_bits(monkeypatch, fp8, design, place, length, num_pages, held):
    length = min(length, num_pages * 64)
    kv, q = normal(held * 64, 576), query(V32, 64, 128)
    cache = pack_rows(kv, V32) if fp8 else kv
    padding = torch.arange(64, device="cuda") != place
    q[padding] = float("nan")
    pages = torch.full((64, num_pages), 1 << 20, dtype=torch.int32, device="cuda")
    pages[place] = torch.randperm(held, device="cuda")[:num_pages].to(torch.int32)
    lengths = torch.where(padding, 0, length).to(torch.int32)
    one = slice(place, place + 1)
    poison_partials(monkeypatch)
    options = {"paged": True, "split": True, "design": design}
    few = pages[one, : -(-length // 64)].clone()
    alone = launch(design.backend, q[one].clone(), cache, few, lengths[one].clone(), V32, **options)
    for _ in range(3):
        whole = launch(design.backend, q, cache, pages, lengths, V32, **options)
        assert_one_among_padding(whole, alone, place)


@each_design
def test_some_rows_among_padding_have_the_same_bits_as_in_a_full_batch(monkeypatch, fp8, design):
    kv, q, ids = normal(140_000, 576), query(V32, 64, 128), choose(64, 2048, 140_000)
    cache = pack_rows(kv, V32) if fp8 else kv
    full = launch(design.backend, q, cache, ids, None, V32, split=True, design=design)
    padding = torch.rand(64, device="cuda") < 0.7
    ids[padding] = -1
    poison_partials(monkeypatch)
    for _ in range(3):
        out, lse = launch(design.backend, q, cache, ids, None, V32, split=True, design=design)
        assert torch.equal(out[~padding], full[0][~padding]) and torch.equal(lse[~padding], full[1][~padding])
        assert not bool(out[padding].any()) and bool(lse[padding].isneginf().all())


@each_design
def test_a_query_that_is_not_a_number_stays_seen_behind_the_merge(fp8, design):
    kv, q, ids = normal(5000, 576), query(V32, 2, 128), choose(2, 2048, 5000)
    q[1, 70, 7], ids[:, 900:] = float("nan"), -1
    rows = pack_rows(kv, V32) if fp8 else kv
    out, lse = launch(design.backend, q, rows, ids, None, V32, split=True, design=design)
    assert bool(out[1, 70].isnan().all()) and bool(lse[1, 70].isnan())
    assert bool(out[0].isfinite().all()) and bool(out[1, 71].isfinite().all())


@pytest.mark.parametrize("name", ["hopper", "hopper half"])
def test_whole_blocks_give_the_bits_of_halves(name):
    kv, q, ids = normal(9000, 576), query(V32, 20, 128), choose(20, 2048, 9000)
    ids[0, 700:] = -1
    rows = pack_rows(kv, V32)
    halves, whole = FP8_DESIGNS[name], FP8_DESIGNS[f"{name} + whole blocks"]
    first = launch("hopper", q, rows, ids, None, V32, split=True, design=halves)
    second = launch("hopper", q, rows, ids, None, V32, split=True, design=whole)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("layout, heads", [(SMALL, 8), (SMOLLM, 9)], ids=["small", "smollm"])
def test_fp8_rows_of_small_widths_decode(layout, heads):
    kv, q, ids = normal(3000, layout.width), query(layout, 3, heads), choose(3, 1200, 3000)
    rows = pack_rows(kv, layout)
    expected = sparse_mla_reference(q, unpack_rows(rows, layout), ids, layout, 0.1)
    assert_close(launch("triton", q, rows, ids, None, layout, split=True), expected, BF16)


@each_design
def test_dense_decode_reads_ragged_pages(fp8, design):
    lengths = torch.tensor([0, 1, 63, 64, 65, 513, 5000, 20000], dtype=torch.int32, device="cuda")
    kv, q = normal(320 * 2, 64, 576), query(V32, len(lengths), 128)
    kv[0] = float("nan")
    cache = pack_rows(kv.flatten(0, 1), V32).view(640, 64, -1) if fp8 else kv
    pages = torch.full((len(lengths), 313), -1, dtype=torch.int32, device="cuda")
    for i, n in enumerate(lengths.tolist()):
        pages[i, : -(-n // 64)] = torch.randperm(639, device="cuda")[: -(-n // 64)].to(torch.int32) + 1
    rows = cache.flatten(0, 1)
    actual = launch(design.backend, q, rows, pages, lengths, V32, paged=True, split=True, design=design)
    assert_close(actual, dense_decode_reference(q, cache, pages, lengths, V32, 0.1), BF16)


@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("split", [False, True], ids=["prefill", "decode"])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_again(backend, split):
    kv, q, ids = normal(9000, 576), query(V32, 200, 128), choose(200, 2048, 9000)
    whole = launch(backend, q, kv, ids, None, V32, split=split)
    for _ in range(3):
        again = launch(backend, q, kv, ids, None, V32, split=split)
        assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    for i in (0, 77, 199):
        alone = launch(backend, q[i : i + 1], kv, ids[i : i + 1], None, V32, split=split)
        assert torch.equal(whole[0][i : i + 1], alone[0]) and torch.equal(whole[1][i : i + 1], alone[1])


@each_design
def test_dense_decode_does_not_depend_on_the_width_of_the_page_table(fp8, design):
    kv, q = normal(6400, 576), query(V32, 1, 128)
    pages = torch.randperm(100, device="cuda")[None].to(torch.int32)
    lengths = torch.tensor([1500], dtype=torch.int32, device="cuda")
    rows = pack_rows(kv, V32) if fp8 else kv
    options = {"paged": True, "split": True, "design": design}
    wide = launch(design.backend, q, rows, pages, lengths, V32, **options)
    narrow = launch(design.backend, q, rows, pages[:, :24].contiguous(), lengths, V32, **options)
    assert torch.equal(wide[0], narrow[0]) and torch.equal(wide[1], narrow[1])


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_many_tiles_over_a_long_cache_run_persistently(backend, fp8):
    kv, q, ids = normal(131072, 576), query(V32, 300, 128), choose(300, 256, 131072)
    rows = pack_rows(kv, V32) if fp8 else kv
    kv = unpack_rows(rows, V32, BF16) if fp8 else kv
    out, lse = launch(backend, q, rows, ids, None, V32)
    rows = torch.tensor([0, 131, 132, 299], device="cuda")
    assert bool(out.isfinite().all())
    assert_close((out[rows], lse[rows]), sparse_mla_reference(q[rows], kv, ids[rows], V32, 0.1), BF16)


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_rows_behind_two_to_the_31_elements_are_reached(backend):
    rows = 2**31 // 576 + 5000
    if torch.cuda.mem_get_info()[0] < 2 * rows * 576 * 2:
        pytest.skip("needs 10 GB of free GPU memory")
    kv = torch.zeros(rows, 576, dtype=BF16, device="cuda")
    kv[-4000:] = normal(4000, 576)
    q, ids = query(V32, 3, 64), choose(3, 300, 4000) + (rows - 4000)
    local = (ids - (rows - 4000)).to(torch.int32)
    expected = sparse_mla_reference(q, kv[-4000:], local, V32, 0.1)
    assert_close(launch(backend, q, kv, ids.to(torch.int32), None, V32), expected, BF16)


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_an_unchecked_id_outside_the_cache_counts_as_padding(backend):
    kv, q, ids = normal(500, 576), query(V32, 2, 64), choose(2, 100, 500)
    launcher(backend, kv)
    padded = ids.clone()
    ids[0, 50:], padded[0, 50:] = 500, -1
    wild = sparse_mla(q, kv, ids, V32, 0.1, check_ids=False, backend=backend)
    assert torch.equal(wild, sparse_mla(q, kv, padded, V32, 0.1, backend=backend))
    with pytest.raises(ValueError, match=r"expected ids in -1..499, got 500 at \[0, 50\]"):
        sparse_mla(q, kv, ids, V32, 0.1, backend=backend)


def test_the_public_functions_choose_a_kernel_and_agree_with_the_cpu():
    kv, q, ids = normal(400, SMALL.width, dtype=torch.float32), query(SMALL, 5, 8, torch.float32), choose(5, 60, 400)
    here = sparse_mla_lse(q, kv, ids, SMALL, 0.1)
    there = sparse_mla_lse(q.cpu(), kv.cpu(), ids.cpu(), SMALL, 0.1)
    torch.testing.assert_close(tuple(x.cpu() for x in here), there, rtol=1e-4, atol=1e-4)
    cache, pages = kv[:384].view(6, 64, -1), torch.arange(6, dtype=torch.int32, device="cuda").repeat(5, 1)
    lengths = torch.tensor([384, 1, 65, 0, 200], dtype=torch.int32, device="cuda")
    here = dense_decode(q, cache, pages, lengths, SMALL, 0.1)
    there = dense_decode(q.cpu(), cache.cpu(), pages.cpu(), lengths.cpu(), SMALL, 0.1)
    torch.testing.assert_close(tuple(x.cpu() for x in here), there, rtol=1e-4, atol=1e-4)


def test_hopper_is_refused_where_it_does_not_fit():
    kv, q, ids = normal(40, SMALL.width), query(SMALL, 1, 8), choose(1, 7, 40)
    with pytest.raises(ValueError, match="sparse_mla: expected for backend hopper"):
        sparse_mla(q, kv, ids, SMALL, 0.1, backend="hopper")


def test_positions_become_slots_of_their_pages():
    pages = torch.randperm(900, device="cuda").to(torch.int32).view(3, 300)
    ids = torch.randint(-1, 300 * 64, (3, 2050), device="cuda", dtype=torch.int32)
    assert torch.equal(page_slots(ids, pages), page_slots_reference(ids, pages))


def test_decode_runs_in_a_captured_graph():
    kv, q, ids = normal(3000, 576), query(V32, 2, 128), choose(2, 2048, 3000)
    expected = sparse_mla(q, kv, ids, V32, 0.1, decode=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_mla(q, kv, ids, V32, 0.1, decode=True)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)

"""Scores, top-k and attention mass on a GPU against their float32 references."""

import pytest
import torch

from kernels.attention_mass import attention_mass, attention_mass_paged, attention_mass_reference
from kernels.index_scores import index_scores, index_scores_reference
from kernels.index_scores_paged import (
    PAGE,
    index_scores_paged,
    index_scores_paged_reference,
    page_bytes,
    write_index_pages,
)
from kernels.index_scores_paged_triton import DESIGNS as PAGED_DESIGNS
from kernels.index_scores_paged_triton import index_scores_paged_triton
from kernels.index_scores_triton import DESIGNS as SCORE_DESIGNS
from kernels.index_scores_triton import index_scores_triton
from kernels.topk import topk, topk_mask, topk_reference
from kernels.topk_triton import DESIGNS as TOPK_DESIGNS
from kernels.topk_triton import topk_triton
from tests.gpu.kernel_errors import SUMS, poison_memory, relative_error
from tests.kernels.test_topk import KINDS, adversarial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned():
    poison_memory()


def index_inputs(s, t, h, d, dtype):
    q, k = torch.randn(s, h, d, device="cuda"), torch.randn(t, d, device="cuda")
    return q.to(dtype), k.to(dtype), torch.randn(s, h, device="cuda")


@pytest.mark.parametrize("dtype", [E4M3, BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("s, t, h, d", [(1, 1, 4, 16), (3, 129, 64, 128), (130, 4001, 9, 48), (33, 20001, 32, 128)])
def test_index_scores_match_the_reference(s, t, h, d, dtype):
    q, k, w = index_inputs(s, t, h, d, dtype)
    start, scale = max(0, t - s), torch.rand(t, device="cuda")
    if t < s:
        pytest.skip("more queries than keys")
    for k_scale in (None, scale):
        actual = index_scores(q, k, w, start, k_scale)
        assert relative_error(actual, index_scores_reference(q, k, w, start, k_scale)) < SUMS[dtype]


@pytest.mark.parametrize("dtype", [E4M3, BF16])
def test_index_scores_of_any_positions_and_rows_without_a_key(dtype):
    q, k, w = index_inputs(70, 3000, 64, 128, dtype)
    positions = torch.randint(-1, 3100, (70,), device="cuda")
    positions[5] = -1
    actual = index_scores(q, k, w, positions)
    assert relative_error(actual, index_scores_reference(q, k, w, positions)) < SUMS[dtype]
    assert bool(actual[5].isneginf().all())


@pytest.mark.parametrize("dtype", [E4M3, BF16, torch.float32])
def test_an_index_score_has_the_same_bits_in_every_company(dtype):
    q, k, w = index_inputs(256, 9000, 64, 128, dtype)
    whole = index_scores(q, k, w, 8744)
    for rows, keys in ((slice(1, 2), 8746), (slice(17, 90), 8834), (slice(0, 256), 9000)):
        part = index_scores(q[rows], k[:keys], w[rows], 8744 + rows.start)
        assert torch.equal(part, whole[rows, :keys])
    assert torch.equal(index_scores(q, k, w, 8744), whole)


@pytest.mark.parametrize("design", SCORE_DESIGNS)
@pytest.mark.parametrize("s, t", [(1, 70), (7, 1025), (130, 4001), (33, 20_001)])
def test_every_design_of_index_scores_matches_the_reference(design, s, t):
    q, k, w = index_inputs(s, t, 64, 128, E4M3)
    scale, positions = torch.rand(t, device="cuda"), torch.randint(-1, t + 100, (s,), device="cuda")
    for start, k_scale in ((t - s, None), (t - s, scale), (positions, scale)):
        actual = index_scores_triton(q, k, w, start, k_scale, design=design)
        assert relative_error(actual, index_scores_reference(q, k, w, start, k_scale)) < SUMS[E4M3]


@pytest.mark.parametrize("design", SCORE_DESIGNS)
def test_a_score_has_the_same_bits_in_every_company_in_every_design(design):
    q, k, w = index_inputs(256, 9000, 64, 128, E4M3)
    whole = index_scores_triton(q, k, w, 8744, design=design)
    for rows, keys in ((slice(1, 2), 8746), (slice(17, 90), 8834), (slice(0, 256), 9000)):
        part = index_scores_triton(q[rows], k[:keys], w[rows], 8744 + rows.start, design=design)
        assert torch.equal(part, whole[rows, :keys])


@pytest.mark.parametrize("s, t", [(1, 70), (50, 9001), (301, 5000)])
def test_hopper_index_scores_write_nothing_beside_their_rows(s, t):
    hopper = pytest.importorskip("kernels.index_scores_hopper", reason="this Triton has no Gluon")
    q, k, w = index_inputs(s, t, 64, 128, E4M3)
    if not hopper.fits(q, k):
        pytest.skip("needs a Hopper GPU and the tested release of Triton")
    scale, anywhere = torch.rand(t, device="cuda"), torch.randint(-1, t + 100, (s,), device="cuda")
    for start, k_scale in ((t - s, scale), (0, None), (anywhere, scale)):
        rows = torch.full((s + 2, -(-t // 32) * 32), float("nan"), device="cuda")
        hopper.index_scores_hopper(q, k, w, start, k_scale, rows[1:-1, :t])
        assert bool(rows[0].isnan().all()) and bool(rows[-1].isnan().all()) and bool(rows[:, t:].isnan().all())
        assert relative_error(rows[1:-1, :t], index_scores_reference(q, k, w, start, k_scale)) < SUMS[E4M3]


def known(scores, lengths):
    """Scores that the kernel has written, and -inf behind them."""
    here = torch.arange(scores.shape[1], device=scores.device) < lengths.to(scores.device)[:, None]
    return torch.where(here, scores, float("-inf"))


@pytest.mark.parametrize("h, d", [(64, 128), (32, 128), (5, 64), (64, 256)])
def test_paged_index_scores_match_the_reference(h, d):
    lengths = torch.tensor([5000, 0, 64, 1, 4097, 65], dtype=torch.int32)
    num_pages = 6 * 80
    pages = torch.zeros(num_pages, page_bytes(d), dtype=torch.uint8)
    slots = torch.arange(num_pages * PAGE)
    write_index_pages(pages, slots, torch.randn(len(slots), d).to(E4M3), torch.rand(len(slots)))
    tables = torch.randperm(num_pages).view(6, 80).to(torch.int32)
    q, w = torch.randn(6, h, d).to(E4M3), torch.randn(6, h)
    expected = index_scores_paged_reference(q, pages, w, tables, lengths, 5001)
    on_gpu = [x.cuda() for x in (q, pages, w, tables, lengths)]
    actual = known(index_scores_paged(*on_gpu, 5001), lengths)
    assert relative_error(actual, expected) < SUMS[E4M3]
    alone = index_scores_paged(*(x[4:5] if i != 1 else x for i, x in enumerate(on_gpu)), 5001)
    assert torch.equal(alone[0, :4097], actual[4, :4097])


def paged_inputs(h, d, lengths, pages_each, gap=0):
    """q, pages, w, tables, lengths; pages lie gap bytes apart, and tables name none of them behind a length."""
    b, num_pages = len(lengths), len(lengths) * pages_each
    pages = torch.zeros(num_pages, page_bytes(d), dtype=torch.uint8)
    slots = torch.arange(num_pages * PAGE)
    write_index_pages(pages, slots, torch.randn(len(slots), d).to(E4M3), torch.rand(len(slots)))
    apart = torch.full((num_pages, page_bytes(d) + gap), 0x7F, dtype=torch.uint8)  # NaN
    apart[:, : page_bytes(d)] = pages
    lengths = torch.tensor(lengths, dtype=torch.int32)
    tables = torch.randperm(num_pages).view(b, pages_each)
    tables = torch.where(torch.arange(pages_each) * PAGE < lengths[:, None], tables, 1 << 30).to(torch.int32)
    return torch.randn(b, h, d).to(E4M3), apart[:, : page_bytes(d)], torch.randn(b, h), tables, lengths


def on_gpu(q, pages, w, tables, lengths):
    """The same there; strides of pages stay."""
    width = pages.shape[1]
    base = pages.as_strided((pages.shape[0], pages.stride(0)), (pages.stride(0), 1)).cuda()
    return q.cuda(), base[:, :width], w.cuda(), tables.cuda(), lengths.cuda()


@pytest.mark.parametrize("design", PAGED_DESIGNS)
@pytest.mark.parametrize("h, d, gap", [(64, 128, 0), (64, 128, 512), (32, 128, 16), (5, 64, 0)])
def test_pages_scored_by_design_match_the_reference_and_nothing_is_written_behind_a_length(
    monkeypatch, design, h, d, gap
):
    def nans(s, t, device):
        return torch.full((s, -(-t // 32) * 32), float("nan"), device=device)[:, :t]

    monkeypatch.setattr("kernels.index_scores_paged_triton.empty_scores", nans)
    inputs = paged_inputs(h, d, [5000, 0, 64, 1, 4097, 65, 0], 79, gap)
    lengths = inputs[-1]
    q, pages, w, tables, on_device = on_gpu(*inputs)
    for num_keys in (5000, 5001, 79 * PAGE):
        expected = index_scores_paged_reference(*inputs, num_keys)
        scores = index_scores_paged_triton(q, pages, w, tables, on_device, num_keys, design)
        assert relative_error(known(scores, lengths), expected) < SUMS[E4M3]
        behind = torch.arange(num_keys) >= lengths[:, None]
        assert bool(scores.cpu()[behind].isnan().all())
    alone = index_scores_paged_triton(q[4:5], pages, w[4:5], tables[4:5], on_device[4:5], 5001, design)
    assert torch.equal(alone[0, :4097], scores[4, :4097])


@pytest.mark.parametrize("design", PAGED_DESIGNS)
@pytest.mark.parametrize("batch, length", [(1, 131_072), (3, 40_000), (64, 9000), (128, 3000)])
def test_pages_scored_by_design_are_right_where_programs_fill_the_machine(design, batch, length):
    lengths = [length - 37 * i % length if i % 5 != 1 else 0 for i in range(batch)]
    inputs = paged_inputs(64, 128, lengths, -(-length // PAGE))
    scores = index_scores_paged_triton(*on_gpu(*inputs), length, design)
    expected = index_scores_paged_reference(*inputs, length)
    assert relative_error(known(scores, inputs[-1]), expected) < SUMS[E4M3]
    for _ in range(3):
        again = index_scores_paged_triton(*on_gpu(*inputs), length, design)
        assert torch.equal(known(again, inputs[-1]), known(scores, inputs[-1]))


@pytest.mark.parametrize("lengths", [[20_000, 0, 64, 1, 4097, 65], [20_000], [8192] * 64])
def test_pages_scored_by_design_have_the_same_bits_in_every_design(lengths):
    num_keys = max(lengths)
    there = on_gpu(*paged_inputs(64, 128, lengths, -(-num_keys // PAGE)))
    first, *others = (known(index_scores_paged_triton(*there, num_keys, name), there[-1]) for name in PAGED_DESIGNS)
    assert others
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("h, d", [(64, 128), (4, 64), (5, 32)])
def test_paged_index_scores_of_plain_keys_match_the_reference(h, d, dtype):
    lengths = torch.tensor([5000, 0, 64, 1, 4097, 65], dtype=torch.int32)
    pages, tables = torch.randn(480, PAGE, d).to(dtype), torch.randperm(480).view(6, 80).to(torch.int32)
    q, w = torch.randn(6, h, d).to(dtype), torch.randn(6, h)
    expected = index_scores_paged_reference(q, pages, w, tables, lengths, 5001)
    on_gpu = [x.cuda() for x in (q, pages, w, tables, lengths)]
    actual = known(index_scores_paged(*on_gpu, 5001), lengths)
    assert relative_error(actual, expected) < SUMS[dtype]
    alone = index_scores_paged(*(x[4:5] if i != 1 else x for i, x in enumerate(on_gpu)), 5001)
    assert torch.equal(alone[0, :4097], actual[4, :4097])


@pytest.mark.parametrize("place", [0, 37, 63])
@pytest.mark.parametrize("length", [70, 5000, 32_700])
def test_one_row_among_padding_is_scored_and_chosen_as_if_alone(place, length):
    """Rows of length 0 have pages outside of the cache: nothing of them is read, and their scores stay NaN."""
    pages = torch.zeros(513, page_bytes(128), dtype=torch.uint8)
    write_index_pages(pages, torch.arange(513 * PAGE), torch.randn(513 * PAGE, 128).to(E4M3), torch.rand(513 * PAGE))
    tables = torch.full((64, 512), 1 << 30, dtype=torch.int32)
    tables[place] = torch.randperm(513)[:512].to(torch.int32)
    lengths = torch.zeros(64, dtype=torch.int32)
    lengths[place] = length
    q, w = torch.randn(64, 64, 128).to(E4M3), torch.randn(64, 64)
    q, pages, w, tables, lengths = (x.cuda() for x in (q, pages, w, tables, lengths))
    one = slice(place, place + 1)
    poison_memory()
    among = index_scores_paged(q, pages, w, tables, lengths, 512 * PAGE)
    poison_memory()
    alone = index_scores_paged(q[one], pages, w[one], tables[one], lengths[one], 512 * PAGE)
    assert torch.equal(known(among, lengths)[one], known(alone, lengths[one]))
    ids = topk(among, 2048, lengths)
    assert torch.equal(ids[one], topk(alone, 2048, lengths[one]))
    assert bool((ids[lengths == 0] == -1).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, cols, k", [(1, 1, 1), (3, 4097, 2048), (300, 9001, 2048), (5, 131_072, 2048)])
def test_topk_is_the_stable_sort_of_visible_scores(kind, rows, cols, k):
    scores = adversarial(kind, rows, cols)
    visible = torch.arange(cols - rows + 1, cols + 1).clamp_min(0)
    expected = topk_reference(scores, k, visible)
    for _ in range(3):
        poison_memory(1 << 26)
        assert torch.equal(topk(scores.cuda(), k, visible.cuda()).cpu(), expected)


def test_topk_of_160k_scores_in_narrow_ranges():
    scores = torch.stack([torch.randn(163_840) * 1e-6 + 1, torch.rand(163_840).round(decimals=2), torch.randn(163_840)])
    scores[2] = scores[2].sort().values  # neighbours alike: the sample's worst case
    visible = torch.tensor([163_840, 163_001, 160_003])
    assert torch.equal(topk(scores.cuda(), 2048, visible.cuda()).cpu(), topk_reference(scores, 2048, visible))


def test_topk_of_ragged_rows_pads_with_minus_one():
    scores = torch.randn(400, 6000)
    visible = torch.randint(0, 6001, (400,))
    visible[:4] = torch.tensor([0, 1, 2048, 2049])
    expected = topk_reference(scores, 2048, visible)
    assert torch.equal(topk(scores.cuda(), 2048, visible.cuda()).cpu(), expected)
    mask = topk_mask(scores.cuda(), 2048, visible.cuda()).cpu()
    assert torch.equal(mask, topk_mask(scores, 2048, visible))


def test_topk_reads_rows_that_are_not_aligned():
    scores = torch.randn(9, 5003)
    visible = torch.full((9,), 5003)
    expected = topk_reference(scores, 100, visible)
    view = torch.nn.functional.pad(scores, (3, 2)).cuda()[:, 3:5006]
    assert torch.equal(topk(view, 100, visible.cuda()).cpu(), expected)
    assert torch.equal(topk(scores.cuda(), 100, visible.cuda()).cpu(), expected)


@pytest.mark.parametrize("design", TOPK_DESIGNS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rows, cols, k",
    [(1, 20_001, 2048), (7, 131_072, 2048), (64, 33_001, 2048), (100, 8192, 2048), (300, 8193, 2048), (600, 3000, 100)],
)
def test_every_design_of_topk_is_the_stable_sort(design, kind, rows, cols, k):
    scores = adversarial(kind, rows, cols)
    visible = torch.randint(0, cols + 1, (rows,), dtype=torch.int32)
    visible[: rows // 2 + 1] = cols
    expected = topk_reference(scores, k, visible)
    for _ in range(2):
        poison_memory(1 << 26)
        assert torch.equal(topk_triton(scores.cuda(), k, visible.cuda(), design).cpu(), expected)


@pytest.mark.parametrize("design", TOPK_DESIGNS)
def test_every_design_of_topk_takes_sorted_rows_and_late_winners(design):
    scores = torch.randn(4, 100_000)
    scores[0] = scores[0].sort().values  # all winners at the end, in one or two parts
    scores[1] = scores[1].sort(descending=True).values
    scores[2, 70_000:71_000] += 10
    visible = torch.tensor([100_000, 99_999, 100_000, 8193], dtype=torch.int32)
    for k in (1, 100, 2048, 5000):
        expected = topk_reference(scores, k, visible)
        assert torch.equal(topk_triton(scores.cuda(), k, visible.cuda(), design).cpu(), expected)


@pytest.mark.parametrize("design", TOPK_DESIGNS)
def test_every_design_of_topk_takes_a_padded_batch_of_decode(design):
    scores = torch.randn(64, 131_072)
    visible = torch.zeros(64, dtype=torch.int32)
    visible[:7] = torch.tensor([131_072, 131_071, 70_001, 8192, 8193, 2049, 2048])
    expected = topk_reference(scores, 2048, visible)
    for _ in range(2):
        poison_memory(1 << 26)
        assert torch.equal(topk_triton(scores.cuda(), 2048, visible.cuda(), design).cpu(), expected)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("s, t, h, g, d", [(1, 1, 16, 1, 32), (5, 777, 128, 1, 576), (33, 9001, 9, 3, 64)])
def test_attention_mass_matches_the_reference(s, t, h, g, d, dtype):
    q, k = torch.randn(s, h, d, device="cuda").to(dtype), torch.randn(t, g, d, device="cuda").to(dtype)
    positions = torch.randint(-1, t, (s,), device="cuda")
    positions[0] = t - 1
    actual = attention_mass(q, k, d**-0.5, positions)
    assert relative_error(actual, attention_mass_reference(q, k, d**-0.5, positions)) < 10 * SUMS[dtype]
    assert torch.equal(actual[:1], attention_mass(q[:1], k, d**-0.5, positions[:1]))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("h, g, d", [(8, 1, 160), (128, 1, 576), (9, 3, 64)])
def test_paged_attention_mass_is_that_of_each_sequences_own_keys(h, g, d, dtype):
    k = torch.randn(400 * PAGE, g, d, device="cuda").to(dtype)
    tables = torch.randperm(400, device="cuda").view(4, 100).to(torch.int32)
    q = torch.randn(4, h, d, device="cuda").to(dtype)
    lengths = torch.tensor([6400, 0, 4097, 1], dtype=torch.int32, device="cuda")
    mass = attention_mass_paged(q, k, d**-0.5, tables, lengths)
    for i, length in enumerate(lengths.tolist()):
        own = k.unflatten(0, (-1, PAGE))[tables[i].long()].flatten(0, 1)[:length]
        assert not mass[i, length:].any()
        if length:
            expected = attention_mass_reference(q[i : i + 1], own, d**-0.5, length - 1)[0]
            assert relative_error(mass[i, :length], expected) < 10 * SUMS[dtype]
    alone = attention_mass_paged(q[2:3], k, d**-0.5, tables[2:3, :65].contiguous(), lengths[2:3])
    assert torch.equal(alone[0], mass[2, : 65 * PAGE])

"""The kernels of a prompt's chunk in the MHA form, causal and under a mask, on a GPU against float32 references."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
from kernels.dense_mla import dense_mla, dense_mla_reference
from kernels.dense_prefill import causal_by_cudnn, cudnn_fits, hopper_fits, merge_two
from kernels.masked_mha_triton import masked_mha

# largest ||out - reference|| / ||reference||; reasons in test_attention_kernels.py
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 8e-4, torch.float32: 1e-5}
LSE_BOUND = 2e-2  # absolute, natural log: half-precision products of a few hundred terms
BF16 = torch.bfloat16


def normal(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda").to(dtype)


def assert_close(actual, expected):
    out, lse = actual
    wanted, wanted_lse = expected
    assert bool(out.isfinite().all())
    assert float((out.float() - wanted).norm() / wanted.norm()) < BOUNDS[out.dtype]
    none = wanted_lse.isneginf()
    assert torch.equal(lse.isneginf(), none)
    assert float((lse - wanted_lse)[~none].abs().max()) < LSE_BOUND
    assert not bool(out[none].any())


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 129), (130, 333), (300, 300)])
@pytest.mark.parametrize("heads, groups, dim, value_dim", [(4, 4, 192, 128), (6, 2, 48, 80), (5, 1, 576, 512)])
def test_masked_attention_matches_the_reference(dtype, queries, keys, heads, groups, dim, value_dim):
    q, start = normal(queries, heads, dim, dtype=dtype), keys - queries
    k, v = normal(keys, groups, dim, dtype=dtype), normal(keys, groups, value_dim, dtype=dtype)
    mask = torch.rand(queries, keys, device="cuda") < 0.4
    mask[:, 0] = True
    mask[queries // 2] = queries == 1
    out = torch.full((queries + 1, heads, value_dim), float("nan"), dtype=dtype, device="cuda")
    lse = torch.full((queries + 1, heads), float("nan"), device="cuda")
    masked_mha(q, k, v, 0.1, start, mask, out[:-1], lse[:-1])
    assert bool(out[-1].isnan().all()) and bool(lse[-1].isnan().all())
    wanted = dense_mla_reference(q, k, v, 0.1, start, mask).nan_to_num(0.0)
    assert float((out[:-1].float() - wanted).norm() / wanted.norm()) < BOUNDS[dtype]
    if queries > 1:
        assert bool(lse[queries // 2].isneginf().all()) and not bool(out[queries // 2].any())


@pytest.mark.parametrize("backend", ["cudnn", "hopper", "triton"])
@pytest.mark.parametrize("queries, start", [(256, 0), (256, 512), (300, 77), (1, 400)])
@pytest.mark.parametrize("groups", [1, 8])
def test_dense_prefill_is_causal_from_the_lower_right(backend, queries, start, groups):
    q, k, v = normal(queries, 8, 192), normal(start + queries, groups, 192), normal(start + queries, groups, 128)
    if backend != "triton" and not (cudnn_fits if backend == "cudnn" else hopper_fits)(q, k, v):
        pytest.skip(f"needs a Hopper GPU for {backend}")
    actual = dense_mla(q, k, v, 0.1, start, backend=backend)
    wanted = dense_mla_reference(q, k, v, 0.1, start)
    assert float((actual.float() - wanted).norm() / wanted.norm()) < BOUNDS[BF16]


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("queries, start", [(256, 0), (300, 77), (129, 1000)])
def test_every_backend_attends_under_a_mask(backend, queries, start):
    q, k, v = normal(queries, 8, 192), normal(start + queries, 8, 192), normal(start + queries, 8, 128)
    if backend == "hopper" and not hopper_fits(q, k, v):
        pytest.skip("needs a Hopper GPU")
    mask = torch.rand(queries, start + queries, device="cuda") < 0.3
    mask[:, 0] = True
    actual = dense_mla(q, k, v, 0.1, start, mask, backend=backend)
    wanted = dense_mla_reference(q, k, v, 0.1, start, mask)
    assert float((actual.float() - wanted).norm() / wanted.norm()) < BOUNDS[BF16]


def mha_inputs(queries, keys, heads, groups):
    """As the model holds them: values are half of a projection's columns."""
    return normal(queries, heads, 192), normal(keys, groups, 192), normal(keys, groups, 256)[..., 128:]


def launch_mha(q, k, v, start, mask=None, **design):
    """The Gluon kernel; outputs lie between NaN and start as NaN."""
    hopper = pytest.importorskip("kernels.mha_hopper", reason="this Triton has no Gluon")
    if not hopper.fits(q, k, v):
        pytest.skip("needs a Hopper GPU and the tested release of Triton")
    s, h, _ = q.shape
    outs = torch.full((s + 2, h, 128), float("nan"), dtype=BF16, device="cuda")
    lses = torch.full((s + 2, h), float("nan"), device="cuda")
    hopper.mha_hopper(q, k, v, 0.1, start, mask, outs[1:-1], lses[1:-1], **design)
    torch.cuda.synchronize()
    for whole in (outs, lses):
        assert bool(whole[0].isnan().all()) and bool(whole[-1].isnan().all())
    return outs[1:-1], lses[1:-1]


def mha_reference(q, k, v, start, mask=None):
    """(out, lse) in float32, head by head; a query without a key: zeros and -inf."""
    s, h, _ = q.shape
    t, g, _ = k.shape
    seen = torch.arange(t, device="cuda")[None, :] <= start + torch.arange(s, device="cuda")[:, None]
    seen = seen if mask is None else seen & mask
    out, lse = torch.empty(s, h, 128, device="cuda"), torch.empty(s, h, device="cuda")
    for head in range(h):
        group = head // (h // g)
        scores = (q[:, head].float() @ k[:, group].float().T * 0.1).masked_fill(~seen, float("-inf"))
        lse[:, head] = scores.logsumexp(1)
        out[:, head] = scores.softmax(1).nan_to_num(0.0) @ v[:, group].float()
    return out, lse


MHA_DESIGNS = [{}, {"in_turns": False}, {"persistent": True}]


@pytest.mark.parametrize("design", MHA_DESIGNS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize(
    "queries, keys", [(1, 1), (1, 129), (64, 64), (65, 65), (128, 4224), (130, 333), (300, 300), (1000, 1000)]
)
@pytest.mark.parametrize("heads, groups", [(1, 1), (6, 2), (8, 8)])
def test_mha_on_hopper_matches_the_reference(queries, keys, heads, groups, masked, design):
    q, k, v = mha_inputs(queries, keys, heads, groups)
    mask = None
    if masked:
        mask = torch.rand(queries, keys, device="cuda") < 0.2
        mask[:, 128:256] = False  # a tile of nothing
        mask[queries // 2] = queries == 1
        mask[queries // 3, : keys // 2] = False
        mask[: queries // 4, :128] = False
    actual = launch_mha(q, k, v, keys - queries, mask, **design)
    if masked and not bool((mask & torch.ones_like(mask).tril(keys - queries)).any()):
        assert not bool(actual[0].any()) and bool(actual[1].isneginf().all())
        return
    assert_close(actual, mha_reference(q, k, v, keys - queries, mask))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_mha_on_hopper_runs_many_tiles_of_128_heads(masked):
    """More tiles of work than programs, so that phases and parities go on from one to the next."""
    q, k, v = mha_inputs(600, 2900, 128, 128)
    mask = torch.rand(600, 2900, device="cuda") < 0.5 if masked else None
    actual = launch_mha(q, k, v, 2300, mask)
    assert_close(actual, mha_reference(q, k, v, 2300, mask))
    for design in MHA_DESIGNS * 2:
        again = launch_mha(q, k, v, 2300, mask, **design)
        assert torch.equal(actual[0], again[0]) and torch.equal(actual[1], again[1])


def test_mha_on_hopper_takes_a_slice_of_heads_and_large_scores():
    q, k, v = mha_inputs(200, 900, 16, 16)
    q = q * 30  # weights go from 0 to 1 and the running maximum moves far
    actual = launch_mha(q[:, 4:7], k[:, 4:7], v[:, 4:7], 700)
    assert_close(actual, mha_reference(q[:, 4:7], k[:, 4:7], v[:, 4:7], 700))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("first, last", [(0, 512), (128, 384), (384, 640), (300, 301), (77, 333)])
def test_mha_on_hopper_gives_a_row_the_same_bits_in_any_chunk(first, last, masked):
    q, k, v = mha_inputs(640, 1640, 8, 8)
    mask = torch.rand(640, 1640, device="cuda") < 0.4 if masked else None
    whole = launch_mha(q, k, v, 1000, mask)
    keys = 1000 + last
    part = launch_mha(
        q[first:last], k[:keys], v[:keys], 1000 + first, None if mask is None else mask[first:last, :keys]
    )
    assert torch.equal(whole[0][first:last], part[0]) and torch.equal(whole[1][first:last], part[1])


def test_mha_on_hopper_is_refused_where_it_does_not_fit():
    q = normal(4, 2, 64)
    with pytest.raises(ValueError, match=r"dense_mla: expected backend .* got hopper"):
        dense_mla(q, q, q, 0.1, 0, backend="hopper")


def test_cudnns_output_lies_as_its_queries_do():
    """So nobody copies it."""
    q, k, v = normal(300, 8, 192), normal(1100, 8, 192), normal(1100, 8, 128)
    if not cudnn_fits(q, k, v):
        pytest.skip("needs a Hopper GPU for cuDNN's attention")
    assert causal_by_cudnn(q, k, v, 0.1, 800)[0].is_contiguous()


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("s, h, c", [(1, 1, 8), (77, 5, 80), (4096, 128, 128)])
def test_dense_prefill_is_merged_without_nan_where_a_side_saw_no_key(dtype, s, h, c):
    sides = [(normal(s, h, c, dtype=dtype), torch.randn(h, s, device="cuda").T * 3) for _ in range(2)]
    rows = torch.arange(s, device="cuda") % 4  # 0: both sides see keys, 1 and 2: one of them, 3: none
    for side, (out, lse) in enumerate(sides, 1):
        lse[(rows != 0) & (rows != side)] = float("-inf")
        out[lse.isneginf()] = float("nan")
    (a, a_lse), (b, b_lse) = ((out.cpu().float(), lse.cpu()) for out, lse in sides)
    expected = merge_two(a, a_lse, b, b_lse)
    assert_close(merge_two(*sides[0], *sides[1]), [x.cuda() for x in expected])

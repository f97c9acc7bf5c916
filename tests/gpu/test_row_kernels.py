"""Kernels that read each row once, on a GPU, against their references: index queries and keys."""

import pytest
import torch

from kernels.fp8 import dequantize_e4m3
from kernels.index_rows import (
    IndexNorm,
    IndexRope,
    _by_torch,
    index_keys,
    index_queries,
    index_rows_reference,
    write_index_keys,
)
from kernels.index_scores_paged import PAGE, page_bytes, read_index_pages
from tests.gpu.kernel_errors import poison_memory, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned():
    poison_memory()


def tables(n, r):
    angles = torch.rand(n, r // 2, device="cuda") * 6
    return angles.cos(), angles.sin()


def norm(d, dtype):
    return IndexNorm(torch.rand(d, device="cuda").to(dtype) + 0.5, torch.randn(d, device="cuda").to(dtype), 1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("n, h, d", [(1, 64, 128), (37, 64, 128), (301, 3, 64), (5, 1, 16)])
def test_fp8_queries_are_the_torch_forms_but_for_ties(n, h, d, dtype, interleaved):
    """Two roundings to bfloat16 of sums in another order: now and then a value, or a scale, goes to its neighbour."""
    q = torch.randn(n, h + 1, d + 16, device="cuda")[:, 1:, :d].to(dtype)
    wide = torch.randn(n, h, d + 16, device="cuda").to(dtype)
    rope, weights = IndexRope(*tables(n, d // 2), interleaved), torch.rand(n, h, device="cuda") + 0.5
    for rows in (q, wide[..., 8 : d + 8]):
        values, scaled = index_queries(rows, weights, rope, "fp8")
        expected, scales = _by_torch(rows, rope, "fp8", None)
        same_scale = scaled == weights * scales
        assert same_scale.float().mean() > 0.99
        different = (values.view(torch.uint8) != expected.view(torch.uint8))[same_scale]
        assert different.float().mean() < 0.01
        # one step of three mantissa bits, and what the last bit of a bfloat16 input of below 8 turns into
        size = torch.maximum(values.float().abs(), expected.float().abs())
        near = (values.float() - expected.float()).abs() <= size * 0.13 + 0.5
        assert bool(near[same_scale].all())
        exact = index_rows_reference(rows, rope, "fp8", None)
        assert relative_error(values.float() * (scaled / weights)[..., None], exact) < 1e-2


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype, limit", [("bfloat16", 1e-3), ("float32", 1e-6)])
@pytest.mark.parametrize("n, h, d, r", [(37, 5, 128, 64), (3, 2, 48, 8), (2, 2, 32, 0)])
def test_plain_queries_match_the_reference(n, h, d, r, dtype, limit, interleaved):
    q, rope = torch.randn(n, h, d, device="cuda"), IndexRope(*tables(n, r), interleaved)
    weights = torch.randn(n, h, device="cuda")
    values, same = index_queries(q, weights, rope, dtype)
    assert same is weights
    assert relative_error(values, index_rows_reference(q, rope, dtype, None)) < limit


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype, limit", [("fp8", 1e-2), ("bfloat16", 1e-3), ("float32", 1e-5)])
@pytest.mark.parametrize("n, d, r", [(1, 128, 64), (69, 128, 64), (130, 64, 64)])
def test_keys_match_the_reference_and_reach_their_pages(n, d, r, dtype, limit, interleaved):
    k, rope, given = torch.randn(n, d, device="cuda") * 3 + 1, IndexRope(*tables(n, r), interleaved), norm(d, BF16)
    keys, scales = index_keys(k, given, rope, dtype)
    exact = keys if scales is None else dequantize_e4m3(keys, scales[:, None], d)
    assert relative_error(exact, index_rows_reference(k[:, None], rope, dtype, given)[:, 0]) < limit
    table = torch.tensor([3, 1, 4], device="cuda")
    slots = (table[:, None] * PAGE + torch.arange(PAGE, device="cuda")).flatten()[:n].contiguous()
    if dtype == "fp8":
        pages = torch.zeros(5, page_bytes(d), dtype=torch.uint8, device="cuda")
        write_index_keys(pages, slots, k, given, rope, dtype)
        values, read = read_index_pages(pages, table, n)
        assert torch.equal(values.view(torch.uint8), keys.view(torch.uint8)) and torch.equal(read, scales)
    else:
        pages = torch.zeros(5, PAGE, d, dtype=keys.dtype, device="cuda")
        write_index_keys(pages, slots, k, given, rope, dtype)
        assert torch.equal(pages.flatten(0, 1)[slots], keys)


def test_an_index_row_has_the_same_bits_in_every_company():
    q, weights = torch.randn(700, 64, 128, device="cuda").to(BF16), torch.randn(700, 64, device="cuda")
    cos, sin = tables(700, 64)
    values, scaled = index_queries(q, weights, IndexRope(cos, sin, False), "fp8")
    for part in (slice(0, 1), slice(5, 69), slice(600, 700)):
        some = index_queries(q[part].clone(), weights[part].clone(), IndexRope(cos[part], sin[part], False), "fp8")
        assert torch.equal(some[0].view(torch.uint8), values[part].view(torch.uint8))
        assert torch.equal(some[1], scaled[part])

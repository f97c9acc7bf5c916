"""The row kernel of the indexer in Triton's interpreter: float16 takes bfloat16's place, casts to FP8 are inexact."""

import pytest
import torch

from kernels.index_rows import IndexNorm, IndexRope, index_rows_reference
from kernels.index_rows_triton import index_rows_triton, tl
from kernels.index_scores_paged import PAGE, page_bytes


def inputs(n, h, d, r, interleaved, dtype=torch.float32):
    x = torch.randn(n, h + 1, d + 8)[:, 1:, :d].to(dtype)
    angles = torch.rand(n, r // 2) * 6
    return x, IndexRope(angles.cos(), angles.sin(), interleaved)


def norm(d):
    return IndexNorm(torch.rand(d) + 0.5, torch.randn(d), 1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "n, h, d, r", [(3, 1, 16, 16), (37, 5, 64, 32), (2, 70, 128, 64), (5, 2, 48, 8), (3, 2, 32, 0)]
)
@pytest.mark.parametrize("normed", [False, True])
def test_rows_in_float32_match_the_reference(n, h, d, r, interleaved, normed):
    x, rope = inputs(n, h, d, r, interleaved)
    given = norm(d) if normed else None
    values, scales = index_rows_triton(x, rope, "float32", given, None)
    assert scales is None
    torch.testing.assert_close(values, index_rows_reference(x, rope, "float32", given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n, h, d, r", [(3, 1, 16, 16), (37, 5, 64, 32), (2, 70, 128, 64), (1, 2, 256, 64)])
def test_fp8_rows_are_rotated_and_their_scales_are_the_next_power_of_two(n, h, d, r, interleaved):
    x, rope = inputs(n, h, d, r, interleaved, torch.float16)
    x *= torch.logspace(-2, 2, n)[:, None, None]
    weights = torch.randn(n, h)
    values, scales = index_rows_triton(x, rope, "fp8", None, weights, rounded=tl.float16)
    expected = index_rows_reference(x, rope, "fp8", None)
    scales = scales / weights
    assert torch.equal(torch.log2(scales), torch.log2(scales).round())
    actual = values.float() * scales[..., None]
    # the interpreter's cast errs for a few below powers of two
    close = (actual - expected).abs() <= expected.abs() * 2**-3 + scales[..., None] * 2**-8
    assert close.float().mean() > 0.9


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_go_to_their_slots_and_nowhere_else(interleaved):
    n, d = 37, 64
    x, rope = inputs(n, 1, d, 32, interleaved)
    slots = torch.randperm(3 * PAGE)[:n]
    pages = torch.full((3, page_bytes(d)), 7, dtype=torch.uint8)
    given = IndexNorm(torch.ones(d), torch.zeros(d), 1e-6)
    values, scales = index_rows_triton(x, rope, "fp8", given, None, rounded=tl.float16)
    index_rows_triton(x, rope, "fp8", given, None, (pages, slots), rounded=tl.float16)
    expected = torch.full((3, page_bytes(d)), 7, dtype=torch.uint8)
    page, place = slots // PAGE, slots % PAGE
    expected[:, : PAGE * d].unflatten(1, (PAGE, d))[page, place] = values[:, 0].view(torch.uint8)
    expected[:, PAGE * d :].view(torch.float32)[page, place] = scales[:, 0]
    assert torch.equal(pages, expected)
    plain = torch.full((3, PAGE, d), 7.0)
    index_rows_triton(x, rope, "float32", given, None, (plain, slots))
    assert torch.equal(plain.flatten(0, 1)[slots], index_rows_triton(x, rope, "float32", given, None)[0][:, 0])
    assert int((plain == 7.0).all(-1).sum()) == 3 * PAGE - n

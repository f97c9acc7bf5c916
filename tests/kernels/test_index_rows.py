"""Index queries and keys against their references; their Triton kernel without a GPU."""

import pytest
import torch
import torch.nn.functional as F

from kernels.fp8 import dequantize_e4m3, simulate_e4m3
from kernels.hadamard import hadamard
from kernels.index_rows import IndexNorm, IndexRope, index_keys, index_queries, index_rows_reference, write_index_keys
from kernels.index_scores_paged import PAGE, page_bytes, read_index_pages
from kernels.rope import rotate
from tests.kernels.triton_runs import run_interpreted

DTYPES = ["fp8", "bfloat16", "float32"]


def rows(n, h, d, r, interleaved=False):
    angles = torch.rand(n, r // 2) * 6
    return torch.randn(n, h, d), IndexRope(angles.cos(), angles.sin(), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, h, d, r", [(1, 1, 16, 16), (7, 5, 64, 32), (3, 4, 128, 64), (3, 2, 8, 0)])
def test_queries_match_the_reference(n, h, d, r, dtype, interleaved):
    q, rope = rows(n, h, d, r, interleaved)
    weights = torch.randn(n, h)
    values, scaled = index_queries(q, weights, rope, dtype)
    expected = index_rows_reference(q, rope, dtype, None) * weights[..., None]
    actual = values.float() * scaled[..., None]
    # in FP8 a sum in another order may round to the neighbour
    tolerance = {"fp8": 2**-3, "bfloat16": 1e-6, "float32": 1e-6}[dtype]
    assert (actual - expected).norm() <= tolerance * expected.norm()
    assert ((actual - expected).abs() <= 1e-6).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_are_layer_norm_then_rope_then_rounding(dtype):
    k, rope = rows(9, 1, 32, 16)
    norm = IndexNorm(torch.rand(32) + 0.5, torch.randn(32), 1e-6)
    keys, scales = index_keys(k[:, 0], norm, rope, dtype)
    exact = F.layer_norm(k[:, 0], (32,), norm.weight, norm.bias, 1e-6)
    exact = torch.cat((rotate(exact[:, :16], rope.cos, rope.sin, interleaved=False), exact[:, 16:]), -1)
    if dtype == "fp8":
        assert torch.equal(
            dequantize_e4m3(keys, scales[:, None], 32), simulate_e4m3(hadamard(exact.bfloat16()).float(), 32)
        )
    else:
        assert scales is None
        assert torch.equal(keys, exact.to(keys.dtype)) and str(keys.dtype).endswith(dtype)


@pytest.mark.parametrize("d", [8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_in_pages_are_the_keys(dtype, d):
    k, rope = rows(70, 1, d, 8)
    norm = IndexNorm(torch.rand(d) + 0.5, torch.randn(d), 1e-6)
    keys, scales = index_keys(k[:, 0], norm, rope, dtype)
    table = torch.tensor([2, 0])
    slots = (table[:, None] * PAGE + torch.arange(PAGE)).flatten()[:70]
    if dtype == "fp8" and d % 16 == 0:
        pages = torch.zeros(3, page_bytes(d), dtype=torch.uint8)
        write_index_keys(pages, slots, k[:, 0], norm, rope, dtype)
        values, read = read_index_pages(pages, table, 70)
        assert torch.equal(values.float(), keys.float()) and torch.equal(read, scales)
    else:
        pages = torch.zeros(3, PAGE, d, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        write_index_keys(pages, slots, k[:, 0], norm, rope, dtype)
        exact = keys if scales is None else dequantize_e4m3(keys, scales[:, None], d)
        assert torch.equal(pages.flatten(0, 1)[slots], exact)


def test_float32_queries_pass_gradients():
    q, rope = rows(3, 2, 16, 8)
    q.requires_grad_()
    index_queries(q, torch.ones(3, 2), rope, "float32")[0].square().sum().backward()
    torch.testing.assert_close(q.grad, 2 * q.detach())  # a rotation keeps the sum of squares


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q, w, rope: index_queries(q[0], w, rope, "fp8"), r"expected rows \[n, h, d\], got \[2, 48\]"),
        (lambda q, w, rope: index_queries(q, w[:2], rope, "fp8"), r"expected weights \[3, 2\], got \[2, 2\]"),
        (lambda q, w, rope: index_queries(q, w, rope, "fp8"), r"power of two, got 48"),
        (
            lambda q, w, rope: index_queries(q[..., :8], w, rope, "bfloat16"),
            r"expected tables of at most 4 pairs, got 8",
        ),
        (lambda q, w, rope: index_queries(q[:2], w[:2], rope, "bfloat16"), r"expected cos \[2, 8\], got \[3, 8\]"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    q, rope = rows(3, 2, 48, 16)
    with pytest.raises(ValueError, match=message):
        call(q, torch.ones(3, 2), rope)


def test_the_kernel_is_right_in_the_interpreter():
    run_interpreted("index_rows")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
def test_the_kernel_builds_for_hopper(monkeypatch, d, dtype, interleaved):
    pytest.importorskip("triton", reason="needs triton")
    from kernels import index_rows_triton as module
    from tests.kernels.hopper import SHARED_LIMIT, Build

    kernel = Build(module.index_rows_kernel)
    monkeypatch.setattr(module, "index_rows_kernel", kernel)
    with torch.device("meta"):
        rope = IndexRope(torch.empty(64, 32), torch.empty(64, 32), interleaved)
        q = torch.empty(64, 64, d, dtype=torch.bfloat16)
        norm = IndexNorm(torch.empty(d, dtype=torch.bfloat16), torch.empty(d, dtype=torch.bfloat16), 1e-6)
        slots = torch.empty(64, dtype=torch.int64)
        pages = torch.empty(9, page_bytes(d), dtype=torch.uint8)
        if dtype != "fp8":
            pages = torch.empty(9, PAGE, d, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        for given in ((q, rope, dtype, None, torch.empty(64, 64)), (q[:, :1], rope, dtype, norm, None, (pages, slots))):
            module.index_rows_triton(*given)
            assert kernel.stack == 0 and kernel.shared < SHARED_LIMIT
            print(d, dtype, kernel.registers, kernel.shared)

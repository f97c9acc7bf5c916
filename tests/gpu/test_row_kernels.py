"""Kernels that read each row once, on a GPU, against their references: index rows, RoPE, norms, SwiGLU."""

import pytest
import torch

from kernels import switch
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
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rope import lay_rows, rotate, rotate_
from kernels.swiglu import swiglu
from model.attention import MLA
from model.config import read_config
from model.serving.attention import _expand
from tests.gpu.kernel_errors import ROUNDED, poison_memory, relative_error

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


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("n, h, d", [(1, 128, 64), (37, 5, 64), (69, 3, 24)])
def test_a_slice_is_rotated_in_place_and_the_rest_is_left(n, h, d, dtype, interleaved):
    rows, (cos, sin) = torch.randn(n, h, d + 24, device="cuda").to(dtype), tables(n, d)
    before = rows.clone()
    rotate_(rows[..., 16 : 16 + d], cos, sin, interleaved=interleaved)
    expected = rotate(before[..., 16 : 16 + d].float(), cos, sin, interleaved=interleaved)
    assert relative_error(rows[..., 16 : 16 + d], expected) < ROUNDED[dtype]
    assert torch.equal(rows[..., :16], before[..., :16]) and torch.equal(rows[..., 16 + d :], before[..., 16 + d :])


@pytest.mark.parametrize("n, h, d", [(1, 128, 64), (37, 5, 64), (3, 130, 24)])
def test_rows_are_laid_into_a_slice_and_the_rest_is_left(n, h, d):
    rows, out = torch.randn(n, d + 8, device="cuda").to(BF16), torch.randn(n, h, d + 16, device="cuda").to(BF16)
    expected = out.clone()
    expected[..., 8 : d + 8] = rows[:, None, 4 : d + 4]
    lay_rows(rows[:, None, 4 : d + 4].expand(-1, h, -1), out[..., 8 : d + 8])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("s", [1, 37, 300])
def test_attention_writes_products_where_the_torch_forms_copy_them(s, dtype, monkeypatch):
    raw = {
        "model_type": "deepseek_v32", "vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 16, "q_lora_rank": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 64, "moe_intermediate_size": 64,
        "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.0, "norm_topk_prob": True, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 1024, "index_n_heads": 16, "index_head_dim": 128,
        "index_topk": 64,
    }  # fmt: skip
    layer = MLA(read_config(raw, "test"), 0).requires_grad_(False)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, parameter.shape[-1] ** -0.5)
    layer, x, (cos, sin) = layer.to("cuda", dtype), torch.randn(s, 256, device="cuda").to(dtype), tables(s, 64)
    weights = layer.kv_b_proj.weight.unflatten(0, (16, -1))[3:11]

    def everything():
        q, latent = layer._queries(x, (cos, sin))
        rows = layer._cache_rows(x, (cos, sin))
        absorbed = layer.absorb(q)
        keys, values = _expand(layer.config, rows[:, :512], rows[:, 512:], weights)
        return q, latent, rows, absorbed, layer.up_project(absorbed[..., :512]), keys, values

    with torch.inference_mode():
        actual = everything()
        assert actual[4].is_contiguous()
        monkeypatch.setattr(switch, "FORCE_TORCH", True)
        expected = everything()
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape
        assert relative_error(mine, theirs) < 2 * ROUNDED[dtype]


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8), (37, 192), (5, 7168), (300, 512), (5, 3, 64)])
def test_rms_norm_matches_the_reference_apart_and_in_place(shape, dtype):
    wide, weight = torch.randn(*shape[:-1], shape[-1] + 8, device="cuda").to(dtype), torch.randn(shape[-1]).cuda()
    x, before = wide[..., : shape[-1]], wide.clone()
    out = rms_norm(x, weight, 1e-6)
    assert relative_error(out, rms_norm_reference(x, weight, 1e-6)) < ROUNDED[dtype]
    assert torch.equal(rms_norm(x[:1].clone(), weight, 1e-6), out[:1])
    assert torch.equal(rms_norm(x, weight, 1e-6, x), out)
    assert torch.equal(wide[..., shape[-1] :], before[..., shape[-1] :])


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (37, 129), (64, 18432)])
def test_swiglu_matches_the_reference(shape, dtype):
    gate, up = (torch.randn(2, *shape, device="cuda") * 8).to(dtype)
    expected = torch.nn.functional.silu(gate.float()) * up.float()
    assert relative_error(swiglu(gate, up, dtype), expected) < ROUNDED[dtype]

"""What the attention kernels refuse, in one line; the FP8 cache's rows; paged decode and merging on a CPU."""

import pytest
import torch

from kernels.dense_decode import dense_decode
from kernels.dense_mla import dense_mla, dense_mla_reference
from kernels.dense_prefill import merge_two
from kernels.fp8 import simulate_e4m3
from kernels.fp8_cache import pack_rows, row_bytes, unpack_rows
from kernels.layout import KvLayout
from kernels.sparse_mla import sparse_mla, sparse_mla_lse

SMALL = KvLayout(absorbed=True, groups=1, latent_dim=32, rope_dim=16)
V32 = KvLayout(absorbed=True, groups=1, latent_dim=512, rope_dim=64)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of a few hundred terms in another order


def good():
    ids = torch.tensor([[0, 3, -1], [5, 1, 2]], dtype=torch.int32)
    return {"q": torch.randn(2, 4, 48), "kv": torch.randn(6, 48), "ids": ids, "layout": SMALL, "scale": 0.3}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"q": torch.randn(2, 4, 40)}, r"expected q \[s, h, 48\], got \[2, 4, 40\]"),
        ({"q": torch.randn(2, 4, 48).double()}, r"expected q in bfloat16 or float16 or float32, got float64"),
        ({"q": torch.randn(4, 2, 48).transpose(0, 1)}, r"expected q contiguous, got strides \[48, 96, 1\]"),
        ({"kv": torch.randn(6, 47)}, r"expected kv \[t, 48\], got \[6, 47\]"),
        ({"kv": torch.randn(6, 48).bfloat16()}, r"expected kv in float32 or uint8, got bfloat16"),
        ({"kv": torch.randn(6, 48, device="meta")}, r"expected kv on cpu, got meta"),
        ({"kv": torch.zeros(6, 48, dtype=torch.uint8)}, r"expected kv \[t, 68\], got \[6, 48\]"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, r"expected ids in int32, got int64"),
        ({"ids": torch.zeros(3, 3, dtype=torch.int32)}, r"expected ids \[2, k\], got \[3, 3\]"),
        ({"ids": torch.full((2, 3), 6, dtype=torch.int32)}, r"expected ids in -1..5, got 6 at \[0, 0\]"),
        ({"ids": torch.full((2, 3), -2, dtype=torch.int32)}, r"expected ids in -1..5, got -2 at \[0, 0\]"),
        ({"lengths": torch.tensor([1, 4], dtype=torch.int32)}, r"expected lengths in 0..3, got 4 at \[1\]"),
        ({"scale": 0.0}, r"expected scale above 0, got 0.0"),
    ],
)
def test_sparse_mla_names_the_wrong_argument(wrong, message):
    with pytest.raises(ValueError, match="^sparse_mla: " + message):
        sparse_mla(**{**good(), **wrong})


@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_a_backend_for_gpus_refuses_a_cpu_tensor(backend):
    with pytest.raises(ValueError, match=f"sparse_mla: expected q on a GPU for backend {backend}, got cpu"):
        sparse_mla(**good(), backend=backend)
    q = torch.randn(2, 4, 16)
    with pytest.raises(ValueError, match="dense_mla: expected backend torch for these tensors on cpu, got"):
        dense_mla(q, q, q, 0.3, 0, backend="triton" if backend == "triton" else "cudnn")


def test_dense_mla_names_the_wrong_argument():
    q, k, v = torch.randn(2, 4, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    with pytest.raises(ValueError, match=r"dense_mla: expected k \[4, g, 16\], got \[5, 2, 16\]"):
        dense_mla(q, k, v, 0.3, 2)
    with pytest.raises(ValueError, match=r"dense_mla: expected mask in bool, got float32"):
        dense_mla(q, k, v, 0.3, 3, torch.zeros(2, 5))


def test_dense_decode_names_the_wrong_page():
    kv, pages = torch.randn(3, 64, 48), torch.tensor([[0, 3]], dtype=torch.int32)
    q, lengths = torch.randn(1, 4, 48), torch.tensor([65], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"dense_decode: expected pages in 0..2, got 3 at \[0, 1\]"):
        dense_decode(q, kv, pages, lengths, SMALL, 0.3)
    with pytest.raises(ValueError, match=r"dense_decode: expected lengths in 0..128, got 129 at \[0\]"):
        dense_decode(q, kv, pages, lengths + 64, SMALL, 0.3)


def test_leading_ids_count_and_the_rest_is_not_read():
    case = good()
    case["kv"][0] = float("nan")
    case["ids"] = torch.tensor([[4, 3, 0], [5, 1, 0]], dtype=torch.int32)
    lengths = torch.tensor([2, 0], dtype=torch.int32)
    out, lse = sparse_mla_lse(**case, lengths=lengths)
    torch.testing.assert_close(out[:1], sparse_mla(**{**case, "q": case["q"][:1], "ids": case["ids"][:1, :2].clone()}))
    assert torch.equal(out[1], torch.zeros(4, 32)) and bool(lse[1].isneginf().all())


def test_a_cache_row_of_v32_has_656_bytes_in_the_published_order():
    kv = torch.randn(3, 576)
    rows = pack_rows(kv, V32)
    assert rows.shape == (3, 656) and row_bytes(V32) == 656
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    assert torch.equal(torch.frexp(scales).mantissa, torch.full((3, 4), 0.5))
    assert torch.equal(rows[:, 528:].contiguous().view(torch.bfloat16), kv[:, 512:].bfloat16())
    assert torch.equal(unpack_rows(rows, V32)[:, :512], simulate_e4m3(kv[:, :512]))


def test_sparse_attention_over_fp8_rows_equals_that_over_what_they_hold():
    kv, q = torch.randn(9, 576), torch.randn(2, 4, 576)
    ids = torch.tensor([[0, 8, 3], [5, -1, 2]], dtype=torch.int32)
    rows = pack_rows(kv, V32)
    torch.testing.assert_close(
        sparse_mla_lse(q, rows, ids, V32, 0.1), sparse_mla_lse(q, unpack_rows(rows, V32), ids, V32, 0.1), **CLOSE
    )


def test_dense_decode_equals_dense_attention_over_the_requests_own_tokens():
    kv, q = torch.randn(4, 64, 48), torch.randn(2, 4, 48)
    pages = torch.tensor([[2, 0], [3, -1]], dtype=torch.int32)
    out, _ = dense_decode(q, kv, pages, torch.tensor([100, 7], dtype=torch.int32), SMALL, 0.3)
    for i, rows in enumerate((torch.cat((kv[2], kv[0]))[:100], kv[3, :7])):
        keys, values = SMALL.keys(rows), SMALL.values(rows)
        torch.testing.assert_close(
            out[i : i + 1], dense_mla_reference(q[i : i + 1], keys, values, 0.3, len(rows) - 1), **CLOSE
        )


def test_two_halves_of_the_keys_merge_to_the_whole():
    kv, q = torch.randn(20, 48), torch.randn(1, 4, 48)
    ids = torch.arange(20, dtype=torch.int32)[None]
    left, right = (sparse_mla_lse(q, kv, part.contiguous(), SMALL, 0.3) for part in ids.split((13, 7), 1))
    torch.testing.assert_close(merge_two(*left, *right), sparse_mla_lse(q, kv, ids, SMALL, 0.3), **CLOSE)

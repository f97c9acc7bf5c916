"""The CPU paths of the attention kernels against their float32 references."""

import pytest
import torch

from kernels.attention_mass import attention_mass, attention_mass_reference, attention_scores
from kernels.dense_mla import dense_mla, dense_mla_reference
from kernels.layout import KvLayout
from kernels.sparse_mla import sparse_mla, sparse_mla_lse, sparse_mla_reference
from kernels.topk import mask_to_ids

LAYOUTS = [
    KvLayout(absorbed=True, groups=1, latent_dim=16, rope_dim=8),
    KvLayout(absorbed=False, groups=3, latent_dim=24, rope_dim=24),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of at most a few hundred terms in another order


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 129), (7, 63), (64, 64)])
@pytest.mark.parametrize("heads, groups, dim, value_dim", [(4, 1, 24, 16), (6, 2, 16, 16), (4, 4, 24, 40)])
def test_dense_attention_matches_the_reference(queries, keys, heads, groups, dim, value_dim):
    q, k, v = torch.randn(queries, heads, dim), torch.randn(keys, groups, dim), torch.randn(keys, groups, value_dim)
    start = keys - queries
    torch.testing.assert_close(dense_mla(q, k, v, 0.3, start), dense_mla_reference(q, k, v, 0.3, start), **CLOSE)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("queries, keys", [(7, 63), (64, 300)])
@pytest.mark.parametrize("groups, masked", [(1, False), (2, True), (4, True)])
def test_dense_attention_in_bfloat16_rounds_probabilities_and_results_alone(
    queries, keys, groups, masked, amx, monkeypatch
):
    monkeypatch.setattr("kernels.dense_mla.has_amx", lambda: amx)  # whatever this CPU has: both forms run anywhere
    q, k, v = (torch.randn(n, g, 32).bfloat16() for n, g in ((queries, 4), (keys, groups), (keys, groups)))
    mask = torch.rand(queries, keys) < 0.3
    mask[:, 0] = True
    asked = (q, k, v[..., :24], 0.3, keys - queries, mask if masked else None)
    expected = dense_mla_reference(*asked)
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert float((dense_mla(*asked).float() - expected).norm() / expected.norm()) <= 4e-3
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("amx", [False, True])
def test_queries_whose_first_thousand_keys_are_all_masked_read_the_others(amx, monkeypatch):
    monkeypatch.setattr("kernels.dense_mla.has_amx", lambda: amx)
    q, k, v = (torch.randn(n, 4, 32).bfloat16() for n in (40, 1200, 1200))
    mask = torch.zeros(40, 1200, dtype=torch.bool)
    mask[:, 1100:1150] = True
    expected = dense_mla_reference(q, k, v, 0.3, 1160, mask)
    assert float((dense_mla(q, k, v, 0.3, 1160, mask).float() - expected).norm() / expected.norm()) <= 4e-3


def test_dense_attention_under_a_mask_matches_the_reference():
    q, k, v = torch.randn(9, 4, 16), torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    mask = torch.rand(9, 40) < 0.3
    mask[:, 0] = True
    torch.testing.assert_close(dense_mla(q, k, v, 0.3, 31, mask), dense_mla_reference(q, k, v, 0.3, 31, mask), **CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["mla", "grouped"])
@pytest.mark.parametrize("queries, k", [(1, 1), (5, 16), (33, 7)])
def test_gathered_attention_matches_the_reference_with_padding(layout, queries, k):
    dim = 24 if layout.absorbed else 8
    kv = torch.randn(50, layout.width)
    q = torch.randn(queries, 6, dim)
    ids = torch.stack([torch.randperm(50)[:k] for _ in range(queries)]).to(torch.int32)
    ids[0, k // 2 :] = -1
    torch.testing.assert_close(
        sparse_mla_lse(q, kv, ids, layout, 0.3), sparse_mla_reference(q, kv, ids, layout, 0.3), **CLOSE
    )


def test_a_query_without_any_valid_key_gets_zeros():
    layout = KvLayout(absorbed=True, groups=1, latent_dim=16, rope_dim=8)
    kv = torch.full((4, 24), float("nan"))
    out = sparse_mla(torch.randn(1, 2, 24), kv.nan_to_num(0.0), torch.full((1, 3), -1, dtype=torch.int32), layout, 1.0)
    assert torch.equal(out, torch.zeros(1, 2, 16))


def test_the_order_of_selected_keys_does_not_matter():
    layout = KvLayout(absorbed=True, groups=1, latent_dim=16, rope_dim=8)
    kv, q = torch.randn(50, 24), torch.randn(3, 4, 24)
    ids = torch.stack([torch.randperm(50)[:20] for _ in range(3)]).to(torch.int32)
    shuffled = ids[:, torch.randperm(20)]
    torch.testing.assert_close(sparse_mla(q, kv, ids, layout, 0.3), sparse_mla(q, kv, shuffled, layout, 0.3), **CLOSE)


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 200), (17, 64)])
@pytest.mark.parametrize("heads, groups", [(4, 1), (6, 3)])
def test_attention_mass_matches_the_reference_and_sums_to_one(queries, keys, heads, groups):
    q, k = torch.randn(queries, heads, 16), torch.randn(keys, groups, 16)
    mass = attention_mass(q, k, 0.5, keys - queries)
    torch.testing.assert_close(mass, attention_mass_reference(q, k, 0.5, keys - queries), **CLOSE)
    torch.testing.assert_close(mass.sum(1), torch.ones(queries), **CLOSE)


def test_attention_scores_depend_neither_on_the_tile_nor_on_the_layers_beside(monkeypatch):
    q, k = torch.randn(3, 9, 4, 16), torch.randn(3, 30, 2, 16)
    positions = torch.tensor([0, 3, 4, 8, 11, 12, 20, 25, 29])
    whole = torch.cat([scores for _, scores in attention_scores(q, k, 0.5, positions)], 1)
    assert whole.shape == (3, 9, 4, 30)
    expected = 0.5 * torch.einsum("nshd,nthd->nsht", q, k.repeat_interleave(2, 2))
    expected.masked_fill_(torch.arange(30) > positions[:, None, None], float("-inf"))
    torch.testing.assert_close(whole, expected, **CLOSE)
    for i in range(3):
        ((_, alone),) = attention_scores(q[i : i + 1], k[i : i + 1], 0.5, positions)
        torch.testing.assert_close(alone[0], whole[i], **CLOSE)
    monkeypatch.setattr("kernels.attention_mass.TILE_BYTES", 1)
    rows = torch.cat([scores for _, scores in attention_scores(q, k, 0.5, positions)], 1)
    torch.testing.assert_close(rows, whole, **CLOSE)


def test_padding_the_list_of_keys_changes_nothing():
    layout = KvLayout(absorbed=True, groups=1, latent_dim=16, rope_dim=8)
    kv, q = torch.randn(40, 24), torch.randn(1, 4, 24)
    mask = torch.ones(1, 40, dtype=torch.bool)
    exact = sparse_mla(q, kv, mask_to_ids(mask, 40), layout, 0.3)
    torch.testing.assert_close(sparse_mla(q, kv, mask_to_ids(mask, 64), layout, 0.3), exact, **CLOSE)

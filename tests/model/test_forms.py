"""The algebraically equal forms agree: chunks, decode, absorbed, MHA, masked, gathered; dense where k covers all."""

import pytest
import torch

import model.attention
from kernels.dense_mla import dense_mla
from kernels.sparse_mla import sparse_mla
from kernels.topk import topk
from model.cache import Cache
from model.request import Attention
from model.segment import Segment
from tests.model.helpers import SMALL, YARN, dsa_folder, frozen, ours, run

CONTEXT = 300
CLOSE = {"rtol": 0, "atol": 1e-4}  # the bound of the parity tests: float32 logits of magnitude 1-10
SPARSE = [
    Attention(topk=48),
    Attention(topk=48, selector="oracle"),
    Attention(topk=48, selector="recency"),
    Attention(topk=48, selector="random", seed=3),
]
MODELS = {
    "deepseek": ("deepseek", {"rope_parameters": frozen(YARN)}),
    "glm-shared": ("glm", {"index_topk_pattern": "FSF"}),
}


@pytest.fixture(params=MODELS)
def tiny(request):
    kind, changes = MODELS[request.param]
    return ours(dsa_folder(kind, **changes))


@pytest.fixture
def ids():
    return torch.randint(0, SMALL["vocab_size"], (CONTEXT,))


@pytest.mark.parametrize("attention", [Attention(), *SPARSE], ids=lambda a: a.selector if a.topk else "dense")
@pytest.mark.parametrize(
    "steps",
    [[256, 44], [7, 1, 63, 129, 100], [290, *[-1] * 10], [*[-1] * CONTEXT]],
    ids=["256", "odd", "decode-tail", "all-decode"],
)
def test_chunks_and_decoding_equal_one_prefill(tiny, ids, attention, steps):
    torch.testing.assert_close(run(tiny, ids, attention, steps), run(tiny, ids, attention, [CONTEXT]), **CLOSE)


@pytest.mark.parametrize("attention", SPARSE, ids=lambda a: a.selector)
def test_gathered_keys_equal_masked_keys(tiny, ids, attention, monkeypatch):
    masked = run(tiny, ids, attention, [CONTEXT])
    monkeypatch.setattr(model.attention.MLA, "_gathers", lambda self, topk, position: True)
    torch.testing.assert_close(run(tiny, ids, attention, [CONTEXT]), masked, **CLOSE)


@pytest.mark.parametrize("selector", ["indexer", "oracle", "recency", "random"])
@pytest.mark.parametrize("steps", [[CONTEXT], [*[-1] * CONTEXT]], ids=["mha-form", "absorbed-form"])
def test_sparse_is_bit_equal_to_dense_when_topk_covers_the_context(tiny, ids, selector, steps):
    sparse = run(tiny, ids, Attention(topk=CONTEXT, selector=selector), steps)
    assert torch.equal(sparse, run(tiny, ids, Attention(), steps))


def test_gathering_every_key_equals_absorbed_dense_attention(tiny):
    """The seam is really passed here: every key is selected, gathered and read."""
    layer = tiny.layers[0].self_attn
    kv, q = torch.randn(64, layer.layout.width), torch.randn(1, 4, layer.config.query_dim)
    everything = topk(torch.randn(1, 64), 64, torch.tensor([64]))
    scale = layer.config.softmax_scale
    gathered = sparse_mla(layer.absorb(q), kv, everything, layer.layout, scale)
    rows = layer.layout.keys(kv)
    dense = dense_mla(layer.absorb(q), rows, layer.layout.values(kv), scale, 63)
    torch.testing.assert_close(gathered, dense, rtol=0, atol=1e-5)


def test_a_longer_text_never_changes_earlier_tokens(tiny, ids):
    whole = run(tiny, ids, Attention(topk=48), [256, 44])
    assert torch.equal(run(tiny, ids[:256], Attention(topk=48), [256]), whole[:256])


def test_sparse_attention_really_differs_from_dense_beyond_topk(tiny, ids):
    for attention in SPARSE:
        difference = (run(tiny, ids, attention, [CONTEXT]) - run(tiny, ids, Attention(), [CONTEXT])).abs().amax(1)
        assert float(difference[:48].max()) < 2e-5
        assert float(difference[60:].max()) > 1e-2


def test_random_selection_follows_its_seed(tiny, ids):
    first, again, other = (
        run(tiny, ids, Attention(topk=48, selector="random", seed=seed), [CONTEXT]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("index_dtype", ["bfloat16", "fp8"])
def test_lower_index_precision_moves_few_selected_keys(tiny, ids, index_dtype, monkeypatch):
    kept = []
    original = model.attention.select

    def keep(*args):
        kept.append(original(*args))
        return kept[-1]

    monkeypatch.setattr(model.attention, "select", keep)
    run(tiny, ids, Attention(topk=48), [CONTEXT])
    exact = kept[0]
    kept.clear()
    run(tiny, ids, Attention(topk=48, index_dtype=index_dtype), [CONTEXT], index_dtype)
    rounded = kept[0]
    rows = torch.arange(CONTEXT) >= 96
    overlap = ((exact & rounded).sum(1) / 48)[rows].mean()
    assert not torch.equal(exact, rounded), "the precision must have an effect"
    assert float(overlap) > 0.93


def test_an_fp8_cache_holds_latents_rounded_by_power_of_two_scales_and_the_rope_key_as_it_was(tiny, ids):
    caches = []
    for cache_dtype in ("auto", "fp8"):
        cache = Cache(tiny.config, CONTEXT, dtype=torch.float32, index_dtype=None)
        segment = Segment(
            cache=cache, attention=Attention(cache_dtype=cache_dtype), start=0, length=CONTEXT, rows=slice(0, CONTEXT)
        )
        tiny(ids, [segment], None)
        caches.append(cache.layers[0].kv)
    exact, rounded = caches
    latent = exact[:, : tiny.config.kv_lora_rank]
    scale = 2.0 ** torch.ceil(torch.log2(latent.abs().amax(1, keepdim=True) / 448))
    expected = (latent / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(rounded[:, : tiny.config.kv_lora_rank], expected)
    assert torch.equal(rounded[:, tiny.config.kv_lora_rank :], exact[:, tiny.config.kv_lora_rank :])
    assert not torch.equal(latent, expected)

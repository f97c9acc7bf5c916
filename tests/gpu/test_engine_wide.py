"""The paged engine at DeepSeek-V3.2's width: 128k tokens within the memory that was planned, and all that is free.

These tests look at a GPU's free memory: no other process may be on it.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")
from model.config import ModelConfig, read_config
from model.request import Attention, Request
from model.serving.engine import PagedEngine
from model.serving.memory import working_bytes
from model.serving.shape import Shape
from model.transformer import Transformer
from tests.model.test_engine import Words

# DeepSeek-V3.2's attention and indexer over a small hidden state: 2 layers, the second with experts
WIDE = {
    "model_type": "deepseek_v32", "vocab_size": 512, "hidden_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 128, "q_lora_rank": 512, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 512, "moe_intermediate_size": 128,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0, "norm_topk_prob": True, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "max_position_embeddings": 131072, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 2048, "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


@pytest.fixture(scope="module")
def wide():
    config: ModelConfig = read_config(WIDE, "test")
    torch.manual_seed(0)
    with torch.device("cuda"):
        tiny = Transformer(config)
    for name, parameter in tiny.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter) if name.endswith("weight") else torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    tiny = tiny.to(torch.bfloat16).eval().requires_grad_(False)
    tiny.rope, tiny.index_rope = (table and table.to("cuda") for table in Transformer.tables(config))  # in float32
    return tiny


def paged(wide, attention, **options):
    return PagedEngine.of(wide, Words(), {"it": attention}, **options)


def random_ids(length):
    return tuple(torch.randint(3, 512, (length,)).tolist())


def answers(engine, requests):
    results = {r.id: r for r in engine.run(requests)}
    assert {key: r.error for key, r in results.items() if r.error} == {} and len(results) == len(requests)
    return results


@pytest.mark.parametrize(
    "attention",
    [Attention(), Attention(topk=2048), Attention(topk=2048, cache_dtype="fp8")],
    ids=["dense", "sparse", "sparse-fp8-cache"],
)
def test_128k_tokens_pass_within_the_memory_that_was_planned(wide, attention):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    engine = paged(wide, attention, shape=Shape(16, 2048, 256, 8192), cache_bytes=1 << 30)
    common = random_ids(120_000)
    requests = [
        Request(id=str(i), variant="it", token_ids=(*common, *random_ids(1000)), max_tokens=20) for i in range(3)
    ]
    results = answers(engine, requests)
    assert all(len(result.token_ids) == 20 for result in results.values())
    assert [results[str(i)].usage.cached_tokens for i in range(3)] == [0, 118784, 118784]
    planned = working_bytes(wide.config, 2, 16, 2048, 131072)
    assert engine.peak_gpu_bytes - weights - engine.stats.pool_bytes <= planned


@pytest.mark.parametrize("attention", [Attention(), Attention(topk=2048)], ids=["dense", "sparse"])
def test_fast_chunks_pass_within_the_memory_that_was_planned(wide, attention):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    engine = paged(wide, attention, cache_bytes=1 << 30, fast=True)
    common = random_ids(120_000)
    requests = [
        Request(id=str(i), variant="it", token_ids=(*common, *random_ids(1000)), max_tokens=20) for i in range(3)
    ]
    results = answers(engine, requests)
    assert [results[str(i)].usage.cached_tokens for i in range(3)] == [0, 119_808, 119_808]
    assert engine.shape.chunk > 2048
    planned = working_bytes(wide.config, 2, engine.num_rows, engine.shape.chunk, 131072)
    assert engine.peak_gpu_bytes - weights - engine.stats.pool_bytes <= planned


def test_free_memory_is_taken_and_leaves_room_for_the_steps(wide):
    torch.cuda.empty_cache()
    engine = paged(wide, Attention(topk=2048), cache_bytes=None)
    assert engine.max_context == 131072
    results = answers(
        engine,
        [Request(id=str(i), variant="it", token_ids=random_ids(3000), max_tokens=8) for i in range(80)],
    )
    assert len(results) == 80 and engine.stats.preemptions == 0

"""Reading published configurations, and the real models' shapes: every published tensor finds its place."""

import copy
import math

import pytest
import torch

from model.config import read_config
from model.errors import ModelError
from model.placement import place
from model.rope import inverse_frequencies
from model.transformer import Transformer

# config.json of DeepSeek-V3.2 (671B), keys as published
DEEPSEEK_V32 = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "vocab_size": 129280,
    "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1,
    "moe_layer_freq": 1, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "attention_bias": False, "max_position_embeddings": 163840, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "tie_word_embeddings": False, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    },
}  # fmt: skip
GLM_5 = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "vocab_size": 154880, "hidden_size": 6144,
    "num_hidden_layers": 78, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1, "intermediate_size": 12288,
    "moe_intermediate_size": 2048, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 2048,
    "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5, "attention_bias": False, "max_position_embeddings": 202752,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "tie_word_embeddings": False,
    "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "indexer_rope_interleave": True,
    "dtype": "bfloat16",
}  # fmt: skip
GLM_5_2 = {**GLM_5, "index_topk_freq": 4, "index_skip_topk_offset": 2}


def test_deepseek_v32_as_published():
    config = read_config(DEEPSEEK_V32, "config.json")
    assert config.architecture == "deepseek_v32"
    assert config.max_positions == 163840
    assert (config.query_dim, config.kv_width) == (192, 576)
    assert config.softmax_scale == pytest.approx(0.1352338, abs=5e-8)  # 192^-1/2 times (0.1 ln 40 + 1)^2
    assert config.rope.attention_factor == 1.0
    assert (config.rope_interleaved, config.indexer.interleaved) == (True, False)
    assert (config.indexer.num_heads, config.indexer.head_dim, config.indexer.topk) == (64, 128, 2048)
    assert config.indexer.rope_dim == 64
    assert config.indexer.own == (True,) * 61
    assert config.indexer.dtype == "fp8"
    assert config.moe.sparse == (False,) * 3 + (True,) * 58
    assert (config.moe.num_groups, config.moe.num_active_groups, config.moe.scale) == (8, 4, 2.5)


def test_yarn_leaves_fast_pairs_and_divides_slow_ones_by_forty():
    frequencies = inverse_frequencies(read_config(DEEPSEEK_V32, "config.json").rope)
    plain = torch.tensor([10000 ** (-2 * i / 64) for i in range(32)])
    ratio = (frequencies / plain).tolist()
    assert ratio[:11] == pytest.approx([1.0] * 11, rel=1e-6)
    assert ratio[23:] == pytest.approx([1 / 40] * 9, rel=1e-6)
    between = [1 - (i - 10) / 13 * (1 - 1 / 40) for i in range(11, 23)]
    assert ratio[11:23] == pytest.approx(between, rel=1e-5)


def test_both_spellings_of_rope_are_the_same():
    modern = copy.deepcopy(DEEPSEEK_V32)
    scaling = modern.pop("rope_scaling")
    kind = scaling.pop("type")
    modern["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": modern.pop("rope_theta")}
    assert read_config(modern, "config.json") == read_config(DEEPSEEK_V32, "config.json")


def test_glm_5_as_published():
    config = read_config({**GLM_5, "quantization_config": {"quant_method": "fp8"}}, "config.json")
    assert config.softmax_scale == 256**-0.5
    assert (config.rope.kind, config.rope.theta, config.max_positions) == ("default", 1e6, 202752)
    assert config.rms_norm_eps == 1e-5
    assert config.indexer.interleaved
    assert config.indexer.dtype == "float32", "GLM's FP8 checkpoints leave the indexer unquantised"
    assert config.indexer.own == (True,) * 78
    assert config.moe.sparse == (False,) * 3 + (True,) * 75


def test_glm_5_2_runs_an_indexer_in_the_first_two_layers_and_then_every_fourth():
    owners = read_config(GLM_5_2, "config.json").indexer.own
    assert [i for i, own in enumerate(owners) if own] == [0, *range(1, 78, 4)]


@pytest.mark.parametrize(
    "spelling", [{"index_topk_pattern": "FSSF" + "S" * 74}, {"indexer_types": ["full", "shared", "shared", "full"]}]
)
def test_an_explicit_schedule_of_indexers_wins(spelling):
    owners = read_config({**GLM_5_2, **spelling}, "config.json").indexer.own
    assert owners[:4] == (True, False, False, True)
    assert not any(owners[4:])


def test_a_missing_key_and_an_unknown_type_are_named():
    with pytest.raises(ModelError, match=r"here: deepseek_v32 needs the key 'kv_lora_rank'"):
        read_config({k: v for k, v in DEEPSEEK_V32.items() if k != "kv_lora_rank"}, "here")
    with pytest.raises(ModelError, match=r"here: expected model_type one of deepseek_v32, .*; got 'mamba'"):
        read_config({"model_type": "mamba"}, "here")
    with pytest.raises(ModelError, match=r"rope type: expected one of .*; got 'longrope'"):
        read_config({**DEEPSEEK_V32, "rope_scaling": {"type": "longrope", "factor": 2}}, "here")


# shapes of one layer in DeepSeek-V3.2's checkpoint, rows are outputs
V32_ATTENTION = {
    "q_a_proj.weight": (1536, 7168), "q_a_layernorm.weight": (1536,), "q_b_proj.weight": (24576, 1536),
    "kv_a_proj_with_mqa.weight": (576, 7168), "kv_a_layernorm.weight": (512,), "kv_b_proj.weight": (32768, 512),
    "o_proj.weight": (7168, 16384),
}  # fmt: skip
V32_INDEXER = {
    "wq_b.weight": (8192, 1536), "wk.weight": (128, 7168), "k_norm.weight": (128,), "k_norm.bias": (128,),
    "weights_proj.weight": (64, 7168),
}  # fmt: skip
GLM_ATTENTION = {
    "q_a_proj.weight": (2048, 6144), "q_a_layernorm.weight": (2048,), "q_b_proj.weight": (64 * 256, 2048),
    "kv_a_proj_with_mqa.weight": (576, 6144), "kv_a_layernorm.weight": (512,), "kv_b_proj.weight": (64 * 448, 512),
    "o_proj.weight": (6144, 64 * 256),
}  # fmt: skip
GLM_INDEXER = {
    "wq_b.weight": (4096, 2048), "wk.weight": (128, 6144), "k_norm.weight": (128,), "k_norm.bias": (128,),
    "weights_proj.weight": (32, 6144),
}  # fmt: skip


def mlp(stem, hidden, size):
    return {
        f"{stem}.gate_proj.weight": (size, hidden),
        f"{stem}.up_proj.weight": (size, hidden),
        f"{stem}.down_proj.weight": (hidden, size),
    }


def published(vocab, hidden, layers, dense_size, attention, indexer, owners):
    """Names and shapes of a checkpoint with 3 dense layers and, behind them, 256 experts of 2048 and a shared one."""
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        stem = f"model.layers.{i}"
        shapes |= {f"{stem}.self_attn.{name}": shape for name, shape in attention.items()}
        if i in owners:
            shapes |= {f"{stem}.self_attn.indexer.{name}": shape for name, shape in indexer.items()}
        shapes |= dict.fromkeys(
            (f"{stem}.input_layernorm.weight", f"{stem}.post_attention_layernorm.weight"), (hidden,)
        )
        if i < 3:
            shapes |= mlp(f"{stem}.mlp", hidden, dense_size)
            continue
        shapes |= {f"{stem}.mlp.gate.weight": (256, hidden), f"{stem}.mlp.gate.e_score_correction_bias": (256,)}
        for name in [f"{stem}.mlp.experts.{e}" for e in range(256)] + [f"{stem}.mlp.shared_experts"]:
            shapes |= mlp(name, hidden, 2048)
    return shapes


REAL = {
    "deepseek-v3.2": (
        DEEPSEEK_V32,
        published(129280, 7168, 61, 18432, V32_ATTENTION, V32_INDEXER, range(61)),
        671.0 + 0.85,  # the report's 671B without multi-token prediction, and 61 indexers
    ),
    "glm-5": (GLM_5, published(154880, 6144, 78, 12288, GLM_ATTENTION, GLM_INDEXER, range(78)), 744.0),
    "glm-5.2": (
        GLM_5_2,
        published(154880, 6144, 78, 12288, GLM_ATTENTION, GLM_INDEXER, {0, *range(1, 78, 4)}),
        743.0,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_every_published_tensor_of_the_real_models_fills_its_place_and_all_parameters_are_covered(name):
    raw, shapes, billions = REAL[name]
    config = read_config(raw, "config.json")
    with torch.device("meta"):
        parameters = dict(Transformer(config).state_dict())
    filled = dict.fromkeys(parameters, 0)
    regions = set()
    for published_name, shape in shapes.items():
        ours, region = place(config, published_name)
        hole = parameters[ours][region] if region else parameters[ours]
        assert tuple(hole.shape) == shape, published_name
        filled[ours] += hole.numel()
        regions.add((ours, str(region)))
    assert len(regions) == len(shapes), "no two tensors fill the same place"
    assert filled == {ours: parameter.numel() for ours, parameter in parameters.items()}
    assert sum(math.prod(shape) for shape in shapes.values()) / 1e9 == pytest.approx(billions, abs=1.5)


@pytest.mark.parametrize("name", ["self_attn.o_proj.weight", "eh_proj.weight", "embed_tokens.weight"])
def test_the_multi_token_prediction_layer_is_not_used(name):
    assert place(read_config(DEEPSEEK_V32, "config.json"), f"model.layers.61.{name}") is None
    assert place(read_config(GLM_5, "config.json"), f"model.layers.78.{name}") is None

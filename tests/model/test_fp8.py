"""FP8 weights that stay FP8: what they give differs from the dequantised weights by the activations' rounding alone."""

import json

import pytest
import torch
from torch import nn

from kernels.fp8 import E4M3_MAX, GROUP, dequantize_blocks, simulate_e4m3
from model.checkpoint import load_model
from model.config import read_config
from model.errors import ModelError
from model.fp8 import Fp8Experts, Fp8Linear, hold_fp8
from model.layers import Experts
from model.placement import check_tensors, load_weights
from model.random_checkpoint import CONFIG, _shards, write_random
from model.request import Attention
from model.transformer import Transformer
from model.weights import Weights
from tests.model.helpers import dsa_folder, run

TINY = {
    "vocab_size": 320, "hidden_size": 192, "intermediate_size": 160, "moe_intermediate_size": 128,
    "num_hidden_layers": 4, "first_k_dense_replace": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 48, "kv_lora_rank": 144, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 24,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "index_n_heads": 16,
    "index_head_dim": 32, "index_topk": 48,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("random") / "checkpoint"
    write_random(target, **TINY)
    return target


def unfilled(config):
    with torch.device("meta"):
        return Transformer(config)


def held_model(folder, dtype=torch.float32):
    """The checkpoint with its FP8 weights as they are, and everything else in `dtype`."""
    config = read_config(json.loads((folder / "config.json").read_text()), "config.json")
    model, source = unfilled(config), Weights(folder)
    assert hold_fp8(model, source) > 0
    load_weights(model, source, dtype, "here")
    model.rope, model.index_rope = model.tables(config)
    return model.eval().requires_grad_(False)


def rounded_model(folder):
    """Dequantised weights, and the input of every layer that has FP8 weights rounded by a hook."""
    model, source = load_model(str(folder), "float32"), Weights(folder)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("kv_b_proj"):
            published = f"model.{name}.weight" if name.startswith("layers") else f"{name}.weight"
            if source.is_float8(published):
                module.register_forward_pre_hook(lambda _, args: (simulate_e4m3(args[0].float()),))
    return model


def relative_error(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def test_a_product_is_off_by_no_more_than_the_rounding_of_its_input():
    torch.manual_seed(0)
    layer = Fp8Linear(300, 200, bias=True)
    layer.weight.copy_((torch.randn(200, 300) * 64).to(torch.float8_e4m3fn))
    layer.weight_scale_inv.copy_(torch.rand(2, 3) / 64)
    layer.bias.copy_(torch.randn(200))
    x = torch.randn(9, 300) * torch.logspace(-3, 3, 9)[:, None]
    weight = dequantize_blocks(layer.weight, layer.weight_scale_inv)
    exact = (x.double() @ weight.double().T + layer.bias).float()
    # e4m3 has 3 bits behind the point: half a step is 1/16 of a value, or 2^-10 scales of a subnormal one;
    # a scale is at most twice its group's largest value / 448
    groups = nn.functional.pad(x, (0, -300 % GROUP)).unflatten(-1, (-1, GROUP)).abs().amax(-1)
    scale = (2 * groups / E4M3_MAX).clamp_min(2 * 1e-4 / E4M3_MAX).repeat_interleave(GROUP, -1)[:, :300]
    bound = torch.maximum(x.abs() / 16, scale * 2**-10) @ weight.abs().T
    error = (layer(x) - exact).abs()
    assert (error <= bound + 1e-5 * exact.abs()).all()
    assert relative_error(layer(x), exact) > 1e-3, "the input is rounded"


@pytest.mark.parametrize("topk", [None, 48])
def test_logits_are_those_of_dequantised_weights_behind_rounded_inputs(folder, topk):
    torch.manual_seed(1)
    ids, steps = torch.randint(0, 320, (90,)), [80, *[-1] * 10]
    attention = Attention(topk=topk)
    held = held_model(folder)
    expected_model = rounded_model(folder)
    for layer in expected_model.layers[2:]:  # the experts, row by row, with both of their inputs rounded
        layer.mlp.experts = RoundedExperts(layer.mlp.experts)
        layer.mlp.forward = layer.mlp.experts.mixture(layer.mlp)
    actual = run(held, ids, attention, steps)
    expected = run(expected_model, ids, attention, steps)
    assert relative_error(actual, expected) < 1e-3  # another order of sums may round an input to its neighbour
    plain = run(load_model(str(folder), "float32"), ids, attention, steps)
    assert 1e-3 < relative_error(actual, plain) < 0.3


class RoundedExperts(nn.Module):
    """Dequantised experts, applied to one row after the other."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def mixture(self, moe):
        def forward(x):
            chosen, weights = moe.gate(x)
            out = torch.zeros_like(x)
            rounded = simulate_e4m3(x)
            for i in range(len(x)):
                for e, weight in zip(chosen[i].tolist(), weights[i], strict=True):
                    gate, up = (self.experts.gate_up_proj[e] @ rounded[i]).chunk(2)
                    hidden = simulate_e4m3((nn.functional.silu(gate) * up)[None])[0]
                    out[i] += weight * (self.experts.down_proj[e] @ hidden)
            return out + moe.shared_experts(x)

        return forward


def test_everything_that_the_checkpoint_holds_as_fp8_stays_so_but_for_the_absorbed_weight(folder):
    model = load_model(str(folder), "fp8")
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "indexer.wq_b", "indexer.wk"):
        assert kinds[f"layers.0.self_attn.{name}.weight"] == torch.float8_e4m3fn
    assert kinds["layers.0.self_attn.kv_b_proj.weight"] == torch.bfloat16
    assert kinds["layers.0.self_attn.indexer.weights_proj.weight"] == torch.float32
    assert (
        kinds["layers.2.mlp.gate.weight"] == kinds["embed_tokens.weight"] == kinds["lm_head.weight"] == torch.bfloat16
    )
    assert isinstance(model.layers[2].mlp.experts, Fp8Experts)
    stored = Weights(folder)
    stem = "model.layers.3.mlp.experts.5"
    scales = model.layers[3].mlp.experts.gate_up_proj_scale_inv[5]
    assert torch.equal(scales[:1], stored.read(f"{stem}.gate_proj.weight_scale_inv"))
    assert torch.equal(scales[1:], stored.read(f"{stem}.up_proj.weight_scale_inv"))
    dequantised = load_model(str(folder), "float32").layers[3].mlp.experts.gate_up_proj[5]
    assert torch.equal(dequantize_blocks(model.layers[3].mlp.experts.gate_up_proj[5], scales), dequantised)


def test_auto_dequantises_on_a_cpu(folder):
    assert all(t.dtype != torch.float8_e4m3fn for t in load_model(str(folder)).state_dict().values())


def test_experts_whose_gate_and_up_would_share_a_block_are_dequantised(tmp_path):
    write_random(tmp_path / "narrow", **{**TINY, "moe_intermediate_size": 96})
    model = load_model(str(tmp_path / "narrow"), "fp8")
    assert type(model.layers[2].mlp.experts) is Experts
    assert isinstance(model.layers[2].mlp.shared_experts.up_proj, Fp8Linear)


def test_fp8_of_a_checkpoint_without_fp8_weights_is_refused():
    with pytest.raises(ModelError, match=r"model\.dtype: fp8: expected FP8 weights"):
        load_model(str(dsa_folder("deepseek")), "fp8")


def test_layers_stored_once_are_read_under_both_names(folder):
    source = Weights(folder)
    name = "mlp.experts.0.up_proj.weight"
    twin = source.read(f"model.layers.3.{name}")
    assert torch.equal(twin.float(), source.read(f"model.layers.2.{name}").float())
    assert not torch.equal(twin.float(), source.read("model.layers.2.mlp.experts.1.up_proj.weight").float())


def test_random_weights_have_the_variance_of_their_fan_in(folder):
    up = load_model(str(folder), "float32").layers[0].mlp.up_proj.weight
    assert 0.5 < float(up.std()) * up.shape[1] ** 0.5 < 2
    first = Weights(folder).read("model.layers.0.mlp.up_proj.weight")
    assert torch.isfinite(first.float()).all()


def test_a_random_checkpoint_names_wrong_keys_and_spares_files(tmp_path):
    with pytest.raises(ModelError, match="got 'hidden'"):
        write_random(tmp_path / "new", hidden=3)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists and is not an empty folder"):
        write_random(tmp_path)


class Listed:
    """Names, shapes and dtypes of a checkpoint that nobody has written."""

    def __init__(self, config):
        specs = [spec for shard in _shards(config).values() for spec in shard]
        first = config["first_k_dense_replace"]
        names = {spec.name: spec for spec in specs}
        for i in range(first + 1, config["num_hidden_layers"]):
            stem = f"model.layers.{first}."
            names |= {spec.name.replace(stem, f"model.layers.{i}."): spec for spec in specs if stem in spec.name}
        self.names = names

    def __iter__(self):
        return iter(sorted(self.names))

    def shape(self, name):
        return self.names[name].shape

    def is_float8(self, name):
        return self.names[name].dtype == torch.float8_e4m3fn


def test_full_width_fits_into_half_of_an_h100():
    source = Listed(CONFIG)
    model = unfilled(read_config(CONFIG, "config.json"))
    assert hold_fp8(model, source) == 6 * 6 + 3 * 3 + 3 * 5  # attention, dense MLPs, mixtures with a shared expert
    check_tensors(model, source, "here")  # every tensor has its place
    sizes = [
        t.numel() * (t.element_size() if t.dtype != torch.float32 or name.endswith("scale_inv") else 2)
        for name, t in model.state_dict().items()
    ]
    assert sum(sizes) == pytest.approx(40.2e9, rel=0.01)
    written = sum(spec.num_bytes for shard in _shards(CONFIG).values() for spec in shard)
    assert written == pytest.approx(17.1e9, rel=0.01), "one of three mixtures is on the disk"


def test_full_width_is_deepseek_v32():
    config = read_config(CONFIG, "config.json")
    model = unfilled(config)
    experts = model.layers[3].mlp.experts
    assert tuple(experts.gate_up_proj.shape) == (256, 4096, 7168)
    assert sum(p.numel() for p in model.layers[0].self_attn.parameters()) == pytest.approx(187.1e6 + 13.96e6, rel=1e-3)
    assert config.indexer.dtype == "fp8"
    assert config.softmax_scale == pytest.approx(0.1352338, rel=1e-6)  # 192^-1/2 times YaRN's mscale squared

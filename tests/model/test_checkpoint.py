"""Loading: FP8 scales, shards, GGUF, conversion; and what a user hears when a checkpoint is broken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import describe, load_config, load_model, resolve
from model.convert import convert_folder
from model.errors import ModelError
from model.request import Attention
from tests.model.helpers import SMALL, dsa_folder, ours, run


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "checkpoint"
    shutil.copytree(dsa_folder("deepseek"), target)
    return target


def edit(folder, change):
    """Rewrite model.safetensors after `change` has altered its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantise(tensors):
    """What an FP8 release does: e4m3 with power-of-two scales per 128 x 128 block; returns the dequantised values."""
    exact = {}
    suffixes = ("_proj.weight", "_mqa.weight", "wq_b.weight", "wk.weight")
    for name in [n for n in tensors if n.endswith(suffixes) and not n.endswith("weights_proj.weight")]:
        weight = tensors[name]
        rows, cols = weight.shape
        scales = torch.empty(-(-rows // 128), -(-cols // 128))
        rounded = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        value = torch.empty_like(weight)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scales[i, j] = 2.0 ** torch.ceil(torch.log2(weight[block].abs().max() / 448))
                rounded[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
                value[block] = rounded[block].float() * scales[i, j]
        tensors[name] = rounded
        tensors[name + "_scale_inv"] = scales
        exact[name] = value
    return exact


def test_an_fp8_checkpoint_loads_to_the_dequantised_values_exactly(tmp_path):
    folder = tmp_path / "fp8"
    shutil.copytree(dsa_folder("deepseek", hidden_size=192, kv_lora_rank=144, qk_rope_head_dim=16), folder)
    exact = {}
    edit(folder, lambda tensors: exact.update(quantise(tensors)))
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
    (folder / "config.json").write_text(json.dumps(raw))

    model = load_model(str(folder), "float32")
    kv_a = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert exact[kv_a].shape[0] == 160, "the last block of rows must be partial"
    assert torch.equal(model.layers[0].self_attn.kv_a_proj_with_mqa.weight, exact[kv_a])
    assert torch.equal(
        model.layers[0].self_attn.indexer.wq_b.weight, exact["model.layers.0.self_attn.indexer.wq_b.weight"]
    )
    for e in range(SMALL["n_routed_experts"]):
        stem = f"model.layers.1.mlp.experts.{e}"
        both = torch.cat((exact[f"{stem}.gate_proj.weight"], exact[f"{stem}.up_proj.weight"]))
        assert torch.equal(model.layers[1].mlp.experts.gate_up_proj[e], both)
    assert model.config.indexer.dtype == "fp8", "an FP8 release of DeepSeek scores its index in FP8"


def test_float8_without_scales_is_refused(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=r"up_proj\.weight is float8 but .*_scale_inv is missing"):
        load_model(str(folder))


def test_a_sharded_checkpoint_loads_to_the_same_logits(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    (folder / "model.safetensors").unlink()
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = torch.randint(0, 320, (100,))
    expected = run(ours(dsa_folder("deepseek")), ids, Attention(topk=48), [100])
    assert torch.equal(run(load_model(str(folder), "float32"), ids, Attention(topk=48), [100]), expected)

    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"shard model-00002-of-00002\.safetensors is missing"):
        load_model(str(folder))


def test_a_truncated_shard_is_named_with_its_size(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file, \d+ bytes"):
        load_model(str(folder))


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder):
    edit(folder, lambda t: t.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight: expected shape \[64\], got \[65\]"):
        load_model(str(folder))


def test_missing_and_unexpected_tensors_are_counted_and_named(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.extra.weight"] = torch.ones(2)
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]

    edit(folder, change)
    with pytest.raises(ModelError, match=r"1 parameters .*experts\.gate_up_proj; 1 tensors .*, first .*extra"):
        load_model(str(folder))


def test_the_prediction_layer_behind_the_last_is_not_needed(folder):
    edit(folder, lambda t: t.update({"model.layers.3.eh_proj.weight": torch.ones(2, 2)}))
    load_model(str(folder))


def test_pickle_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle weights \(pytorch_model\.bin\) are refused"):
        load_model(str(folder))


def test_an_unknown_architecture_names_the_known_ones(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "mamba"}))
    with pytest.raises(ModelError, match=r"expected model_type one of deepseek_v32, .*got 'mamba'"):
        load_model(str(folder))


def test_a_config_without_a_needed_key_names_it(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["kv_lora_rank"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="needs the key 'kv_lora_rank'"):
        load_model(str(folder))


def test_a_path_that_is_nothing_says_what_was_expected():
    with pytest.raises(ModelError, match=r"no folder '\./nowhere'; expected a folder, a hub id"):
        resolve("./nowhere")


def test_describe_reads_no_weight_and_knows_the_selectors(folder):
    facts = describe(str(folder))
    assert facts["context_length"] == 4096
    assert facts["selectors"] == ("indexer", "oracle", "recency", "random")
    before = facts["fingerprint"]
    edit(folder, lambda t: t["model.norm.weight"].add_(1))
    assert describe(str(folder))["fingerprint"] != before


@pytest.mark.parametrize("kind", ["deepseek", "glm"])
def test_a_converted_folder_gives_the_same_logits_here_and_in_transformers(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    source = dsa_folder(kind)
    target = convert_folder(str(source), str(tmp_path / "converted"))
    ids = torch.randint(0, 320, (120,))
    expected = run(ours(source), ids, Attention(topk=48), [120])
    assert torch.equal(run(load_model(str(target), "float32"), ids, Attention(topk=48), [120]), expected)
    again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in ours(source).parameters())


def test_converting_into_a_folder_with_files_is_refused(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists and is not an empty folder"):
        convert_folder(str(folder), str(tmp_path / "full"))
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kind", ["deepseek", "glm"])
def test_a_stretched_folder_has_the_same_weights_and_yarn_for_the_longer_context(kind, tmp_path):
    source = dsa_folder(kind)
    before = load_config(str(source))
    target = convert_folder(str(source), str(tmp_path / "long"), context=16 * before.max_positions)
    after = load_config(str(target))
    assert after.max_positions == 16 * before.max_positions
    assert after.rope.kind == "yarn"
    assert after.rope.factor * after.rope.original_length == after.max_positions
    here, there = ours(source).state_dict(), load_model(str(target), "float32").state_dict()
    assert all(torch.equal(here[name], there[name]) for name in here)
    with pytest.raises(ModelError, match=f"more than the model's {before.max_positions} tokens, got 64"):
        convert_folder(str(source), str(tmp_path / "short"), context=64)

"""An indexer trained by warm-up alone is a folder of its own that joins the model it was trained for, and no other."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model.checkpoint import describe, load_model
from model.engine import LocalEngine
from model.errors import ModelError
from model.request import Attention, Request
from model.training.build import base_of, start_from
from model.training.checkpoint import Folder
from model.training.loop import Training
from tests.model.chat_tokenizers import write_byte_tokenizer
from tests.model.helpers import run
from tests.model.training.test_loop import CPU
from tests.model.training.toy import ToyCorpus, toy_config, toy_stage

SIZES = {"index_n_heads": 2, "index_head_dim": 16, "index_rope_dim": 8, "index_topk": 8}


def llama(folder, seed=0, layers=2):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return write_byte_tokenizer(folder, eos=257)


def train(source, out, *stages, seed=0):
    model, raw, folder = start_from(str(source), SIZES, seed)
    kept = Folder(raw=raw, tokenizer=folder, base=base_of(str(source)), indexer=SIZES)
    list(Training(model, kept, toy_config(*stages), ToyCorpus(), (), out, CPU).run())
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("base") / "source")


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    return train(source, tmp_path_factory.mktemp("out"), toy_stage("warmup", 6))


def test_the_joined_model_is_the_trained_one(source, trained):
    joined = load_model(str(source), "bfloat16", indexer=str(trained / "indexer"))
    whole = load_model(str(trained / "model"), "bfloat16")
    assert joined.config.indexer == whole.config.indexer
    wanted = whole.state_dict()
    for name, tensor in joined.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    ids = torch.randint(0, 320, (40,))
    assert torch.equal(run(joined, ids, Attention(topk=8), [40]), run(whole, ids, Attention(topk=8), [40]))
    assert not torch.equal(run(joined, ids, Attention(topk=8), [40]), run(joined, ids, Attention(), [40]))


def test_the_folder_holds_the_indexer_alone(source, trained):
    tensors = load_file(trained / "indexer" / "indexer.safetensors")
    assert len(tensors) == 2 * 5 and all(".self_attn.indexer." in name for name in tensors)
    assert tensors["model.layers.1.self_attn.indexer.wq_b.weight"].dtype == torch.bfloat16
    about = json.loads((trained / "indexer" / "indexer.json").read_text())
    assert about["config"] == SIZES
    assert about["base"] == {"name": "source", "weights": describe(str(source))["fingerprint"], "layers": 2}


def test_the_indexer_is_part_of_the_models_fingerprint(source, trained, tmp_path):
    bare, joined = describe(str(source)), describe(str(source), str(trained / "indexer"))
    assert bare["selectors"] == ("oracle", "recency", "random")
    assert "indexer" in joined["selectors"] and joined["topk"] == 8
    other = train(source, tmp_path, toy_stage("warmup", 6), seed=1)
    seen = {bare["fingerprint"], joined["fingerprint"], describe(str(source), str(other / "indexer"))["fingerprint"]}
    assert len(seen) == 3


def test_an_engine_serves_a_joined_indexer(source, trained):
    engine = LocalEngine(str(source), {"sparse": Attention(topk=8)}, indexer=str(trained / "indexer"))
    request = Request(id="a", variant="sparse", token_ids=tuple(range(40)), max_tokens=3)
    (result,) = engine.run([request])
    assert result.error is None and len(result.token_ids) >= 1


def test_a_training_that_changes_the_model_writes_no_indexer_apart(source, tmp_path):
    out = train(source, tmp_path, toy_stage("warmup", 1), toy_stage("sparse", 1))
    assert (out / "model").is_dir() and not (out / "indexer").exists()


def refused(path, indexer, message):
    for opened in (describe, lambda path, indexer: load_model(path, indexer=indexer)):
        with pytest.raises(ModelError, match=message) as caught:
            opened(str(path), str(indexer))
        assert "\n" not in str(caught.value)


def test_another_base_is_refused_in_a_line(trained, tmp_path):
    refused(
        llama(tmp_path / "other", seed=1), trained / "indexer",
        r"model\.indexer: indexer was trained on source with weights \w{12}…, .*other has \w{12}…: an indexer serves",
    )  # fmt: skip
    refused(
        llama(tmp_path / "deeper", layers=3), trained / "indexer",
        r"model\.indexer: indexer was trained for 2 layers of source, .*deeper has 3",
    )  # fmt: skip
    refused(trained / "model", trained / "indexer", r"model\.indexer: .*model has an indexer of its own")


def test_a_broken_indexer_is_refused_in_a_line(source, trained, tmp_path):
    refused(
        source, "nowhere", r"model\.indexer: no folder 'nowhere'; expected one with indexer\.json or a bundled name"
    )
    refused(source, tmp_path, r"model\.indexer: expected indexer\.json and indexer\.safetensors in ")
    folder = shutil.copytree(trained / "indexer", tmp_path / "indexer")
    tensors = load_file(folder / "indexer.safetensors")
    name = "model.layers.0.self_attn.indexer.wk.weight"
    save_file({**tensors, name: tensors[name][:8].clone()}, folder / "indexer.safetensors")
    refused(
        source, folder,
        r"indexer\.safetensors: 1 tensors do not fit the model, first .*wk\.weight: "
        r"expected shape \[16, 48\], got shape \[8, 48\]",
    )  # fmt: skip
    del tensors[name]
    save_file(tensors, folder / "indexer.safetensors")
    refused(source, folder, r"1 tensors do not fit the model, first .*wk\.weight: expected .*, got none")
    (folder / "indexer.json").write_text('{"base": {}}')
    refused(source, folder, r"indexer\.json: expected JSON with base \(name, weights, layers\) and config")

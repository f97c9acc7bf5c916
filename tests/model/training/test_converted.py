"""A grouped-query model gets an indexer: warm-up alone, its own weights untouched."""

import pytest
import torch
import transformers

from model.checkpoint import load_model
from model.errors import ModelError
from model.request import Attention
from model.training.build import start_from
from model.training.checkpoint import Folder
from model.training.forward import TrainingForward
from model.training.loop import Training
from tests.model.helpers import run
from tests.model.training.test_loop import CPU
from tests.model.training.toy import ToyCorpus, toy_config, toy_stage

SIZES = {"index_n_heads": 2, "index_head_dim": 16, "index_rope_dim": 8, "index_topk": 8}


@pytest.fixture
def source(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_the_training_forward_equals_the_engines(source):
    model, _, _ = start_from(str(source), SIZES, seed=0)
    ids = torch.randint(0, 64, (2, 40))
    for topk in (None, 8):
        with torch.no_grad():
            hidden = TrainingForward(model)(ids, topk=topk).hidden
            actual = (hidden @ model.lm_head.weight.T).unflatten(0, (2, 40))
        expected = torch.stack([run(model, row, Attention(topk=topk), [40]) for row in ids])
        assert float((actual - expected).abs().max()) <= 1e-4


def test_warm_up_trains_the_indexer_and_nothing_else(source, tmp_path):
    model, raw, folder = start_from(str(source), SIZES, seed=0)
    config = toy_config(toy_stage("warmup", 30), log_every=10)
    training = Training(model, Folder(raw=raw, tokenizer=folder), config, ToyCorpus(), (), tmp_path / "out", CPU)
    losses = [e.values["loss_indexer"] for e in training.run() if e.kind == "step"]
    assert losses[-1] < losses[0]
    before, after = load_model(str(source)), load_model(str(tmp_path / "out" / "model"))
    assert after.config.indexer is not None and after.config.indexer.rope_dim == 8
    mine = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, mine[name]), name
    run(after, torch.randint(0, 64, (40,)), Attention(topk=8), [40])


def test_an_indexer_is_asked_for_where_there_is_none(source):
    with pytest.raises(ModelError, match=r"has no indexer: add model\.indexer"):
        start_from(str(source), None, seed=0)

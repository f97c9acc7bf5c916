"""The loop end to end on a toy model: it learns, resumes to the step, stops on nonsense and writes what others load."""

import json

import numpy as np
import pytest
import torch
import transformers

from model.checkpoint import load_model
from model.errors import ModelError
from model.request import Attention
from model.training import loop
from model.training.batch import Batch
from model.training.build import new_model
from model.training.checkpoint import Folder, latest
from model.training.loop import Training
from model.training.world import World
from tests.model.helpers import run
from tests.model.training.toy import RAW, ToyCorpus, toy_config, toy_held_out, toy_stage

CPU = World(rank=0, size=1, device=torch.device("cpu"))
THREE = (toy_stage("dense"), toy_stage("warmup", 6), toy_stage("sparse", 6))


def training(out, config, corpus=None, held_out=(), raw=RAW, seed=0):
    model = new_model(raw, seed)
    return Training(model, Folder(raw=raw, tokenizer=None), config, corpus or ToyCorpus(), held_out, out, CPU)


def state(trained):
    return {name: t.clone() for name, t in trained.model.state_dict().items()}


def test_the_loss_falls_in_every_stage(tmp_path):
    stages = (toy_stage("dense", 150), toy_stage("warmup", 40), toy_stage("sparse", 20))
    events = list(training(tmp_path, toy_config(*stages, log_every=10, recall_topk=8), held_out=toy_held_out()).run())
    lines = {s.name: [e.values for e in events if e.kind == "step" and e.stage == s.name] for s in stages}
    assert lines["dense"][-1]["loss_answer"] < 0.8 * lines["dense"][0]["loss_answer"]
    assert lines["warmup"][-1]["loss_indexer"] < 0.7 * lines["warmup"][0]["loss_indexer"]
    assert "loss_answer" not in lines["warmup"][-1]
    assert set(lines["sparse"][-1]["kl"]) == {"0", "1"}
    checks = [e for e in events if e.kind == "evaluation"]
    assert [(e.stage, e.values["mode"]) for e in checks] == [
        ("dense", "dense"), ("warmup", "dense"), ("sparse", "dense"), ("sparse", "sparse"),
    ]  # fmt: skip
    assert all(0 <= e.values["accuracy"]["repeat"] <= 1 for e in checks)
    assert checks[2].values["mass"]["1"] <= checks[2].values["oracle_mass"]["1"]


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    whole = training(tmp_path / "whole", toy_config(*THREE))
    list(whole.run())
    config = toy_config(*THREE, checkpoint_every=3)
    first = training(tmp_path / "cut", config)
    for event in first.run():
        if event.kind == "checkpoint" and event.stage == "sparse":
            break  # killed in the middle of the sparse stage, after its third step
    second = training(tmp_path / "cut", config, seed=5)
    second.resume()
    assert (second.progress.stage, second.progress.step, second.progress.total_steps) == (2, 3, 17)
    list(second.run())
    for name, tensor in state(whole).items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_the_warm_up_leaves_the_main_model_alone_bit_for_bit(tmp_path):
    trained = training(tmp_path, toy_config(toy_stage("warmup", 5)))
    before = state(trained)
    list(trained.run())
    for name, tensor in state(trained).items():
        assert torch.equal(tensor, before[name]) == (".indexer." not in name), name


def test_a_dense_stage_leaves_the_indexer_alone(tmp_path):
    trained = training(tmp_path, toy_config(toy_stage("dense", 5)))
    before = state(trained)
    list(trained.run())
    assert all(torch.equal(t, before[name]) for name, t in state(trained).items() if ".indexer." in name)


def test_checkpoints_open_in_our_engine_and_in_transformers(tmp_path):
    trained = training(tmp_path, toy_config(*THREE))
    list(trained.run())
    ids = torch.randint(1, 32, (8,))
    with torch.inference_mode():
        expected = trained.checking(ids[None]).hidden @ trained.model.lm_head.weight.T
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
        )(ids[None]).logits[0]
    ours = run(load_model(str(tmp_path / "model")), ids, Attention(), [8])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "deepseek_v32"
    assert not (tmp_path / "model" / "training").exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    trained = training(tmp_path, toy_config(toy_stage("dense", 12), checkpoint_every=4))
    events = trained.run()
    while next(events).kind != "checkpoint":
        pass
    with torch.no_grad():
        trained.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"loss of step 5 is no number; layer 1 .* checkpoint is .*step-00000004"):
        list(events)
    kept = load_model(str(latest(tmp_path)))
    assert all(bool(p.isfinite().all()) for p in kept.parameters())


def test_a_checkpoint_of_another_architecture_is_refused_in_a_line(tmp_path):
    list(training(tmp_path, toy_config(toy_stage("dense", 2))).run())
    other = training(tmp_path, toy_config(toy_stage("dense", 2)), raw={**RAW, "q_lora_rank": 16})
    with pytest.raises(ModelError, match=r"another architecture: .* tensors differ, first"):
        other.resume()


def test_a_batch_that_cannot_fit_names_the_largest_that_would(tmp_path, monkeypatch):
    import model.training.loop

    monkeypatch.setattr(model.training.loop, "free_bytes", lambda device: 8 << 20)
    trained = training(tmp_path, toy_config(toy_stage("dense"), batch_tokens=1 << 16))
    with pytest.raises(ModelError, match=r"stages\.dense: 65536 tokens a step need about .* batch_tokens .* is \d+"):
        next(trained.run())


def test_seconds_end_a_stage_and_let_the_learning_rate_fall(tmp_path):
    trained = training(tmp_path, toy_config(toy_stage("dense", None, seconds=0.4)))
    events = list(trained.run())
    assert 2 < trained.progress.total_steps < 1000
    assert events[-1].kind == "checkpoint"


def test_waiting_for_a_batch_is_time_of_the_stage_and_the_first_step_is_not(tmp_path, monkeypatch):
    now = [0.0]

    class Slow(loop.Feed):
        def __next__(self):
            now[0] += 10.0
            return super().__next__()

    monkeypatch.setattr(loop, "Feed", Slow)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    trained = training(tmp_path, toy_config(toy_stage("dense", 50, seconds=45.0), checkpoint_every=3))
    list(trained.run())
    assert trained.progress.total_steps == 6, "five of ten seconds each, behind one that does not count"


def test_an_error_of_the_corpus_reaches_the_user(tmp_path):
    class Broken(ToyCorpus):
        def stream(self, stage, first_step, share):
            yield next(super().stream(stage, first_step, share))
            raise ModelError("corpus: the folder is empty")

    with pytest.raises(ModelError, match="the folder is empty"):
        list(training(tmp_path, toy_config(toy_stage("dense")), corpus=Broken()).run())


def test_padding_is_never_trained_on(tmp_path):
    """Tokens of weight 0 may be anything: the weights after a step are the same."""

    class Padded(ToyCorpus):
        def __init__(self, filler):
            super().__init__()
            self.filler = filler

        def stream(self, stage, first_step, share):
            for batch in super().stream(stage, first_step, share):
                ids, weights = batch.token_ids.copy(), batch.weights.copy()
                ids[:, 12:], weights[:, 12:] = self.filler, 0.0
                yield Batch(token_ids=ids, weights=weights, is_answer=batch.is_answer & (np.arange(16) < 12))

    ends = []
    for filler in (0, 7):
        trained = training(tmp_path / str(filler), toy_config(toy_stage("dense", 1)), corpus=Padded(filler))
        list(trained.run())
        ends.append(state(trained)["layers.1.self_attn.o_proj.weight"])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)

"""Our engine and lm-eval's `hf` model on the same questions: in float32 they give the same answers."""

import json

import pytest
import yaml
from sums import write_sums

from harness import against
from harness.against import bench_lm_eval
from harness.engine import ModelError
from harness.errors import HarnessError
from tests.harness.tiny_model import tiny_llama


@pytest.fixture
def config(tmp_path):
    tiny_llama(tmp_path / "model")
    write_sums(tmp_path / "sums.jsonl", 5)
    settings = {
        "name": "against",
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "variants": {"recency": {"topk": 8, "selector": "recency"}, "dense": {"topk": None}},
        "tasks": [
            {"task": "aime25", "data": str(tmp_path / "sums.jsonl"), "repeats": 2, "generation": {"max_tokens": 12}},
            {"task": "niah_single_1", "lengths": [600], "depths": 2, "samples": 1, "generation": {"max_tokens": 9}},
        ],
    }
    path = tmp_path / "against.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def test_answers_are_those_of_transformers_whatever_the_batch(config, tmp_path, capsys):
    out = tmp_path / "out" / "against.json"
    measured = bench_lm_eval(config, None, 3, out)
    assert measured["samples"] == 7, "five sums once, two needles"
    assert measured["other_answers"] == []
    assert measured["same_answers"] == 7
    assert measured["prompts_that_differ"] == 0
    assert measured["completion_tokens"] > 7
    assert json.loads(out.read_text())["samples_per_second"] > 0
    assert "7 of 7 answers are the same" in capsys.readouterr().out


def test_the_dtype_of_both_sides_can_be_given(config, monkeypatch):
    settings = yaml.safe_load(config.read_text())
    settings["model"]["dtype"] = "bfloat16"
    config.write_text(yaml.safe_dump(settings))
    opened = []
    for name in ("open_engine", "open_peer"):
        right = getattr(against, name)

        def kept(*given, right=right, **options):
            opened.append(options.get("dtype") or given[0].dtype)
            return right(*given, **options)

        monkeypatch.setattr(against, name, kept)
    measured = bench_lm_eval(config, 1, 2, None, "float32")
    assert opened == ["float32", "float32"] and measured["dtype"] == "float32"
    assert measured["same_answers"] == measured["samples"]


def test_answers_that_differ_are_shown(config, monkeypatch):
    from harness.taskset import Peer

    right = Peer.answer
    monkeypatch.setattr(Peer, "answer", lambda self, asked: ["no", *right(self, asked)[1:]])
    measured = bench_lm_eval(config, 1, 2, None)
    assert measured["same_answers"] == measured["samples"] - 1
    assert measured["other_answers"][0]["theirs"] == "no"


def test_a_model_that_transformers_cannot_open_is_refused_in_one_line(config, tmp_path):
    from harness.engine import convert

    convert(str(tmp_path / "model"), str(tmp_path / "converted"))
    settings = yaml.safe_load(config.read_text())
    settings["model"]["path"] = str(tmp_path / "converted")
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(ModelError, match="expected a checkpoint that transformers reads"):
        bench_lm_eval(config, 1, 2, None)
    settings["model"] = {"scripted": "gold"}
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(HarnessError, match="expected a local checkpoint"):
        bench_lm_eval(config, 1, 2, None)

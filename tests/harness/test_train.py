"""`dsa-eval train` from YAML to a folder that loads, and what is wrong with a config in one line."""

import io
import json
from pathlib import Path

import pytest
import yaml

from harness.engine import TrainingEvent
from harness.errors import HarnessError
from harness.train import train
from harness.train_config import load_train_config
from harness.train_log import TrainLog, cut_after

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "train").glob("*.yaml"))


def small(tmp_path, **changes):
    """The CPU recipe with one-second stages over a made-up book."""
    raw = yaml.safe_load((ROOT / "configs/train/dsa-tiny-cpu.yaml").read_text())
    books = tmp_path / "books"
    books.mkdir(exist_ok=True)
    for name in ("train", "held"):
        (books / f"{name}.txt").write_text("The cat sat on the mat. A dog ran by the old red house. " * 300)
    raw["corpus"] = {"books": str(books), "held_out_books": ["held"]}
    raw["model"]["tokenizer"] = str(ROOT / raw["model"]["tokenizer"])
    raw |= {"log_every": 2, "batch_tokens": 1024}
    for stage in raw["stages"]:
        stage |= {"steps": 4, "lengths": {0.0: {256: 1}}}
        stage.pop("seconds")
    raw["evaluation"] |= {"rows": 2}
    for key, value in changes.items():
        raw[key] = value
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_training_leaves_a_model_metrics_and_checkpoints(tmp_path, capsys):
    path = small(tmp_path)
    train(path, out=tmp_path / "out", resume=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"stage", "step", "evaluation", "checkpoint"}
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "config.yaml").read_bytes() == path.read_bytes()
    shown = capsys.readouterr().out
    assert "dense 2/4: answers" in shown and "warmup: warmup stage" in shown
    with pytest.raises(HarnessError, match="not empty: go on with --resume"):
        train(path, out=tmp_path / "out", resume=False)
    train(path, out=tmp_path / "out", resume=True)  # finished: nothing is trained, nothing is logged twice
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_valid(path):
    config = load_train_config(path)
    assert config.training().stages and config.corpus_config().lengths


def test_shares_of_a_stage_become_steps_of_the_corpus():
    lengths = load_train_config(ROOT / "configs/train/dsa-tiny.yaml").corpus_config().lengths
    assert [phase.until for phase in lengths["dense"]] == [630, 1170, 2070, 4950, None]


def cut(raw, key):
    raw = json.loads(json.dumps(raw))
    raw.pop(key)
    return raw


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_token": 5}, "batch_token: unknown key; the nearest is 'batch_tokens'"),
        ({"batch_tokens": 1000}, "batch_tokens 1000 is no multiple of 256"),
        ({"model": {"start": "x", "tokenizer": "y"}}, "expected tokenizer beside new"),
        ({"model": {"new": {}, "start": "x"}}, "expected one of"),
        ({"precision": "float16"}, "precision: expected 'float32' or 'bfloat16'"),
    ],
)
def test_a_bad_config_is_told_in_a_line(tmp_path, changes, message):
    with pytest.raises(HarnessError, match=message) as caught:
        load_train_config(small(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_there_is_told_in_a_line(tmp_path):
    path = small(tmp_path)
    raw = yaml.safe_load(path.read_text())
    raw["model"]["tokenizer"] = str(tmp_path / "none")
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(HarnessError, match=r"model\.tokenizer: .* does not exist"):
        train(path, out=tmp_path / "out", resume=False)


def event(step, total, **values):
    counts = {"total_steps": total, "tokens": 0, "seconds": 0.0, "tokens_per_second": 5.0}
    return TrainingEvent(kind="step", stage="dense", step=step, steps=9, values={**counts, **values})


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    shown = io.StringIO()
    with TrainLog(path, shown) as log:
        for step in (1, 2, 3):
            log.add(event(step, step, loss_answer=0.5))
    with path.open("a") as file:
        file.write('{"total_st')  # a killed process
    cut_after(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert shown.getvalue().splitlines()[0] == "dense 1/9: answers 0.500, 5 tokens/s"

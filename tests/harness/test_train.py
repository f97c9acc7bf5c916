"""`dsa-eval train` from YAML to a folder that loads, and what is wrong with a config in one line."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from harness.config import LocalModel
from harness.engine import (
    Attention,
    ModelError,
    Request,
    TrainingEvent,
    describe_model,
    open_engine,
    weight_bytes,
)
from harness.errors import HarnessError
from harness.train import train
from harness.train_config import load_train_config
from harness.train_log import TrainLog, cut_after
from tests.harness.tiny_model import tiny_llama

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
    assert [phase.until for phase in lengths["dense"]] == [665, 1235, 2185, 5225, None]


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


def warm_up(tmp_path, peak, **changes):
    """A warm-up alone of a tiny grouped-query model in its own tokens."""
    if not (tmp_path / "llama").exists():
        tiny_llama(tmp_path / "llama")
    sizes = {"index_n_heads": 2, "index_head_dim": 16, "index_rope_dim": 8, "index_topk": 8}
    stage = {"name": "warmup", "kind": "warmup", "steps": 4, "indexer": {"peak": peak}, "lengths": {0.0: {256: 1}}}
    return small(
        tmp_path, model={"start": str(tmp_path / "llama"), "indexer": sizes}, stages=[stage],
        evaluation={"lengths": [512], "rows": 2, "tasks": ["single_book"], "recall_topk": 32}, **changes,
    )  # fmt: skip


def test_a_warm_up_alone_leaves_an_indexer_that_a_run_can_join(tmp_path, capsys):
    train(warm_up(tmp_path, 1e-3), out=tmp_path / "out", resume=False)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "indexer")
    choices = [
        LocalModel(path=str(tmp_path / "llama"), indexer=indexer) for indexer in (None, str(tmp_path / "out/indexer"))
    ]
    bare, joined = (describe_model(choice) for choice in choices)
    assert "indexer" in joined.selectors and "indexer" not in bare.selectors
    assert joined.fingerprint != bare.fingerprint
    engine = open_engine(choices[1], {"sparse": Attention(topk=8)})
    (result,) = engine.run([Request(id="a", variant="sparse", token_ids=tuple(range(64)), max_tokens=2)])
    assert result.error is None
    assert weight_bytes(choices[1]) > weight_bytes(choices[0])


def test_a_loss_that_is_no_number_names_step_layer_and_the_last_good_checkpoint(tmp_path):
    path = warm_up(tmp_path, 1e30, checkpoint_every=1, log_every=1)
    with pytest.raises(ModelError) as caught:
        train(path, out=tmp_path / "out", resume=False)
    said = str(caught.value)
    assert re.search(r"^stages\.warmup: the loss of step \d is no number; layer \d is the first whose indexer's", said)
    kept = re.search(r"the last good checkpoint is (\S+)$", said)
    assert kept is not None and (Path(kept[1]) / "training" / "progress.json").is_file()


def test_a_checkpoint_of_another_architecture_is_not_resumed(tmp_path):
    path = warm_up(tmp_path, 1e-3)
    train(path, out=tmp_path / "out", resume=False)
    shutil.rmtree(tmp_path / "llama")
    tiny_llama(tmp_path / "llama", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"a checkpoint of another architecture: \d+ tensors differ, first layers\.2"):
        train(path, out=tmp_path / "out", resume=True)


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

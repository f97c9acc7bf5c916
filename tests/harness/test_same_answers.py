"""Workers, batches and company change no answer: one real tiny model, run in four ways, recall included."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from sums import write_sums

from harness import replicas, work_queue
from harness.run import run
from model import engine
from tests.harness.tiny_model import tiny_model, write_calls

TIMING = ("seconds",)
GREEDY = {"temperature": 0.0, "max_tokens": 6}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("same")
    tiny_model(home / "model")
    write_sums(home / "sums.jsonl", 2)
    write_calls(home / "bfcl", 3)
    hot = {"temperature": 1.0, "max_tokens": 6}
    settings = {
        "name": "same",
        "model": {"path": str(home / "model")},
        "variants": {"dense": {"topk": None}, "sparse": {"topk": 64}},
        "tasks": [
            {"task": "niah_multikey_1", "lengths": [800], "depths": 2, "samples": 1, "generation": GREEDY},
            {"task": "tool_use", "categories": ["simple_python"], "data": str(home / "bfcl"), "generation": GREEDY},
            {"task": "aime25", "data": str(home / "sums.jsonl"), "repeats": 2, "generation": hot},
        ],
        "recall": {"queries": 6, "ks": [32, 64]},
        "compare": {"baseline": "dense", "margin": {"default": 0.05}},
    }
    (home / "a.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return home / "a.yaml"


@pytest.fixture(scope="module")
def undisturbed(experiment: Path) -> Path:
    return run(experiment, out=experiment.parent / "here", replicas=0)


def answers(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Journal lines by key, without how long they took."""
    lines = [json.loads(line) for path in (folder / "journal").glob("*.jsonl") for line in path.open()]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: {name: line[name] for name in line if name not in TIMING} for line in lines}


def tables(folder: Path) -> list[Any]:
    results, comparison = (json.loads((folder / f"{name}.json").read_text()) for name in ("results", "comparison"))
    del results["created"]
    return [results, comparison]


def parts(folder: Path) -> dict[str, Any]:
    root = folder / "recall"
    return {
        path.relative_to(root).as_posix(): pyarrow.parquet.read_table(path).to_pydict()
        for path in root.rglob("*.parquet")
    }


def assert_same(folder: Path, other: Path) -> None:
    mine, theirs = answers(folder), answers(other)
    assert mine.keys() == theirs.keys() and len(mine) == 2 * (2 + 3 + 2 * 2)
    for key, line in mine.items():
        assert line == theirs[key]
    assert repr(parts(folder)) == repr(parts(other))  # NaN equals itself in writing
    assert tables(folder) == tables(other)


def test_the_answers_are_a_models_and_not_all_one(undisturbed: Path) -> None:
    texts = [line["responses"][0]["text"] for line in answers(undisturbed).values()]
    assert len(set(texts)) > len(texts) // 3
    recall = json.loads((undisturbed / "results.json").read_text())["recall"]
    assert {row["trajectory"] for row in recall} == {"dense", "sparse"}


@pytest.mark.parametrize("batch", [1, 3])
def test_other_batch_sizes_give_the_same(
    experiment: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(replicas, "MAX_BATCH", batch)
    assert_same(run(experiment, out=tmp_path / "run", replicas=0), undisturbed)


def test_another_order_gives_the_same(
    experiment: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reversed(work_queue.WorkQueue):
        def take(self) -> work_queue.Batch | None:
            self._waiting.reverse()
            return super().take()

    monkeypatch.setattr(replicas, "WorkQueue", Reversed)
    assert_same(run(experiment, out=tmp_path / "run", replicas=0), undisturbed)


@pytest.mark.parametrize("num", [1, 2])
def test_one_worker_or_two_give_the_same(experiment: Path, undisturbed: Path, tmp_path: Path, num: int) -> None:
    assert_same(run(experiment, out=tmp_path / "run", replicas=num), undisturbed)


def test_the_check_sees_one_changed_answer(undisturbed: Path, experiment: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 192)  # a chunk that moves changes last bits, and so random choices
    other = run(experiment, out=tmp_path / "run", replicas=0)
    with pytest.raises(AssertionError):
        assert_same(other, undisturbed)

"""One folder that grows, and two folders that are held together: what is run again, and what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sums import write_sums

from harness import cli
from tests.harness.tiny_model import tiny_model

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Call:
    """The command line in a folder with ten sums: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    write_sums(tmp_path / "sums.jsonl", 10)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsa-eval", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capfd.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return call


def sums(**changes: Any) -> dict[str, Any]:
    generation = {"temperature": 0.0, "max_tokens": 4}
    return {"task": "aime25", "data": "sums.jsonl", "generation": generation, **changes}


def write(**changes: Any) -> str:
    settings = {
        "name": "grows",
        "model": {"scripted": "gold"},
        "variants": {"right": {}, "wrong": {"model": {"scripted": "wrong"}}},
        "tasks": [sums(samples=4)],
        "compare": {"baseline": "right", "margin": {"default": 0.05}},
    }
    Path("a.yaml").write_text(yaml.safe_dump({**settings, **changes}, sort_keys=False))
    return "a.yaml"


def go(call: Call, config: str, out: str = "run") -> str:
    code, said, errors = call("run", config, "--replicas", "0", "--out", out)
    assert (code, errors) == (0, "")
    return said


def num_lines(out: str = "run") -> int:
    return sum(len(path.read_text().splitlines()) for path in Path(out, "journal").glob("*.jsonl"))


def scores(out: str = "run") -> dict[tuple[str, str], tuple[float, int]]:
    results = json.loads(Path(out, "results.json").read_text())
    return {
        (cell["task"], cell["variant"]): (cell["mean"], cell["n"])
        for cell in results["cells"]
        if cell["headline"] and not cell["group"]
    }


def test_more_samples_then_a_task_then_nothing(call: Call) -> None:
    go(call, write())
    assert num_lines() == 8
    before = Path("run/journal/right.jsonl").read_text()
    assert "20 samples, 8 done before" in go(call, write(tasks=[sums(samples=10)]))
    assert num_lines() == 20 and Path("run/journal/right.jsonl").read_text().startswith(before)
    both = [sums(samples=10), {"task": "niah_single_1", "lengths": [700], "depths": 2, "samples": 1}]
    assert "24 samples, 20 done before" in go(call, write(tasks=both))
    assert scores() == {
        ("aime25", "right"): (1.0, 10), ("aime25", "wrong"): (0.0, 10),
        ("niah_single_1", "right"): (1.0, 2), ("niah_single_1", "wrong"): (0.0, 2),
    }  # fmt: skip
    assert "24 samples, 24 done before" in go(call, write(tasks=both))
    assert num_lines() == 24


def test_fewer_samples_are_tabled_and_the_rest_is_kept(call: Call) -> None:
    go(call, write(tasks=[sums()]))
    go(call, write(tasks=[sums(samples=4)]))
    assert scores()["aime25", "right"] == (1.0, 4) and num_lines() == 20
    assert "20 samples, 20 done before" in go(call, write(tasks=[sums()]))


def test_a_margin_is_no_reason_to_run_anything(call: Call) -> None:
    go(call, write())
    assert "8 done before" in go(call, write(compare={"baseline": "wrong", "margin": {"default": 0.5}}))
    assert json.loads(Path("run/comparison.json").read_text())["baseline"] == "wrong"


def test_a_line_cut_in_half_is_run_again(call: Call) -> None:
    config = write()
    go(call, config)
    before = Path("run/results.json").read_text()
    journal = Path("run/journal/right.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0][:50] + "\n", *lines[1:-1], lines[-1][:70]]))
    said = go(call, config)
    assert "8 samples, 6 done before" in said and "2 journal lines were cut in half" in said
    assert num_lines() == 8 and Path("run/results.json").read_text() == before


def test_recall_can_be_added_and_changes_no_answer(call: Call, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    local = {"model": {"path": "model"}, "variants": {"right": {"topk": None}, "wrong": {"topk": 16}}}
    go(call, write(**local, tasks=[sums(samples=2)]))
    assert num_lines() == 4 and json.loads(Path("run/results.json").read_text())["recall"] == []
    go(call, write(**local, tasks=[sums(samples=2)], recall={"queries": 4, "ks": [16]}))
    assert num_lines() == 8  # a sample with probes is another one: the same answer, with recall beside it
    texts: dict[Any, set[str]] = {}
    for path in Path("run/journal").glob("*.jsonl"):
        for line in map(json.loads, path.open()):
            texts.setdefault((line["variant"], line["doc_id"]), set()).add(line["responses"][0]["text"])
    assert all(len(found) == 1 for found in texts.values())
    results = json.loads(Path("run/results.json").read_text())
    assert {cell["n"] for cell in results["cells"] if cell["headline"]} == {2}
    assert {row["selector"] for row in results["recall"] if row["variant"] == "right"} >= {"indexer", "oracle"}


# Two runs, and two models in one run.


def test_runs_of_other_data_are_refused_and_the_data_named(call: Call) -> None:
    needles = [{"task": "niah_single_1", "lengths": [700], "depths": 2, "samples": 1}]
    go(call, write(tasks=needles), "first")
    go(call, write(tasks=needles, seed=1), "second")
    code, _, errors = call("compare", "first", "second")
    assert code == 2 and errors.count("\n") == 1
    assert "niah_single_1: 2 of 2 documents differ" in errors and "first: doc" in errors and "hash" in errors


def test_runs_of_other_prompts_are_refused_and_the_prompt_named(call: Call, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    one = {"dense": {"topk": None}}
    compare = {"baseline": "dense", "margin": {"default": 0.05}}
    for out, template in (("first", None), ("second", False)):
        model = {"path": "model", "chat_template": template}
        go(call, write(model=model, variants=one, tasks=[sums(samples=2)], compare=compare), out)
    code, _, errors = call("compare", "first", "second")
    assert code == 2 and "aime25: 2 of 2 documents differ" in errors and "its prompt hash" in errors


def test_runs_of_other_weights_need_across_weights_and_say_so(call: Call) -> None:
    one = {"variants": {"only": {}}, "compare": {"baseline": "only", "margin": {"default": 0.05}}}
    go(call, write(**one), "first")
    go(call, write(**one, model={"scripted": "wrong"}), "second")
    code, _, errors = call("compare", "first", "second")
    assert code == 2 and "other weights for only" in errors and "comparing two models needs --across-weights" in errors
    code, said, errors = call("compare", "first", "second", "--across-weights")
    assert (code, errors) == (0, "")
    assert said.rstrip().endswith("The weights differ.")


def test_two_models_in_one_run_are_marked_in_every_table(call: Call) -> None:
    said = go(call, write(variants={"right": {}, "same": {}, "wrong": {"model": {"scripted": "wrong"}}}))
    sentences = [line for line in said.splitlines() if line.startswith("aime25") or " aime25" in line]
    assert any(line.endswith("The weights differ.") for line in sentences), said
    rows = {row["variant"]: row for row in json.loads(Path("run/comparison.json").read_text())["rows"]}
    assert (rows["wrong"]["weights_differ"], rows["same"]["weights_differ"]) == (True, False)
    assert "weights" not in rows["same"]["sentence"]
    assert call("publish", "run")[0] == 0
    readme = Path("results/grows/README.md").read_text()
    assert readme.count("(other weights)") == 1 and "The weights differ." in readme
    assert "other weights" in Path("results/grows/report.html").read_text()


def test_a_publication_carries_version_shots_and_the_extracted_answers(call: Call) -> None:
    go(call, write())
    call("publish", "run")
    (path,) = Path("results/grows/lm_eval/right").glob("results_*.json")
    content = json.loads(path.read_text())
    assert (content["versions"], content["n-shot"]) == ({"aime25": "1"}, {"aime25": 0})
    disagreement = json.loads(Path("run/comparison.json").read_text())["disagreements"][0]
    right, wrong = (int(disagreement["answers"][variant]) for variant in ("right", "wrong"))
    assert wrong == right + 1

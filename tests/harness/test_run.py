"""One command from config to tables, given again, given more, given something that cannot work."""

import dataclasses
import json
import random
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from harness.compare_runs import compare_runs
from harness.engine import Request, Result, Usage
from harness.errors import HarnessError
from harness.journal import lock, read_journal
from harness.plan import PlannedItem
from harness.rescore import rescore
from harness.run import make_record, run
from harness.scripted import ByteEncoding
from harness.work_queue import Finished
from tests.harness.chat_server import ChatServer
from tests.harness.sums import answer, config, task


@pytest.fixture(autouse=True)
def sums(server: ChatServer) -> None:
    server.reply = answer


def go(path: Path, out: Path | None = None, **options: Any) -> Path:
    return run(path, out=out or path.parent / "run", replicas=0, **options)


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def headline(folder: Path) -> dict[str, tuple[float, int, int]]:
    """(mean, answered docs, errors) by variant."""
    return {
        cell["variant"]: (cell["mean"], cell["n"], cell["errors"])
        for cell in results(folder)["cells"]
        if cell["headline"] and not cell["group"]
    }


def test_a_run_leaves_everything_that_its_tables_are_made_from(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = go(config(tmp_path, server))
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {
        ".lock", "config.yaml", "manifest.json", "docs/aime25.jsonl", "journal/dense.jsonl", "journal/sparse.jsonl",
        "results.json", "comparison.json", "report.html",
    }  # fmt: skip
    right, total, errors = headline(folder)["dense"]
    assert (right, total, errors) == (1.0, 20, 0)
    assert 0.3 < headline(folder)["sparse"][0] < 1.0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(folder / "report.html")
    assert any(line.startswith("sparse") and "dense" in line for line in said[-4:])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema"] == 1 and manifest["versions"]["python"] and manifest["device"]
    assert manifest["weights"]["dense"] != manifest["weights"]["sparse"]


def test_the_folder_is_named_after_the_experiment(
    tmp_path: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run(config(tmp_path, server, num=2), replicas=0)
    assert folder.parent == Path("runs") and folder.name.startswith("sums-") and folder.is_dir()


def test_the_same_command_again_asks_nothing_and_changes_no_byte(tmp_path: Path, server: ChatServer) -> None:
    path = config(tmp_path, server)
    folder = go(path)
    before = {name: (folder / name).read_bytes() for name in ("results.json", "comparison.json", "journal/dense.jsonl")}
    asked = len(server.bodies)
    go(path)
    assert len(server.bodies) == asked == 40
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_more_samples_and_tasks_run_only_what_is_missing(tmp_path: Path, server: ChatServer) -> None:
    go(config(tmp_path, server, tasks=[task(tmp_path, samples=5)]))
    assert len(server.bodies) == 10
    folder = go(config(tmp_path, server, tasks=[task(tmp_path, samples=8), task(tmp_path, name="again", samples=2)]))
    assert len(server.bodies) == 10 + 6 + 4
    assert results(folder)["tasks"] == ["aime25", "again"]
    assert headline(folder)["dense"][1] in (8, 2)


def test_a_limit_takes_the_first_docs_and_can_be_lifted(tmp_path: Path, server: ChatServer) -> None:
    path = config(tmp_path, server)
    assert headline(go(path, limit=3))["dense"][1] == 3
    assert headline(go(path))["dense"][1] == 20
    assert len(server.bodies) == 40


def test_tables_do_not_depend_on_the_order_in_which_answers_arrived(tmp_path: Path, server: ChatServer) -> None:
    folder = go(config(tmp_path, server))
    before = {name: (folder / name).read_bytes() for name in ("results.json", "comparison.json")}
    for path in (folder / "journal").glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        random.shuffle(lines)
        path.write_text("".join(lines))
    assert rescore([folder]) == folder
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_failed_sample_is_an_error_and_no_wrong_answer_and_is_tried_again(tmp_path: Path, server: ChatServer) -> None:
    def refuse(body: Any) -> tuple[int, Any]:
        return (400, {"error": {"message": "no"}}) if "What is 3 +" in body["messages"][-1]["content"] else answer(body)

    server.reply = refuse
    path = config(tmp_path, server)
    folder = go(path)
    assert headline(folder)["dense"] == (1.0, 19, 1)
    server.reply = answer
    go(path)
    assert headline(folder)["dense"] == (1.0, 20, 0)
    keys = [record.key for record in read_journal(folder)]
    assert len(keys) == len(set(keys)) == 40


def test_a_journal_line_cut_in_half_is_run_again(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, server)
    folder = go(path)
    before = (folder / "results.json").read_bytes()
    journal = folder / "journal" / "dense.jsonl"
    journal.write_bytes(journal.read_bytes()[:-100])
    go(path)
    assert len(server.bodies) == 41
    assert "1 journal lines were cut in half" in capsys.readouterr().out
    assert (folder / "results.json").read_bytes() == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = go(config(tmp_path, server, num=4), dry_run=True)
    assert not folder.exists() and server.bodies == []
    cells = [cell.strip() for cell in capsys.readouterr().out.replace("│", "|").split("|")]
    assert {"aime25", "dense", "sparse", "256"} <= set(cells)  # 4 samples of at most 64 answer tokens


# What cannot work: one line each, before anything is asked.


def test_the_folder_of_another_experiment_is_refused(tmp_path: Path, server: ChatServer) -> None:
    go(config(tmp_path, server, num=2))
    with pytest.raises(HarnessError, match=r"run: holds the run sums-\w+, this config is other-\w+"):
        go(config(tmp_path, server, num=2, name="other"))
    with pytest.raises(HarnessError, match=r"run: holds the run sums-\w+, this config is sums-\w+"):
        go(config(tmp_path, server, num=2, seed=1))


def test_a_folder_of_another_schema_is_refused(tmp_path: Path, server: ChatServer) -> None:
    path = config(tmp_path, server, num=2)
    manifest = go(path) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 99}))
    for command in (lambda: go(path), lambda: rescore([manifest.parent])):
        with pytest.raises(HarnessError, match=r"manifest\.json: expected schema 1, got 99"):
            command()


def test_a_journal_without_a_manifest_is_not_overwritten(tmp_path: Path, server: ChatServer) -> None:
    path = config(tmp_path, server, num=2)
    (go(path) / "manifest.json").unlink()
    with pytest.raises(HarnessError, match=r"has a journal but no manifest\.json"):
        go(path)


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    path = config(tmp_path, server, num=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 2**20))
    with pytest.raises(HarnessError, match="run: 1 MiB free on this disk"):
        go(path)
    assert not (tmp_path / "run").exists() and server.bodies == []


def test_two_drivers_on_one_folder_are_refused(tmp_path: Path, server: ChatServer) -> None:
    with lock(tmp_path / "run"), pytest.raises(HarnessError, match="is already running in this folder"):
        go(config(tmp_path, server, num=2))
    assert server.bodies == []


def test_a_missing_margin_is_told_before_the_run(tmp_path: Path, server: ChatServer) -> None:
    with pytest.raises(HarnessError, match=r"compare\.margin: no margin for aime25 and no default"):
        go(config(tmp_path, server, num=2, compare={"baseline": "dense"}))
    assert server.bodies == []


def test_an_empty_disk_path_is_named_by_rescore(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"manifest\.json: no such file; is .* a run folder\?"):
        rescore([tmp_path])


# Several runs.


def test_merged_seeds_become_repeats(tmp_path: Path, server: ChatServer) -> None:
    warm = {"temperature": 1.0, "max_tokens": 64}
    tasks = [task(tmp_path, generation=warm, repeats=2)]
    runs = [go(config(tmp_path, server, num=6, seed=seed, tasks=tasks), tmp_path / f"s{seed}") for seed in (0, 1)]
    merged = rescore(runs)
    assert merged.parent == tmp_path and merged.name.startswith("sums-merged-")
    cell = next(cell for cell in results(merged)["cells"] if cell["headline"] and cell["variant"] == "dense")
    assert (cell["n"], cell["repeats"]) == (6, 4)
    assert rescore(runs) == merged
    keys = [record.key for record in read_journal(merged)]
    assert len(keys) == len(set(keys)) == 2 * 6 * 4


def test_merging_a_run_with_itself_counts_every_sample_once(tmp_path: Path, server: ChatServer) -> None:
    folder = go(config(tmp_path, server, num=4))
    assert headline(rescore([folder, folder])) == headline(folder)


def test_runs_of_other_data_are_not_merged(tmp_path: Path, server: ChatServer) -> None:
    first = go(config(tmp_path, server, num=4), tmp_path / "first")
    path = config(tmp_path, server, num=4)
    data = (tmp_path / "sums.jsonl").read_text().replace("What is 2 +", "How much is 2 +")
    (tmp_path / "sums.jsonl").write_text(data)
    second = go(path, tmp_path / "second")
    with pytest.raises(HarnessError, match=r"second: aime25, doc sum-002: other data than in the runs before"):
        rescore([first, second])
    with pytest.raises(HarnessError, match=r"aime25: 1 of 4 documents differ .* doc sum-002, its document hash"):
        compare_runs(first, second)


def test_runs_of_other_weights_need_to_be_told_so(tmp_path: Path, server: ChatServer) -> None:
    first = go(config(tmp_path, server, num=12), tmp_path / "first")
    weak = {"endpoint": server.url, "name": "weak"}
    second = go(config(tmp_path, server, num=12, model=weak), tmp_path / "second")
    for together in (lambda: compare_runs(first, second), lambda: rescore([first, second])):
        with pytest.raises(HarnessError, match=r"other weights for dense .* needs --across-weights"):
            together()
    found = compare_runs(first, second, across_weights=True)
    by_variant = {row["variant"].partition(" ")[0]: row for row in found["rows"]}
    assert by_variant["dense"]["difference"] < 0 and by_variant["dense"]["sentence"].endswith("The weights differ.")
    assert by_variant["sparse"]["difference"] == 0 and "weights differ" not in by_variant["sparse"]["sentence"]
    assert found["across_weights"] is True


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="expected two run folders"):
        compare_runs(tmp_path, tmp_path / "x" / "..")


# One record.


def test_a_number_that_is_none_is_an_error_of_that_sample(tmp_path: Path) -> None:
    request = Request(id="k/0", variant="v", token_ids=(1,), max_tokens=1, continuation=(2,))
    item = PlannedItem(
        key="k", variant="v", task="t", doc_id="d", repeat=0, group={}, cluster="d", doc_hash="h", prompt_hash="p",
        prompt_tokens=1, max_tokens=1, requests=(request,),
    )  # fmt: skip
    usage = Usage(prompt_tokens=1, completion_tokens=0)
    result = Result(
        id="k/0", token_ids=(), text="", finish_reason="scored", usage=usage, logprobs=(float("nan"),), is_greedy=False
    )
    record = make_record(tmp_path, Finished(item=item, results=(result,)), ByteEncoding())
    assert record.responses == () and record.error is not None and "not JSON compliant" in record.error
    fine = dataclasses.replace(result, logprobs=(-1.5,))
    assert make_record(tmp_path, Finished(item=item, results=(fine,)), ByteEncoding()).responses[0].logprob == -1.5

"""The journal survives a death at any byte, a full disk and a second driver."""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from harness.engine import ProbeResult
from harness.errors import HarnessError
from harness.files import check_space, write_whole
from harness.journal import Journal, journal_path, lock, read_journal, read_lines, to_line
from harness.parts import read_part, write_part
from harness.records import Record, Response


def record(key: str, **changes: object) -> Record:
    response = Response(text="42 🙂", answer="42", finish_reason="stop", completion_tokens=2)
    made = Record(
        key=key,
        variant="dense",
        task="sums",
        doc_id=key,
        repeat=0,
        group={"length": 4096, "depth": 50.0},
        cluster=key,
        doc_hash="d",
        prompt_hash="p",
        prompt_tokens=7,
        responses=(response,),
        max_tokens=16,
        seconds=0.5,
        recall={"trajectory": "dense", "active_share": None, "trivial": 0, "rows": []},
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_what_is_appended_is_read_back_equal(tmp_path: Path) -> None:
    written = [record("a"), record("b", repeat=3, responses=())]
    with Journal(tmp_path, ["dense"]) as journal:
        for line in written:
            journal.append(line)
    assert read_journal(tmp_path) == written


def test_a_cut_at_any_byte_loses_that_sample_only_and_nothing_merges(tmp_path: Path) -> None:
    path = journal_path(tmp_path, "dense")
    first, second = to_line(record("a")).encode(), to_line(record("b")).encode()
    for cut in range(len(second)):
        write_whole(path, first + second[:cut])
        with Journal(tmp_path, ["dense"]) as journal:
            # a whole object without its newline is whole: nothing of it is missing
            assert set(journal.records) == ({"a"} if cut < len(second) - 1 else {"a", "b"})
            for key in {"a", "b", "c"} - set(journal.records):
                journal.append(record(key))
        lines = path.read_bytes().splitlines()
        assert sorted(json.loads(line)["key"] for line in lines) == ["a", "b", "c"]


def test_a_line_cut_in_the_middle_of_the_file_is_left_out(tmp_path: Path) -> None:
    path = journal_path(tmp_path, "dense")
    write_whole(path, to_line(record("a")) + to_line(record("b"))[:40] + "\n" + to_line(record("c")))
    with Journal(tmp_path, ["dense"]) as journal:
        assert list(journal.records) == ["a", "c"]
        assert journal.num_broken == 1
    assert read_lines(path) == ([record("a"), record("c")], 0)


def test_of_two_lines_with_one_key_the_first_counts(tmp_path: Path) -> None:
    path = journal_path(tmp_path, "dense")
    write_whole(path, to_line(record("a", seconds=1.0)) + to_line(record("a", seconds=2.0)))
    assert [line.seconds for line in read_lines(path)[0]] == [1.0]


def test_a_key_is_never_appended_twice(tmp_path: Path) -> None:
    with Journal(tmp_path, ["dense"]) as journal:
        journal.append(record("a"))
        with pytest.raises(AssertionError, match="key a is already written"):
            journal.append(record("a"))


def test_failed_samples_are_tried_again_by_the_next_command(tmp_path: Path) -> None:
    with Journal(tmp_path, ["dense"]) as journal:
        journal.append(record("a", responses=(), error="the server answered 500"))
        journal.append(record("b"))
    with Journal(tmp_path, ["dense"]) as journal:
        assert (list(journal.records), journal.num_retried) == (["b"], 1)
        journal.append(record("a"))
    assert [line.key for line in read_journal(tmp_path)] == ["b", "a"]


def test_a_line_of_another_version_is_refused_by_name_and_number(tmp_path: Path) -> None:
    path = journal_path(tmp_path, "dense")
    write_whole(path, to_line(record("a")) + json.dumps({"key": "b"}) + "\n")
    with pytest.raises(HarnessError, match=r"dense\.jsonl: line 2: expected a record of this version"):
        read_lines(path)


def test_a_folder_without_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="expected a run folder, found no journal/ in it"):
        read_journal(tmp_path)


def test_no_number_that_json_lacks_gets_into_a_line() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_line(record("a", seconds=float("nan")))


def test_a_second_driver_gets_one_line_that_names_the_first(tmp_path: Path) -> None:
    with (
        lock(tmp_path),
        pytest.raises(HarnessError, match=f"process {os.getpid()} on .* is already running in this folder"),
        lock(tmp_path),
    ):
        pass
    with lock(tmp_path):
        pass


def _hold(folder: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with lock(folder):
        ready.set()
        signal.pause()


def test_a_killed_driver_leaves_no_lock_behind(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(HarnessError, match=f"process {holder.pid} on"), lock(tmp_path):
        pass
    holder.kill()
    holder.join()
    with lock(tmp_path):
        pass


def test_a_full_disk_is_one_line_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    written: list[int] = []

    def almost_full(handle: int, data: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(real_write(handle, data[:20]))
        return written[0]

    with Journal(tmp_path, ["dense"]) as journal:
        journal.append(record("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", almost_full)
            with pytest.raises(HarnessError, match=r"dense\.jsonl: no space left on the disk"):
                journal.append(record("b"))
        assert written == [20]
        assert read_lines(journal_path(tmp_path, "dense")) == ([record("a")], 0)
        journal.append(record("b"))
    assert [line.key for line in read_journal(tmp_path)] == ["a", "b"]


def test_a_file_that_does_not_fit_leaves_the_old_one_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_whole(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HarnessError, match="no space left"):
        write_whole(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.json", "old")]


def test_a_disk_that_is_too_small_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"MiB free on this disk, this run expects to need \d+ MiB"):
        check_space(tmp_path / "not" / "yet" / "there", needed_bytes=2**60)


def test_a_part_holds_the_columns_and_replaces_its_earlier_self(tmp_path: Path) -> None:
    columns = {"position": [0, 5], "phase": ["prompt", "answer"], "mass": [0.25, 1.0], "needle_coverage": [None, 0.5]}
    for trajectory in ("dense", "sparse"):
        name = write_part(tmp_path, "oracle", "k1", ProbeResult(trajectory=trajectory, columns=columns))
        assert read_part(tmp_path, name) == columns
    assert [file.name for file in (tmp_path / "recall" / "oracle").iterdir()] == ["part-k1.parquet"]

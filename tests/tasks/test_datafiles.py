import gzip
import json
import os

import datasets
import pytest

from tasks.datafiles import check_unique, find_file, load_hub, load_json_lines
from tasks.errors import TaskError

FIELDS = {"id": (str,), "answer": (str, int)}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_items_come_in_file_order_and_nothing_is_written_beside_them(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "x", "answer": "1"}, {"id": "a", "answer": "2"})
    assert load_json_lines(path, FIELDS).to_list() == [{"id": "x", "answer": "1"}, {"id": "a", "answer": "2"}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_texts_that_look_like_dates_or_numbers_stay_as_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "2024-01-01", "answer": "033", "more": 1}, {"id": "b", "answer": 70})
    assert load_json_lines(path, FIELDS).to_list() == [
        {"id": "2024-01-01", "answer": "033"},
        {"id": "b", "answer": "70"},
    ]


def test_item_that_the_task_refuses_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "x", "answer": "1"}, {"id": "y", "answer": "0"})
    with pytest.raises(TaskError, match=r"a\.jsonl, line 2: no zero"):
        load_json_lines(path, FIELDS, lambda item: "no zero" if item["answer"] == "0" else None)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_changed_file_gives_the_new_items_even_with_its_old_time(tmp_path, name):
    path = tmp_path / name
    opener = gzip.open if name.endswith("gz") else open
    for answer in ("1", "2"):
        with opener(path, "wt") as file:
            file.write(json.dumps({"id": "x", "answer": answer}) + "\n")
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert load_json_lines(path, FIELDS)[0]["answer"] == answer


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty file"),
        (b"\n \n", "empty file"),
        (b'{"id": "x", "answer": "1"}\n{"id": ', "line 2: not valid JSON"),
        (b'\n{"id": "x"}\n', "line 2: field 'answer' is missing"),
        (b'{"id": "x", "answer": null}\n', "line 1: field 'answer' is missing"),
        (b'{"id": "x", "answer": [1]}\n', r"line 1: field 'answer': expected text or an integer, got \[1\]"),
        (b'{"id": "x", "answer": true}\n', "expected text or an integer, got True"),
        (b"[1, 2]\n", "line 1: expected a JSON object"),
        (b'{"id": "\xff"}\n', "cannot be read as UTF-8"),
    ],
)
def test_bad_file_is_one_line_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=message) as caught:
        load_json_lines(path, FIELDS)
    assert "bad.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_file_that_only_pretends_to_be_gzip_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_text('{"id": "x", "answer": "1"}\n')
    with pytest.raises(TaskError, match=r"a\.jsonl\.gz: cannot be read"):
        load_json_lines(path, FIELDS)


def test_names_win_over_the_pattern_and_two_matches_are_refused(tmp_path):
    write(tmp_path / "test_part.jsonl")
    assert find_file(tmp_path, ["test.jsonl"], "test*.jsonl").name == "test_part.jsonl"
    write(tmp_path / "test_other.jsonl")
    with pytest.raises(TaskError, match=r"test_other\.jsonl, test_part\.jsonl and none of test\.jsonl"):
        find_file(tmp_path, ["test.jsonl"], "test*.jsonl")
    write(tmp_path / "test.jsonl")
    assert find_file(tmp_path, ["test.jsonl"], "test*.jsonl").name == "test.jsonl"


def test_folder_without_the_file_says_what_was_expected(tmp_path):
    with pytest.raises(TaskError, match=r"has none of test\.jsonl, test\*\.jsonl"):
        find_file(tmp_path, ["test.jsonl"], "test*.jsonl")


def test_unreachable_hub_asks_for_local_data(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(TaskError, match=r"hub data set a/b could not be loaded.*no route to host.*set data:"):
        load_hub("a/b", "test", FIELDS)


def test_hub_row_without_a_field_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"id": "x"}]))
    with pytest.raises(TaskError, match="hub data set a/b, split test, row 0: field 'answer' is missing"):
        load_hub("a/b", "test", FIELDS)


def test_id_that_comes_twice_is_refused():
    with pytest.raises(TaskError, match="id 'x' comes twice"):
        check_unique(["x", "y", "x"], "file")

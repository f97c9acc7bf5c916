"""Scripted models through the whole command prove plan, journal and scorers of every task on real items."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.run import run
from tasks.tool_use.functions import faulty_items

NEEDLES = [
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "niah_vt",
]  # fmt: skip
SILENT = {"irrelevance", "live_irrelevance"}  # to call nothing is right


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("scripts")
    data = shared / "data"
    settings = {
        "name": "scripts",
        "model": {"scripted": "gold"},
        "variants": {"gold": {}, "empty": {"model": {"scripted": "empty"}}, "wrong": {"model": {"scripted": "wrong"}}},
        "tasks": [
            {"task": "mmlu_pro", "data": str(data / "mmlu_pro" / "test_stratified_280.jsonl"), "samples": 56},
            {"task": "mmlu_pro_chat", "data": str(data / "mmlu_pro" / "test_stratified_280.jsonl"), "samples": 56},
            {"task": "tool_use", "data": str(data / "bfcl"), "samples": 130},
            *({"task": name, "data": str(data / "math")} for name in ("aime24", "aime25", "aime26", "hmmt25")),
            *({"task": name, "lengths": [8192], "depths": 1, "samples": 1} for name in NEEDLES),
        ],
    }
    path = home / "a.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return run(path, out=home / "run", replicas=0)


@pytest.fixture(scope="module")
def cells(folder: Path) -> list[dict[str, Any]]:
    found = json.loads((folder / "results.json").read_text())["cells"]
    return [cell for cell in found if cell["headline"]]


def test_every_task_is_there_without_an_error(cells: list[dict[str, Any]]) -> None:
    whole = [cell for cell in cells if not cell["group"]]
    assert len(whole) == 3 * (3 + 4 + len(NEEDLES))
    assert all(cell["errors"] == 0 and cell["n"] > 0 for cell in whole)


def test_gold_is_right_and_wrong_is_wrong_everywhere(folder: Path, cells: list[dict[str, Any]]) -> None:
    docs = [json.loads(line) for line in (folder / "docs" / "tool_use.jsonl").open()]
    faulty = len(faulty_items() & {doc["doc_id"] for doc in docs})
    for cell in cells:
        if cell["variant"] == "gold" and cell["task"] == "tool_use":
            assert round(cell["n"] * (1 - cell["mean"])) <= faulty, cell
        elif cell["variant"] != "empty":
            assert cell["mean"] == float(cell["variant"] == "gold"), cell


def test_empty_is_wrong_but_where_nothing_is_to_be_called(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        if cell["variant"] == "empty" and (cell["task"] != "tool_use" or cell["group"]):
            assert cell["mean"] == float(cell["group"].get("category") in SILENT), cell

"""Every single-turn item of BFCL: gold answers are right, empty and wrong ones are not."""

import collections
import json
from pathlib import Path
from typing import Any

import pytest

from tasks.tool_use import functions
from tasks.tool_use.data import CATEGORIES

NUM_ITEMS = {
    **{"simple_python": 400, "simple_java": 100, "simple_javascript": 50, "multiple": 200, "parallel": 200},
    **{"parallel_multiple": 200, "irrelevance": 240, "live_simple": 258, "live_multiple": 1053, "live_parallel": 16},
    **{"live_parallel_multiple": 24, "live_irrelevance": 884, "live_relevance": 16},
}


@pytest.fixture(scope="module", params=["prompting", "native"])
def docs(shared: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    folder = str(shared / "data" / "bfcl")
    return list(functions.build(data=folder, categories=CATEGORIES, mode=request.param)["test"])


def test_all_items_of_all_categories_are_there(docs: list[dict[str, Any]]) -> None:
    assert collections.Counter(doc["category"] for doc in docs) == NUM_ITEMS
    assert len({doc["id"] for doc in docs}) == len(docs)


def test_gold_is_right_everywhere_but_in_the_faulty_items(docs: list[dict[str, Any]]) -> None:
    missed = set()
    for doc in docs:
        score = functions.process_results(doc, [functions.doc_to_target(doc)])
        assert score["answer"] is not None
        if score["accuracy"] != 1:
            missed.add(doc["id"])
    assert missed == functions.faulty_items()


def test_an_empty_answer_is_right_for_irrelevance_only(docs: list[dict[str, Any]]) -> None:
    for doc in docs:
        score = functions.process_results(doc, [""])
        assert score["accuracy"] == ("irrelevance" in doc["category"]), doc["id"]
        assert score["decoded"] == 0


def test_a_well_formed_wrong_answer_is_wrong_everywhere(docs: list[dict[str, Any]]) -> None:
    for doc in docs:
        score = functions.process_results(doc, [functions.wrong(doc)])
        assert score["accuracy"] == 0, doc["id"]
        assert score["decoded"] == (doc["category"] != "live_relevance")


def test_prompts_hold_every_function_and_one_system_message(docs: list[dict[str, Any]]) -> None:
    for doc in docs:
        messages = functions.messages(doc)
        roles = [message["role"] for message in messages]
        assert "system" not in roles[1:] and "user" in roles
        names = [function["name"] for function in json.loads(doc["functions"])]
        if doc["mode"] == "prompting":
            assert all(f'"name": "{name}"' in messages[0]["content"] for name in names)
        else:
            tools = functions.tools(doc) or []
            assert [tool["function"]["name"] for tool in tools] == [name.replace(".", "_") for name in names]

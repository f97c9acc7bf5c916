"""The task as the harness meets it: loading, prompts, options, errors; made-up items in a temporary folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import TaskError
from tasks.tool_use import functions
from tasks.tool_use.data import CATEGORIES

REPOSITORY = Path(__file__).resolve().parents[2]


def _function(name: str, **types: dict[str, Any]) -> dict[str, Any]:
    properties = {key: {**schema, "description": f"The {key}."} for key, schema in types.items()}
    parameters = {"type": "dict", "properties": properties, "required": list(types)}
    return {"name": name, "description": "Made up.", "parameters": parameters}


TEA = _function("tea.brew", leaf={"type": "string"}, heat={"type": "float"})
MILL = _function(
    "Mill.grind",
    beans={"type": "ArrayList", "items": {"type": "String"}},
    cup={"type": "any"},
    options={"type": "HashMap"},
)
MENU = _function(
    "menu.show",
    style={"type": "dict", "properties": {"dark": {"type": "boolean"}}},
    items={"type": "array", "items": {"type": "String"}},
)
ITEMS = {
    "simple_python": (TEA, {"tea.brew": {"leaf": ["Assam"], "heat": [90.0]}}),
    "simple_java": (MILL, {"Mill.grind": {"beans": [["a", "b"]], "cup": ["blue"], "options": [{"fine": [True]}]}}),
    "simple_javascript": (MENU, {"menu.show": {"style": [{"dark": [True]}], "items": [["tea", "cake"]]}}),
    "live_irrelevance": (TEA, None),
    "live_relevance": (TEA, None),
}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for category, (function, answer) in ITEMS.items():
        turns = [{"role": "user", "content": "Please."}]
        if category == "live_irrelevance":
            turns.insert(0, {"role": "system", "content": "Be brief."})
        row = {"id": f"{category}_0", "question": [turns], "function": [function]}
        _write(tmp_path / f"BFCL_v4_{category}.json", [row])
        if answer is not None:
            path = tmp_path / "possible_answer" / f"BFCL_v4_{category}.json"
            _write(path, [{"id": f"{category}_0", "ground_truth": [answer]}])
    return tmp_path


def _docs(data: Path, mode: str) -> dict[str, dict[str, Any]]:
    docs = functions.build(data=str(data), categories=list(ITEMS), mode=mode)["test"]
    return {doc["category"]: doc for doc in docs}


def _load(data: Path, **options: Any) -> Any:
    from lm_eval.tasks import TaskManager

    metadata = {"seed": 0, "data": str(data), "samples": None, "max_tokens": 64, "count_tokens": len, **options}
    manager = TaskManager(include_path=str(REPOSITORY / "tasks"), include_defaults=False, metadata=metadata)
    return manager.load(["tool_use"])["tasks"]["tool_use"]


def test_lm_eval_builds_and_scores_the_task(data: Path) -> None:
    task = _load(data, categories=["simple_python", "live_irrelevance"])
    docs = list(task.test_docs())
    assert [doc["id"] for doc in docs] == ["simple_python_0", "live_irrelevance_0"]
    for doc in docs:
        assert task.process_results(doc, [task.doc_to_target(doc)])["accuracy"] == 1
    wrong = task.config.metadata["wrong"](docs[0])
    scored = task.process_results(docs[0], [wrong])
    assert scored == {"accuracy": 0, "decoded": 1, "answer": "[no_such_function(value=1)]"}
    assert set(task.aggregation()) == {"accuracy", "decoded", "answer"}
    assert task.aggregation()["answer"](["[f()]", None]) == 0.5


def test_declared_options_are_all_categories_and_prompting(data: Path) -> None:
    metadata = _load(data, categories=["simple_python"]).config.metadata
    assert metadata["options"] == {"categories": list(CATEGORIES), "mode": "prompting"}
    assert (metadata["headline"], metadata["id"], metadata["stratify"]) == ("accuracy", "id", "category")


@pytest.mark.parametrize("mode", ["prompting", "native"])
def test_gold_is_right_and_wrong_and_empty_are_not(data: Path, mode: str) -> None:
    for category, doc in _docs(data, mode).items():
        gold = functions.process_results(doc, [functions.doc_to_target(doc)])
        assert gold["accuracy"] == 1 and gold["answer"] is not None, category
        assert functions.process_results(doc, [functions.wrong(doc)])["accuracy"] == 0
        empty = functions.process_results(doc, [""])
        assert empty["accuracy"] == (category == "live_irrelevance")


def test_prompt_lists_the_functions_after_the_protocols_words(data: Path) -> None:
    messages = functions.messages(_docs(data, "prompting")["simple_python"])
    assert [message["role"] for message in messages] == ["system", "user"]
    system = messages[0]["content"]
    assert system.startswith("You are an expert in composing functions.You are given a question")
    head, listed = system.split("Here is a list of functions in json format that you can invoke.\n")
    assert "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)].  You" in head
    expected = {**TEA, "description": "Made up. Note that the provided function is in Python 3 syntax."}
    assert listed == json.dumps([expected], indent=4) + "\n"


def test_items_own_system_message_follows_the_protocols(data: Path) -> None:
    prompting = functions.messages(_docs(data, "prompting")["live_irrelevance"])
    assert [message["role"] for message in prompting] == ["system", "user"]
    assert prompting[0]["content"].endswith("]\n\n\nBe brief.")
    native = functions.messages(_docs(data, "native")["live_irrelevance"])
    assert native == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Please."}]


def test_java_and_javascript_parameters_are_described_as_text(data: Path) -> None:
    docs = _docs(data, "native")
    (mill,) = functions.tools(docs["simple_java"]) or []
    (menu,) = functions.tools(docs["simple_javascript"]) or []
    beans = mill["function"]["parameters"]["properties"]["beans"]
    assert beans["type"] == "string" and "items" not in beans
    assert beans["description"] == (
        "The beans. This is Java ArrayList type parameter in string representation. "
        "The list elements are of type String; they are not in string representation."
    )
    style = menu["function"]["parameters"]["properties"]["style"]
    assert style["type"] == "string" and '{"dark": {"type": "boolean"}}' in style["description"]
    assert mill["function"]["description"] == "Made up. Note that the provided function is in Java 8 SDK syntax."


def test_native_tools_have_json_schema_types_and_no_dots(data: Path) -> None:
    docs = _docs(data, "native")
    (tool,) = functions.tools(docs["simple_python"]) or []
    assert tool["type"] == "function" and tool["function"]["name"] == "tea_brew"
    assert tool["function"]["parameters"]["type"] == "object"
    assert tool["function"]["parameters"]["properties"]["heat"] == {
        "type": "number",
        "format": "float",
        "description": "The heat. This is a float type value.",
    }
    assert functions.tools(_docs(data, "prompting")["simple_python"]) is None


def test_documents_survive_json_and_are_scored_from_it(data: Path) -> None:
    for doc in _docs(data, "prompting").values():
        kept = {key: value for key, value in json.loads(json.dumps(doc)).items() if key != "messages"}
        assert functions.process_results(kept, [functions.doc_to_target(kept)])["accuracy"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": ["simple_pyton"]}, "simple_pyton.*did you mean simple_python"),
        ({"categories": []}, "at least one name"),
        ({"categories": ["parallel", "parallel"]}, "each once"),
        ({"categories": ["simple_python"], "mode": "nativ"}, "mode: expected one of prompting, native.*'nativ'"),
        ({"categories": ["multiple"]}, "no file BFCL_v4_multiple.json"),
    ],
)
def test_options_that_cannot_be_used_are_named(data: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        functions.build(data=str(data), **options)


def test_hub_files_of_either_version_are_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked: list[str] = []

    def download(repository: str, name: str, repo_type: str) -> str:
        assert (repository, repo_type) == ("gorilla-llm/Berkeley-Function-Calling-Leaderboard", "dataset")
        asked.append(name)
        if "BFCL_v4" in name:
            raise EntryNotFoundError("no such entry")
        return str(data / name.replace("BFCL_v3_java", "BFCL_v4_simple_java"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    docs = functions.build(data=None, categories=["simple_java"])["test"]
    assert [doc["id"] for doc in docs] == ["simple_java_0"]
    assert asked[1::2] == ["BFCL_v3_java.json", "possible_answer/BFCL_v3_java.json"]

    def no_network(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network\nand no cached copy")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with pytest.raises(TaskError, match=r"could not be loaded \(no network and no cached copy\); set data") as caught:
        functions.build(data=None, categories=["simple_java"])
    assert "\n" not in str(caught.value)


ROW = {"id": "simple_python_0", "question": [[{"role": "user", "content": "Please."}]], "function": [TEA]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "empty file"),
        (["{}", "{"], "line 2: expected one JSON object a line"),
        (["[1]"], "line 1: expected a JSON object, got list"),
        (["{}"], "line 1: expected 'id' to be a str, got NoneType"),
        ([json.dumps(ROW), json.dumps(ROW)], "line 2: id simple_python_0 comes twice"),
        ([json.dumps({**ROW, "id": "x"})], "line 1: id x has no line in possible_answer"),
        ([json.dumps({**ROW, "question": []})], "line 1: expected 'question' to hold one turn"),
        (
            [json.dumps({**ROW, "question": [[{"role": "user"}]]})],
            "line 1: expected messages with 'role' and 'content'",
        ),
        ([json.dumps({**ROW, "function": [{"name": "f"}]})], "line 1: expected functions with 'name'"),
        ([json.dumps({**ROW, "function": [MENU]})], "line 1: expected 'ground_truth' calls of offered functions"),
    ],
)
def test_broken_files_are_named_with_their_line(data: Path, lines: list[str], message: str) -> None:
    path = data / "BFCL_v4_simple_python.json"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(TaskError, match=message) as caught:
        functions.build(data=str(data), categories=["simple_python"])
    assert "\n" not in str(caught.value)


def test_metric_is_loadable_by_path_and_gives_reasons(data: Path, tmp_path: Path) -> None:
    import evaluate

    metric = evaluate.load(
        str(REPOSITORY / "tasks" / "metrics" / "tool_calls_metric.py"), cache_dir=str(tmp_path / "cache")
    )
    doc = _docs(data, "prompting")["simple_python"]
    texts = [functions.doc_to_target(doc), "[tea.brew(leaf='Assam', heat='hot')]", "No."]
    scores = metric.compute(predictions=texts, references=[json.dumps(doc)] * 3)
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["decoded"] == pytest.approx(2 / 3)
    assert scores["answers"][2] is None
    assert scores["reasons"][:2] == ["", "type_error:simple: heat"]
    assert scores["reasons"][2].startswith("ast_decoder:decoder_failed")

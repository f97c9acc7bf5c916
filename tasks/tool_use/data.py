"""BFCL's single-turn items, from a local folder or from the hub."""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.errors import TaskError

HUB_DATASET = "gorilla-llm/Berkeley-Function-Calling-Leaderboard"
CATEGORIES = (
    *("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple", "irrelevance"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance"),
)
MODES = ("prompting", "native")
# the hub's copy has had version 3's files, whose names differ for three categories
_OLDER_NAMES = {"simple_python": "simple", "simple_java": "java", "simple_javascript": "javascript"}


def load_items(data: str | None, categories: Sequence[str]) -> list[dict[str, Any]]:
    """All items of the categories, in the data's order.

    Args:
        data: folder with BFCL_v4_<category>.json and possible_answer/; None reads the hub's data set.
        categories: names from CATEGORIES, each once.

    Returns:
        Per item: id, category, messages (as in the data), functions (as in the data) and answers (accepted calls;
        empty for the relevance categories).

    Raises:
        TaskError: unknown category; a file that is missing, empty or broken, with its line.
    """
    for name in categories:
        check_choice("categories", name, CATEGORIES)
    if len(set(categories)) != len(categories) or not categories:
        raise TaskError(f"tool_use: categories: expected at least one name, each once, got {list(categories)}")
    return [item for category in categories for item in _load_category(data, category)]


def check_choice(option: str, name: object, choices: Sequence[str]) -> None:
    if name not in choices:
        near = difflib.get_close_matches(str(name), choices, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise TaskError(f"tool_use: {option}: expected one of {', '.join(choices)}, got {name!r}{hint}")


def _load_category(data: str | None, category: str) -> Iterator[dict[str, Any]]:
    path = _locate(data, "", category)
    questions = list(_read_lines(path))
    answers: dict[str, tuple[str, Any]] = {}
    if "relevance" not in category:
        answer_path = _locate(data, "possible_answer/", category)
        answers = {_field(row, "id", str, where): (where, row) for where, row in _read_lines(answer_path)}
    seen: set[str] = set()
    for where, row in questions:
        item_id = _field(row, "id", str, where)
        if item_id in seen:
            raise TaskError(f"{where}: id {item_id} comes twice")
        seen.add(item_id)
        functions = [_check_function(function, where) for function in _field(row, "function", list, where)]
        accepted: list[dict[str, Any]] = []
        if "relevance" not in category:
            if item_id not in answers:
                raise TaskError(f"{where}: id {item_id} has no line in possible_answer/{path.name}")
            accepted = _accepted(answers[item_id][1], functions, answers[item_id][0])
        yield {
            "id": item_id,
            "category": category,
            "messages": _messages(_field(row, "question", list, where), where),
            "functions": functions,
            "answers": accepted,
        }


def _locate(data: str | None, folder: str, category: str) -> Path:
    name = f"{folder}BFCL_v4_{category}.json"
    if data is not None:
        path = Path(data) / name
        if not path.is_file():
            raise TaskError(f"tool_use: data: no file {name} in {data}; expected a folder with BFCL's v4 files")
        return path
    return _download(name, f"{folder}BFCL_v3_{_OLDER_NAMES.get(category, category)}.json")


def _download(*names: str) -> Path:
    """The first of the files that the hub's data set, or its local copy when there is no network, has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    reason = ""
    for name in names:
        try:
            return Path(hf_hub_download(HUB_DATASET, name, repo_type="dataset"))
        except EntryNotFoundError as error:  # not on the hub, or neither network nor local copy
            reason = reason or " ".join(str(error).split())[:160]
        except Exception as error:  # connection, hub and cache errors share no base class
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            break
    raise TaskError(
        f"tool_use: {' or '.join(names)} of hub data set {HUB_DATASET} could not be loaded ({reason}); "
        "set data: to a local folder"
    )


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for each line of a JSON-lines file."""
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{where}: expected one JSON object a line, got {error}") from None
            if not isinstance(row, dict):
                raise TaskError(f"{where}: expected a JSON object, got {type(row).__name__}")
            count += 1
            yield where, row
    if not count:
        raise TaskError(f"{path}: expected BFCL items, one a line, got an empty file")


def _field(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = row.get(key)
    if not isinstance(value, kind):
        raise TaskError(f"{where}: expected {key!r} to be a {kind.__name__}, got {type(value).__name__}")
    return value


def _messages(question: list[Any], where: str) -> list[dict[str, str]]:
    if len(question) != 1 or not isinstance(question[0], list) or not question[0]:
        raise TaskError(f"{where}: expected 'question' to hold one turn of messages, got {len(question)}")
    for message in question[0]:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise TaskError(f"{where}: expected messages with 'role' and 'content' in 'question'")
    return [{"role": message["role"], "content": message["content"]} for message in question[0]]


def _check_function(function: Any, where: str) -> dict[str, Any]:
    parameters = function.get("parameters") if isinstance(function, dict) else None
    if not isinstance(parameters, dict) or not {"name", "description"} <= function.keys():
        raise TaskError(f"{where}: expected functions with 'name', 'description' and 'parameters'")
    _field(parameters, "properties", dict, f"{where}, function {function['name']}")
    _field(parameters, "required", list, f"{where}, function {function['name']}")
    return dict(function)


def _accepted(row: dict[str, Any], functions: Sequence[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    names = {function["name"] for function in functions}
    answers: list[dict[str, Any]] = _field(row, "ground_truth", list, where)
    for answer in answers:
        if not isinstance(answer, dict) or len(answer) != 1 or not answer.keys() <= names:
            raise TaskError(f"{where}: expected 'ground_truth' calls of offered functions, got {str(answer)[:80]}")
        (arguments,) = answer.values()
        if not isinstance(arguments, dict) or not all(isinstance(options, list) for options in arguments.values()):
            raise TaskError(f"{where}: expected lists of accepted values for every argument in 'ground_truth'")
    if not answers:
        raise TaskError(f"{where}: expected at least one call in 'ground_truth'")
    return answers

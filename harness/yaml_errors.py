"""YAML files that are read with care, and what is wrong with one in a line: key path, what came, what was expected."""

import difflib
import re
import typing
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from harness.errors import HarnessError

_KEY = re.compile(r"[a-z_]+: ")  # a check of several keys names the one that it means
_WORDS = {
    "Input should be": "expected",
    "Dictionary should have": "expected",
    "Tuple should have": "expected",
    "String should have": "expected",
    " after validation, not 0": "",
    "a valid dictionary or instance of TaskEntry": "a mapping such as {task: aime25}",
    "a valid dictionary": "keys with values",
    "a valid tuple": "a list",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text",
    "a valid boolean": "true or false",
}


class _NoDuplicates(yaml.SafeLoader):
    """A key written twice in one mapping is an error; plain YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
            line = key_node.start_mark.line + 1
            if key in seen:
                problem = f"key {key!r} is there twice, first in line {seen[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping. Raises HarnessError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HarnessError(f"{path}: no such file; expected the YAML file of an experiment") from None
    except IsADirectoryError:
        raise HarnessError(f"{path}: expected the YAML file of an experiment, got a folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HarnessError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        content = yaml.load(text, Loader=_NoDuplicates)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise HarnessError(f"{path}: {line}not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise HarnessError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise HarnessError(f"{path}: empty: expected name, model, variants and tasks, as in configs/quickstart.yaml")
    if not isinstance(content, dict):
        raise HarnessError(f"{path}: expected keys with values at the top, got {_shown(content)}")
    return content


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", nearest is 'x'" for the known name that resembles it most, else the first known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"; the nearest is {close[0]!r}"
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"; known are {listed}" if names else ""


def as_one_line(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first of pydantic's complaints in our words, and how many more there are.

    Unknown keys come first: a misspelt key is reported as missing as well.
    """
    problems = error.errors(include_url=False)
    # a list whose items are refused is reported as too short as well
    inner = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    problems = [problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in inner]
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in _without_tags(first["loc"]))
    what = _sentence(first["type"], first["msg"], first["input"], first["loc"], schema)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    within = _KEY.match(what) if first["type"] == "value_error" else None
    return (f"{where}{'.' if within else ': '}" if where else "") + what + more


def _sentence(kind: str, message: str, value: Any, path: Sequence[int | str], schema: type[BaseModel]) -> str:
    if kind == "extra_forbidden":
        return f"unknown key{nearest(str(path[-1]), _keys_at(schema, _without_tags(path)[:-1]))}"
    if kind == "missing":
        return "expected a value, got nothing: the key is required"
    if kind == "literal_error" and isinstance(value, str):
        known = [part.strip("'") for part in message.removeprefix("Input should be ").replace(" or ", ", ").split(", ")]
        return f"{message.replace('Input should be', 'expected')}, got {_shown(value)}{nearest(value, known)}"
    if kind == "string_pattern_mismatch" and "^(" in message:
        choices = message.partition("^(")[2].partition(")$")[0].split("|")
        return f"expected {', '.join(choices[:-1])} or {choices[-1]}, got {_shown(value)}{nearest(str(value), choices)}"
    if kind == "string_pattern_mismatch":
        return f"expected a name of letters, digits and _ . + - that starts with a letter or digit, got {_shown(value)}"
    said = message.removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        said = said.replace(theirs, ours)
    return said if isinstance(value, dict) and kind == "value_error" else f"{said}, got {_shown(value)}"


def _without_tags(path: Sequence[int | str]) -> list[int | str]:
    """Pydantic puts the chosen kind of model behind "model"; the file has no such key."""
    return [part for i, part in enumerate(path) if part != "[key]" and not (i > 0 and path[i - 1] == "model")]


def _keys_at(schema: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The keys that the schema knows at a path."""
    models = [schema]
    for part in path:
        found = [m.model_fields[part].annotation for m in models if isinstance(part, str) and part in m.model_fields]
        if found:
            models = [model for annotation in found for model in _models_in(annotation)]
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models_in(inner)]


def _shown(value: Any) -> str:
    """A value as it would be written in YAML, on one line and short."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    text = "null" if value is None else yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    text = " ".join(text.removesuffix("\n...\n").split())
    return text if len(text) <= 60 else text[:57] + "…"

"""Benchmark items from the hub or from local JSON lines: found by fixed rules, checked, as `datasets` objects."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from tasks.errors import TaskError

Kinds = tuple[type, ...]  # several: a number or its text, kept as text
FindFault = Callable[[Mapping[str, Any]], str | None]  # what is wrong with an item, None when it is fine

_KINDS = {str: "text", int: "an integer", list: "a list"}


def field_fault(item: Mapping[str, Any], fields: Mapping[str, Kinds]) -> str | None:
    """The first field that is missing or of another type than those allowed; None when all are fine."""
    for name, kinds in fields.items():
        if item.get(name) is None:
            return f"field {name!r} is missing"
        if not isinstance(item[name], kinds) or isinstance(item[name], bool):
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            return f"field {name!r}: expected {expected}, got {item[name]!r:.60}"
    return None


def existing(path: Path) -> Path:
    """The path itself, once it is certain that something is there."""
    if not path.exists():
        raise TaskError(f"data: {path} does not exist; expected a folder or a file of JSON lines")
    return path


def find_file(folder: Path, names: Sequence[str], pattern: str | None = None) -> Path:
    """The first of `names` that lies in `folder`, else the only file that matches `pattern`."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    matches = sorted(path for path in folder.glob(pattern) if path.is_file()) if pattern else []
    if len(matches) > 1:
        raise TaskError(
            f"data: {folder} has {', '.join(path.name for path in matches)} and none of {', '.join(names)}; "
            "name one file in data"
        )
    if not matches:
        wanted = [*names, pattern] if pattern else names
        raise TaskError(f"data: {folder} has none of {', '.join(wanted)}")
    return matches[0]


def load_json_lines(path: Path, fields: Mapping[str, Kinds], find_fault: FindFault | None = None) -> datasets.Dataset:
    """The named fields of all items of one file of JSON lines (.gz allowed), in file order, held in memory.

    The lines are read here and not by the JSON builder of `datasets`: that one turns a column of texts that look like
    dates into timestamps, "033" beside 70 into 33, and keeps a cache keyed by path and time.

    Raises:
        TaskError: no items, a line that is no JSON object, a field that is missing or of another kind, or an item that
            `find_fault` refuses; names file and line.
    """
    items = []
    for number, line in _lines(path):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(item, dict):
            raise TaskError(f"{path}, line {number}: expected a JSON object, got {line.strip():.60}")
        if fault := field_fault(item, fields) or (find_fault and find_fault(item)):
            raise TaskError(f"{path}, line {number}: {fault}")
        items.append({name: _plain(item[name], fields[name]) for name in fields})
    if not items:
        raise TaskError(f"{path}: expected at least one item, got an empty file")
    return datasets.Dataset.from_list(items)


def load_hub(
    name: str, split: str, fields: Mapping[str, Kinds], find_fault: FindFault | None = None
) -> datasets.Dataset:
    """The named fields of one split of a hub data set; from the local hub cache when there is no network."""
    try:
        rows = datasets.load_dataset(name, split=split).to_list()
    except Exception as error:  # connection, hub and cache errors share no base class
        reason = " ".join(str(error).split())[:160]
        raise TaskError(
            f"hub data set {name} could not be loaded ({type(error).__name__}: {reason}); "
            "set data: to a folder of local files"
        ) from error
    if not rows:
        raise TaskError(f"hub data set {name}, split {split}: expected items, got none")
    for number, row in enumerate(rows):
        if fault := field_fault(row, fields) or (find_fault and find_fault(row)):
            raise TaskError(f"hub data set {name}, split {split}, row {number}: {fault}")
    return datasets.Dataset.from_list([{key: _plain(row[key], fields[key]) for key in fields} for row in rows])


def check_unique(ids: Sequence[str], where: str) -> None:
    """Raise TaskError when an id comes twice: answers are kept by id."""
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise TaskError(f"{where}: id {name!r} comes twice; expected unique ids")
        seen.add(name)


def _plain(value: Any, kinds: Kinds) -> Any:
    """One column holds one type: a field that may be a number or text is text."""
    return str(value) if len(kinds) > 1 else value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and the lines that are not blank."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TaskError(f"{path}: cannot be read as UTF-8 JSON lines ({error})") from error

"""Settings and manifest as rows of key path and value: how this was made, so that it can be made again."""

from collections.abc import Iterator, Mapping
from typing import Any

from harness import numbers
from harness.report_parts.text import visible

MAX_ITEMS = 30
MAX_CHARS = 400


def flat_rows(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings as (key path, text) rows; long lists and mappings end in a row that counts the rest."""
    return list(_rows(value, path))


def _rows(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        items = [(f"{path}[{place}]", item) for place, item in enumerate(value)]
    else:
        yield visible(path), _text(value)
        return
    for inner, item in items[:MAX_ITEMS]:
        yield from _rows(item, inner)
    if len(items) > MAX_ITEMS:
        yield visible(path), f"… and {len(items) - MAX_ITEMS:,} more, in the run's files"


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        text = ", ".join(_text(item) for item in value[:MAX_ITEMS])
        text += f", … ({len(value):,} in all)" if len(value) > MAX_ITEMS else ""
    else:
        text = visible(value) if str(value) else numbers.NOT_MEASURED
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} … ({len(text):,} characters)"

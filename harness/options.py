"""The free keys of a suite entry, checked against the defaults that the task's YAML declares."""

from collections.abc import Mapping
from typing import Any

from harness.errors import HarnessError
from harness.yaml_errors import nearest


def merged_options(
    given: Mapping[str, Any], defaults: Mapping[str, Any], fixed: list[str], where: str
) -> dict[str, Any]:
    """The defaults with what the entry says over them.

    A value must have the type of its default; a list where the default is a list (of values of the type of the
    default's first), or where the default is a number (several instead of one); a default of null takes anything.
    fixed: keys that every entry may have, offered as nearest names. where: key path of the entry.
    """
    for key, value in given.items():
        if key not in defaults:
            raise HarnessError(f"{where}.{key}: unknown key{nearest(key, [*fixed, *defaults])}")
        problem = _mismatch(value, defaults[key])
        if problem:
            raise HarnessError(f"{where}.{key}: expected {problem}, got {value!r}")
    return {**defaults, **given}


def _mismatch(value: Any, default: Any) -> str | None:
    """What was expected, or None when the value fits."""
    if default is None:
        return None
    if isinstance(default, list):
        if not default:
            return None if isinstance(value, list) else "a list"
        items = value if isinstance(value, list) else [value]
        fits = bool(items) and all(_same_type(item, default[0]) for item in items)
        return None if fits else f"a list of {_named(default[0])}, as {default}"
    if isinstance(value, list) and isinstance(default, int | float) and not isinstance(default, bool):
        return None if value and all(_same_type(item, 0.0) for item in value) else "a number or a list of numbers"
    return None if _same_type(value, default) else _named(default)


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int) or (isinstance(value, float) and isinstance(default, float))
    return isinstance(value, type(default))


def _named(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int):
        return "a whole number"
    return {float: "a number", str: "a text"}.get(type(default), f"a {type(default).__name__}")

"""JavaScript source text of one value to the Python value that it is compared as.

Rules: BFCL (bfcl-eval 2026.3.23), `ast_eval/type_convertor/js_type_converter.py`. What does not look like its type
stays text. The official regular expression for arrays of arrays is followed by hand: with it a search may never end.
"""

import re
from typing import Any

from tasks.tool_use.convert_java import MAX_VALUE_CHARS

TYPES: dict[str, type] = {
    "String": str,
    "integer": int,
    "float": float,
    "Bigint": int,
    "Boolean": bool,
    "dict": dict,
    "array": list,
    "any": str,
}
NESTED_TYPES = ("array",)


def convert_javascript(value: str, type_: str, element_type: str | None = None) -> Any:
    """Value of a JavaScript literal, array or object.

    Args:
        value: source text, quotes of a whole string already taken off.
        type_: type as the function describes it, a key of TYPES.
        element_type: of an array.
    """
    if len(value) > MAX_VALUE_CHARS:
        return value
    match type_:
        case "String":
            quoted = any(value.startswith(quote) and value.endswith(quote) for quote in "\"'")
            return value[1:-1] if quoted else value
        case "integer":
            return int(value) if re.match(r"^-?\d+$", value) else value
        case "float":
            return float(value) if re.match(r"^-?\d+(\.\d+)?$", value) else value
        case "Bigint":
            return int(value[:-1]) if re.match(r"^-?\d+n\Z", value) else value
        case "Boolean":
            return value == "true" if value in ("true", "false") else value
        case "dict":
            return _object(value.strip())
        case "array":
            return _array(value.strip(), element_type)
    return value


def _untyped(value: str) -> Any:
    value = value.strip()
    if value in ("true", "false"):
        return value == "true"
    if any(value.startswith(quote) and value.endswith(quote) for quote in "\"'"):
        return value[1:-1]
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _array(value: str, element_type: str | None) -> Any:
    """`[a, b]`, `new Array(a, b)` or arrays of arrays, which have no element type.

    Elements are split at every comma, in strings too, and the array ends at its first closing bracket.
    """
    rows = _array_of_arrays(value)
    if rows is not None:
        inner = [row[1:] if index == 0 and row.startswith("[") else row for index, row in enumerate(rows)]
        return [[_untyped(element) for element in row.split(",")] for row in inner]
    flat = re.match(r"\[(.*?)\]|\bnew\s+Array\((.*?)\)", value)
    if flat is None:
        return value
    inside = (flat.group(1) if flat.group(1) is not None else flat.group(2)).strip()
    elements = [element.strip() for element in inside.split(",")] if inside else []
    if element_type is None:
        return [_untyped(element) for element in elements]
    if element_type not in TYPES:
        return value if elements else []
    return [
        convert_javascript(element, element_type, "String" if element[:1] in ("'", '"') else None)
        for element in elements
    ]


def _array_of_arrays(value: str) -> list[str] | None:
    """Texts of the inner arrays, or None if the value does not start with an array of arrays.

    An inner array runs to the first `]` behind which the rest still fits, on one line; other brackets do not count.
    """
    opening = re.match(r"(?:(\[)|new\s+Array\()\s*\[", value)
    if opening is None:
        return None
    closing = "]" if opening.group(1) else ")"
    ends: dict[int, int | None] = {}  # position behind an inner array's bracket -> where the whole ends, if it does

    def first_end(start: int) -> int | None:
        for bracket in _closings(value, start):
            if (end := ends.get(bracket + 1)) is not None:
                return end
        return None

    for bracket in reversed([match.start() for match in re.finditer(r"\]", value)]):
        following = re.compile(r"\s*").match(value, bracket + 1)
        assert following is not None, "the pattern matches the empty string"
        position = following.end()
        ends[bracket + 1] = None
        if value.startswith(",", position):
            inner = re.compile(r",\s*\[").match(value, position)
            ends[bracket + 1] = first_end(inner.end()) if inner else None
        elif value.startswith(closing, position):
            ends[bracket + 1] = position + 1
    end = first_end(opening.end())
    if end is None:
        return None
    return [row.strip() for row in re.findall(r"\[(.*?)\]", value[:end])]


def _closings(value: str, start: int) -> list[int]:
    """Positions of `]` on the line of `start`, from `start` on."""
    line_end = value.find("\n", start)
    stop = line_end if line_end >= 0 else len(value)
    return [start + match.start() for match in re.finditer(r"\]", value[start:stop])]


def _object(value: str) -> Any:
    """`{key: value, …}` up to its first closing brace; values are arrays or judged by their look, without quotes."""
    if value == "{}":
        return {}
    braces = re.match(r"\{(.*?)\}", value)
    if braces is None:
        return value
    pairs = re.findall(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)", braces.group(1))
    entries: dict[str, Any] = {}
    for key, text in pairs:
        text = text.strip()
        is_array = text.startswith("[") and text.endswith("]")
        entries[key.strip().strip("'\"")] = _array(text, None) if is_array else _untyped(text.strip("'\""))
    return entries

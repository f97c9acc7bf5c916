"""Java source text of one value to the Python value that it is compared as.

Rules: BFCL (bfcl-eval 2026.3.23), `ast_eval/type_convertor/java_type_converter.py`. What does not look like its type
stays text. The official regular expressions are followed step by step where a search with them could take for ever.
"""

import re
from typing import Any

TYPES: dict[str, type] = {
    "byte": int,
    "short": int,
    "integer": int,
    "float": float,
    "double": float,
    "long": int,
    "boolean": bool,
    "char": str,
    "Array": list,
    "ArrayList": list,
    "Set": set,
    "HashMap": dict,
    "Hashtable": dict,
    "Queue": list,
    "Stack": list,
    "String": str,
    "any": str,
}
NESTED_TYPES = ("Array", "ArrayList")
MAX_VALUE_CHARS = 2_000  # longer ones stay text; the longest accepted value in the data has a tenth of that

_FLOAT = r"^-?\d+(\.\d+)?([eE][+-]?\d+)?"


def convert_java(value: str, type_: str, element_type: str | None = None) -> Any:
    """Value of a Java literal or collection.

    Args:
        value: source text, quotes of a string already taken off.
        type_: Java type as the function describes it, a key of TYPES.
        element_type: of an Array or ArrayList.
    """
    if len(value) > MAX_VALUE_CHARS:
        return value
    match type_:
        case "byte" | "short" | "integer":
            return int(value) if re.match(r"^-?\d+$", value) else value
        case "long":
            return int(re.sub(r"[lL]$", "", value)) if re.match(r"^-?\d+[lL]$", value) else value
        case "float":
            return float(re.sub(r"[fF]$", "", value)) if re.match(_FLOAT + "[fF]$", value) else value
        case "double":
            return float(value) if re.match(_FLOAT + "$", value) else value
        case "boolean":
            return value == "true" if value in ("true", "false") else value
        case "ArrayList":
            return _array_list(value, element_type)
        case "Array":
            return _array(value, element_type)
        case "HashMap":
            return _hash_map(value)
    return value  # String, char and any; sets, queues and stacks have no rule


def _untyped(value: str) -> Any:
    """Value by its look: entries of maps have no declared type."""
    if value in ("true", "false"):
        return value == "true"
    if value.startswith('"') and value.endswith('"'):
        return value[1:-1]
    if re.match(r"^-?\d+[lL]$", value):
        return int(value[:-1])
    if re.match(_FLOAT + "[fF]$", value):
        return float(value[:-1])
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _element(value: str, element_type: str | None) -> Any:
    if element_type in ("char", "String"):
        return value[1:-1]
    return convert_java(value, element_type) if element_type else _untyped(value)


def _array_list(value: str, element_type: str | None) -> Any:
    """`new ArrayList<T>(Arrays.asList(a, b))`, `new ArrayList<T>() {{ add(a); add(b); }}` or an empty one."""
    listed = re.search(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)", value)
    if listed:
        return [_element(part.strip(), element_type) for part in listed.group(1).split(",")]
    empty = re.compile(r"new\s+ArrayList<\w*>\(\)")
    for start in empty.finditer(value):
        block = re.compile(r"\s*\{\{").match(value, start.end())
        body = _double_brace_body(value, block.end()) if block else None
        if body is not None:
            return [_element(added.strip(), element_type) for added in re.findall(r"add\((.+?)\)", body)]
    return [] if empty.search(value) else value


def _double_brace_body(value: str, start: int) -> str | None:
    """What stands between `{{` and the first `}}`, if anything does; blanks alone count."""
    inside = len(value) - len(value[start:].lstrip())
    end = value.find("}}", inside + 1)
    if end < 0 and inside > start and value.startswith("}}", inside):
        return " "
    return None if end < 0 else value[inside:end]


def _array(value: str, element_type: str | None) -> Any:
    """`new T[]{a, b}`; elements of type String keep their quotes, as officially."""
    braces = re.search(r"new\s+\w+\[\]\s*\{(.*?)\}", value)
    if not braces:
        return value
    parts = [part.strip() for part in braces.group(1).split(",") if part.strip()]
    return [convert_java(part, element_type) if element_type else _untyped(part) for part in parts]


def _hash_map(value: str) -> Any:
    """`new HashMap<K, V>() {{ put("key", value); }}` or an empty one."""
    empty = False
    for start in re.finditer(r"new\s+HashMap<", value):
        for bracket in re.finditer(r">", value[start.end() :]):
            call = re.compile(r"\s*\(\)").match(value, start.end() + bracket.end())
            if call is None:
                continue
            empty = empty or "\n" not in value[start.end() : start.end() + bracket.start()]
            opening = re.compile(r"\s*\{\s*\{?\s*").match(value, call.end())
            end = value.find("}", opening.end()) if opening else -1
            if opening and end >= 0:
                return _entries(value[opening.end() : end])
    return {} if empty else value


def _entries(body: str) -> dict[str, Any]:
    """`put("key", value)` wherever it stands; the value ends at the first bracket or not at all."""
    entries: dict[str, Any] = {}
    position = 0
    while (start := body.find('put("', position)) >= 0:
        position = start + 1
        for comma in re.finditer(r'",\s*', body[start + 5 :]):
            key = body[start + 5 : start + 5 + comma.start()]
            if "\n" in key:
                break
            begin = start + 5 + comma.end()
            line_end = body.find("\n", begin)
            end = body.find(")", begin, line_end if line_end >= 0 else len(body))
            if end >= 0:
                entries[key] = _untyped(body[begin:end].strip())
                position = end + 1
                break
    return entries

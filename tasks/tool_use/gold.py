"""Answers with a known score: a right one from the accepted values, a well-formed wrong one."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tasks.tool_use.calls import Call, DecodeError
from tasks.tool_use.checker import check_value, language_of, offered_name
from tasks.tool_use.decode_java import decode_java
from tasks.tool_use.decode_javascript import decode_javascript

NO_CALL_TEXT = "None of the functions can be used."
_WRONG_NAME = "no_such_function"
_JAVA_CLASSES = {"integer": "Integer", "long": "Long", "double": "Double", "boolean": "Boolean", "char": "Character"}
_JAVA_ARRAYS = {"integer": "int", "long": "long", "double": "double", "boolean": "boolean", "char": "char"}


def gold_text(functions: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], category: str, mode: str) -> str:
    """An answer that scores 1, `FAULTY_ITEMS` excepted: the first accepted values, optional arguments left out."""
    if "irrelevance" in category:
        return NO_CALL_TEXT
    if "relevance" in category:
        return _call_list([(offered_name(functions[0]["name"], mode == "native"), {})], mode)
    by_name = {function["name"]: function for function in functions}
    calls = [
        (offered_name(name, mode == "native"), _gold_arguments(by_name[name], accepted, category, mode))
        for answer in answers
        for name, accepted in answer.items()
    ]
    return _call_list(calls, mode)


def wrong_text(category: str, mode: str) -> str:
    """A well-formed answer that scores 0: a call nobody offered, or words where any call is right."""
    if "relevance" in category and "irrelevance" not in category:
        return NO_CALL_TEXT
    return _call_list([(_WRONG_NAME, {"value": "1"})], mode)


def _call_list(calls: Sequence[tuple[str, dict[str, Any]]], mode: str) -> str:
    """Arguments are values in native mode and source text in prompting mode."""
    if mode == "native":
        return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], ensure_ascii=False)
    written = (f"{name}({', '.join(f'{key}={text}' for key, text in given.items())})" for name, given in calls)
    return f"[{', '.join(written)}]"


def _gold_arguments(
    function: dict[str, Any], accepted: dict[str, list[Any]], category: str, mode: str
) -> dict[str, Any]:
    required = function["parameters"]["required"]
    properties = function["parameters"]["properties"]
    return {
        name: _gold_value(properties.get(name, {}), options, category, mode)
        for name, options in accepted.items()
        if "" not in options or name in required
    }


def _gold_value(schema: dict[str, Any], options: list[Any], category: str, mode: str) -> Any:
    """The first accepted value that the rules take, as value or source text; the first one if they take none."""
    values = [option for option in options if option != ""] or [""]
    candidates = [
        candidate for value in values for candidate in _candidates(value, schema, language_of(category), mode)
    ]
    for given, decoded in candidates:
        if "type" in schema and check_value(schema, decoded, options, category).right:
            return given
    return candidates[0][0]


def _candidates(value: Any, schema: dict[str, Any], language: str, mode: str) -> Iterator[tuple[Any, Any]]:
    """(what the answer holds, what the decoder makes of it) for ways to give one accepted value."""
    type_, items = schema.get("type", "any"), schema.get("items") or {}
    forms = [_first_values(value), value, *([{}] if isinstance(value, dict) else [])]
    for plain in forms:
        if language == "python":
            yield (plain if mode == "native" else repr(plain)), plain
            continue
        text = (_java_text if language == "java" else _javascript_text)(plain, type_, items.get("type"))
        if mode == "native":
            yield text, text
            continue
        quoted = (f'"{text}"', f"'{text}'")
        for source in (*quoted, text) if isinstance(plain, str) else (text, *quoted):
            yield source, _decoded(source, language)


def _decoded(source: str, language: str) -> Any:
    """What the language's decoder reads as the value of an argument; None where it reads none."""
    decode = decode_java if language == "java" else decode_javascript
    try:
        calls: list[Call] = decode(f"[call(value={source})]")
    except DecodeError:
        return None
    return calls[0].get("call", {}).get("value")


def _first_values(value: Any) -> Any:
    """A dict of accepted values becomes one dict: the first value of each key, keys that may be left out left out."""
    if isinstance(value, list):
        return [_first_values(item) for item in value]
    if not isinstance(value, dict) or not all(isinstance(options, list) for options in value.values()):
        return value
    return {key: next(iter(options), "") for key, options in value.items() if "" not in options}


def _java_text(value: Any, type_: str, element_type: str | None = None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and type_ == "ArrayList":
        listed = ", ".join(_java_element(item, element_type, quoted=True) for item in value)
        name = _JAVA_CLASSES.get(element_type or "", "String")
        return f"new ArrayList<{name}>(Arrays.asList({listed}))" if value else f"new ArrayList<{name}>()"
    if isinstance(value, list):
        listed = ", ".join(_java_element(item, element_type, quoted=False) for item in value)
        return f"new {_JAVA_ARRAYS.get(element_type or '', 'String')}[]{{{listed}}}"
    if isinstance(value, dict):
        puts = " ".join(f'put("{key}", {_java_element(item, "any", quoted=True)});' for key, item in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    suffix = {"long": "L", "float": "f"}.get(type_, "") if isinstance(value, int | float) else ""
    return f"{value}{suffix}"


def _java_element(value: Any, element_type: str | None, quoted: bool) -> str:
    """An `Array` keeps the quotes of its texts in the official conversion, so ours are written without."""
    if isinstance(value, str) and quoted:
        return f"'{value}'" if element_type == "char" else f'"{value}"'
    return _java_text(value, element_type or "any")


def _javascript_text(value: Any, type_: str, element_type: str | None = None) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_javascript_element(item, element_type) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_javascript_element(item, None)}" for key, item in value.items()) + "}"
    return f"{value}n" if type_ == "Bigint" else str(value)


def _javascript_element(value: Any, element_type: str | None) -> str:
    return f'"{value}"' if isinstance(value, str) else _javascript_text(value, element_type or "any")

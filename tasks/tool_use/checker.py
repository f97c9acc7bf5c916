"""Is a decoded call list one of the accepted answers? The rules of the official BFCL checker, errors included.

Source: bfcl-eval 2026.3.23, `eval_checker/ast_eval/ast_checker.py` and `eval_runner.py`. A `Verdict` carries the
official error kind, so that a disagreement can be looked up there. What the official code cannot handle (it stops with
a Python error) counts as a wrong value here; the data never asks for it.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.tool_use import convert_java, convert_javascript
from tasks.tool_use.calls import Call

PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_NESTED_PYTHON = ("array", "tuple")
_IGNORED = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`error` is None for a right answer, else the official error kind."""

    error: str | None = None
    detail: str = ""

    @property
    def right(self) -> bool:
        return self.error is None


RIGHT = Verdict()


def check_calls(
    functions: Sequence[dict[str, Any]], calls: Sequence[Call], answers: Sequence[dict[str, Any]], category: str,
    underscores: bool,
) -> Verdict:  # fmt: skip
    """Compare a call list with the accepted answers.

    Args:
        functions: descriptions as in the data: name, parameters.properties, parameters.required.
        calls: the decoded answer.
        answers: one {name: {parameter: [accepted values]}} per expected call; "" among the values = may be left out.
        category: BFCL category; decides language, and whether several calls come in any order.
        underscores: names were offered with "_" for "." (native tools).
    """
    if "parallel" in category:
        return _check_parallel(functions, calls, answers, category, underscores)
    multiple = "multiple" in category
    if len(calls) != (len(answers) if multiple else 1):
        kind = "multiple_function_checker" if multiple else "simple_function_checker"
        return Verdict(error=f"{kind}:wrong_count", detail=f"{len(calls)} calls")
    function = _find(functions, next(iter(answers[0]))) if multiple else functions[0]
    return check_call(function, calls[0], answers[0], category, underscores)


def _find(functions: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(function for function in functions if function["name"] == name)


def _check_parallel(
    functions: Sequence[dict[str, Any]], calls: Sequence[Call], answers: Sequence[dict[str, Any]], category: str,
    underscores: bool,
) -> Verdict:  # fmt: skip
    """Each accepted answer takes the first call that fits and is still free; it never gives one back."""
    kind = "parallel_function_checker_no_order"
    if len(calls) != len(answers):
        return Verdict(error=f"{kind}:wrong_count", detail=f"{len(calls)} calls for {len(answers)}")
    free = list(calls)
    for answer in answers:
        function = _find(functions, next(iter(answer)))
        for index, call in enumerate(free):
            if check_call(function, call, answer, category, underscores).right:
                del free[index]
                break
        else:
            return Verdict(error=f"{kind}:cannot_find_match", detail=f"no call fits {function['name']}")
    return RIGHT


def check_call(
    function: dict[str, Any], call: Call, answer: dict[str, Any], category: str, underscores: bool
) -> Verdict:
    """One call against one accepted answer: name, required, each value, then what may not be left out."""
    (accepted,) = answer.values()
    name = offered_name(function["name"], underscores)
    if name not in call:
        return Verdict(error="simple_function_checker:wrong_func_name", detail=f"expected {name}")
    arguments = call[name]
    properties = function["parameters"]["properties"]
    for parameter in function["parameters"]["required"]:
        if parameter not in arguments:
            return Verdict(error="simple_function_checker:missing_required", detail=parameter)
    for parameter, value in arguments.items():
        if parameter not in properties or parameter not in accepted:
            return Verdict(error="simple_function_checker:unexpected_param", detail=str(parameter))
        verdict = check_value(properties[parameter], value, accepted[parameter], category)
        if not verdict.right:
            return Verdict(error=verdict.error, detail=parameter)
    for parameter, options in accepted.items():
        if parameter not in arguments and "" not in options:
            return Verdict(error="simple_function_checker:missing_optional", detail=parameter)
    return RIGHT


def offered_name(name: str, underscores: bool) -> str:
    """The function's name as the model was shown it: native tools may not have dots in it."""
    return name.replace(".", "_") if underscores else name


def language_of(category: str) -> str:
    return {"simple_java": "java", "simple_javascript": "javascript"}.get(category, "python")


def check_value(schema: dict[str, Any], value: Any, options: list[Any], category: str) -> Verdict:
    """One argument: convert it to the language's type, check the type, then find it among the accepted values."""
    language = language_of(category)
    type_ = schema["type"]
    types, nested = {
        "python": (PYTHON_TYPES, _NESTED_PYTHON),
        "java": (convert_java.TYPES, convert_java.NESTED_TYPES),
        "javascript": (convert_javascript.TYPES, convert_javascript.NESTED_TYPES),
    }[language]
    element_type = schema["items"]["type"] if type_ in nested else None
    if language == "python":
        if type_ == "tuple" and type(value) is tuple:
            value = list(value)
        if type_ == "float" and type(value) is int:
            value = _to_float(value)
    elif type(value) is not str:
        return Verdict(error="type_error:java" if language == "java" else "type_error:js")
    elif language == "java":
        value = convert_java.convert_java(value, type_, element_type)
    else:
        value = convert_javascript.convert_javascript(value, type_, element_type)
    expected = types[type_]
    element = types[element_type] if element_type is not None else None
    kind, is_variable = _check_type(value, options, expected, element)
    if kind is not None:
        return Verdict(error=kind)
    if is_variable or expected not in (dict, list, str):
        return RIGHT if value in options else Verdict(error="value_error:others")
    if expected is dict:
        return _check_dict(value, options)
    if expected is str:
        texts = [_plain(option) for option in options if type(option) is str]
        return RIGHT if _plain(value) in texts else Verdict(error="value_error:string")
    if element is dict:
        return _check_dicts(value, options)
    lists = [[_plain(item) for item in option] for option in options if isinstance(option, list | str)]
    return RIGHT if [_plain(item) for item in value] in lists else Verdict(error="value_error:list/tuple")


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _type_of(options: Iterable[Any]) -> type | None:
    """Type of the first accepted value that is not the mark for "may be left out"."""
    return next((type(option) for option in options if option != ""), None)


def _check_type(value: Any, options: Iterable[Any], expected: type, element: type | None) -> tuple[str | None, bool]:
    """Official error kind or None, and whether the value stands for a variable (then it must be accepted literally).

    A value is a variable if the accepted ones are not of the described type. Types are exact: True is no integer.
    """
    options = list(options)
    accepted = _type_of(options)
    is_variable = accepted is not None and accepted is not expected
    kind = None
    if type(value) is expected:
        if element is None or any(_elements_fit(value, option, element) for option in options):
            return None, is_variable
        kind = "type_error:nested"
    if accepted is not None and type(value) is accepted:
        return kind, True
    return "type_error:simple", False


def _elements_fit(value: Any, option: Any, element: type) -> bool:
    """Whether all elements have the element type, or that of the accepted list's own elements."""
    return type(option) is not list or all(_check_type(item, option, element, None)[0] is None for item in value)


def _plain(value: Any) -> Any:
    """Text without blanks and punctuation, lower case, one kind of quote; anything else as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if type(value) is str else value


def _check_dict(value: dict[Any, Any], options: list[Any]) -> Verdict:
    """Every key accepted with one of its values, every accepted key there unless it may be left out; one level deep."""
    verdict = Verdict(error="dict_checker:unclear")
    for option in options:
        if option == "":
            continue
        verdict = _check_entries(value, option)
        if verdict.right:
            break
    return verdict


def _check_entries(value: Any, option: Any) -> Verdict:
    if not isinstance(value, dict) or not isinstance(option, dict):
        return Verdict(error="value_error:dict_value")
    verdict = RIGHT
    for key, item in value.items():
        if key not in option:
            verdict = Verdict(error="value_error:dict_key")
            break
        if _plain(item) not in [_plain(accepted) for accepted in _values(option[key])]:
            verdict = Verdict(error="value_error:dict_value")
            break
    if any(key not in value and "" not in _values(accepted) for key, accepted in option.items()):
        verdict = Verdict(error="value_error:dict_key")
    return verdict


def _values(accepted: Any) -> Any:
    """Accepted values of a dict's key; where the data has no list, a text counts letter by letter, officially too."""
    return accepted if isinstance(accepted, list | str) else [accepted]


def _check_dicts(value: list[Any], options: list[Any]) -> Verdict:
    """A list of dicts in the order of one accepted list."""
    verdict = Verdict(error="list_dict_checker:unclear")
    for option in options:
        if len(value) != len(option):
            verdict = Verdict(error="value_error:list_dict_count")
            continue
        verdict = RIGHT
        for item, accepted in zip(value, option, strict=True):
            verdict = _check_dict(item, [accepted])
            if not verdict.right:
                break
        if verdict.right:
            return RIGHT
    return verdict

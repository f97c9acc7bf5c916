"""Made-up functions in BFCL's form, a request, and the calls that it asks for."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from tasks.words import Vocabulary

MAX_FUNCTIONS = 40
_VERBS = (
    "get", "set", "find", "book", "send", "make", "open", "close", "create", "delete", "update", "check", "order",
    "cancel", "play", "start", "stop", "share", "move", "add", "remove", "list", "count", "search", "print", "save",
    "load", "sort", "rank",
)  # fmt: skip
_PARAMETERS = (
    "city", "name", "date", "amount", "color", "title", "user", "place", "item", "code", "size", "speed", "level",
    "count", "topic",
)  # fmt: skip
_INTEGERS = frozenset(("amount", "count", "level", "speed", "size"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A user's text and the one call (function name, arguments by name) it asks for."""

    text: str
    name: str
    arguments: dict[str, str | int]


def draw_functions(num: int, rng: random.Random, vocabulary: Vocabulary) -> tuple[dict[str, Any], ...]:
    """Functions with different names: description, one to three required parameters of type string or integer."""
    names: dict[tuple[str, str], None] = {}
    while len(names) < num:
        names[rng.choice(_VERBS), vocabulary.name(rng)] = None
    return tuple(_function(verb, noun, rng) for verb, noun in names)


def _function(verb: str, noun: str, rng: random.Random) -> dict[str, Any]:
    parameters = rng.sample(_PARAMETERS, rng.choice((1, 2, 2, 3)))
    types = {name: "integer" if name in _INTEGERS or rng.random() < 0.25 else "string" for name in parameters}
    return {
        "name": f"{verb}_{noun}",
        "description": f"{verb.capitalize()} the {noun}.",
        "parameters": {
            "type": "dict",
            "properties": {name: {"type": type_} for name, type_ in types.items()},
            "required": parameters,
        },
    }


def draw_request(function: dict[str, Any], rng: random.Random, vocabulary: Vocabulary) -> Request:
    """Values are words, pairs of words or numbers of one to four digits, named in the order of the schema."""
    verb, noun = function["name"].split("_", 1)
    quoted = rng.random() < 0.7
    form = rng.randrange(3)
    arguments: dict[str, str | int] = {}
    for name, schema in function["parameters"]["properties"].items():
        if schema["type"] == "integer":
            digits = rng.choice((1, 2, 3, 4))
            arguments[name] = rng.randrange(10 ** (digits - 1), 10**digits)
        else:
            words = [vocabulary.name(rng) for _ in range(rng.choice((1, 1, 2)))]
            arguments[name] = " ".join(words)
    parts = []
    for name, value in arguments.items():
        shown = f'"{value}"' if quoted and isinstance(value, str) else str(value)
        parts.append(f"{shown} as the {name}" if form == 1 else f"{name} {shown}")
    named = _joined(parts)
    text = (
        f"Please {verb} the {noun} with {named}.",
        f"{verb.capitalize()} the {noun}, use {named}.",
        f"I want to {verb} the {noun}. The parameters are {named}.",
    )[form]
    return Request(text=text, name=function["name"], arguments=arguments)


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def as_tools(functions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The functions as OpenAI tools; the only type that JSON schema names otherwise is the outer one."""
    return [
        {"type": "function", "function": {**function, "parameters": {**function["parameters"], "type": "object"}}}
        for function in functions
    ]

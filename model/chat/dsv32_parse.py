"""Completions of DeepSeek-V3.2 in its own markup (DSML): what was thought, said and called?

The language accepted is that of `parse_message_from_completion_text` in DeepSeek's encoding_dsv32.py (distributed with
the weights), with these differences: nothing raises, a completion may end without the end-of-sequence token (length
limits, stop strings), a block of tool calls must be closed, and every argument that is not a string must be JSON.
"""

import json
import re
from typing import Any, NoReturn

from model.chat.encoding import Reply, ToolCall

# ruff: noqa: RUF001 (the markers are spelled with full-width bars)
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"

CALLS_OPEN = f"\n\n<{DSML}function_calls"
CALLS_CLOSE = f"</{DSML}function_calls>"
INVOKE_OPEN = f"<{DSML}invoke"
INVOKE_CLOSE = f"</{DSML}invoke"
PARAMETER_OPEN = f"<{DSML}parameter"
PARAMETER_CLOSE = f"/{DSML}parameter"

# `$` also matches before a last newline: an invoke without parameters has an empty line there
_NAME = re.compile(r'\s*name="(.*?)">\n$', re.DOTALL)
_PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">(.*?)<$', re.DOTALL)


class _MalformedError(Exception):
    """Why a completion is outside the language; never leaves this file."""


def parse_completion(text: str, thinking: bool) -> Reply:
    """Parse a completion given as text. The thought, if any, ends at the first `</think>`; tokens are not counted."""
    if not thinking:
        return parse_answer("", text, None)
    reasoning, marker, answer = text.partition(THINK_END)
    if not marker:
        return open_thought(reasoning.removesuffix(EOS), None)
    return parse_answer(reasoning, answer, None)


def open_thought(reasoning: str, reasoning_tokens: int | None) -> Reply:
    """A thought that never ended is no answer, whatever stands in it."""
    return Reply(
        reasoning=reasoning,
        content="",
        tool_calls=(),
        reasoning_tokens=reasoning_tokens,
        truncated_thought=True,
        malformed=None,
    )


def parse_answer(reasoning: str, answer: str, reasoning_tokens: int | None) -> Reply:
    """Parse what follows the thought. A malformed answer keeps its text as content and has no tool calls."""
    calls: tuple[ToolCall, ...] = ()
    malformed = None
    try:
        content, calls = _content_and_calls(answer)
        for marker in (BOS, EOS, THINK, THINK_END, DSML):
            if marker in content:
                raise _MalformedError(f"{marker} inside the answer")
            if marker in reasoning and marker != THINK_END:
                raise _MalformedError(f"{marker} inside the thought")
    except _MalformedError as error:
        content, calls, malformed = answer.removesuffix(EOS), (), str(error)
    return Reply(
        reasoning=reasoning,
        content=content,
        tool_calls=calls,
        reasoning_tokens=reasoning_tokens,
        truncated_thought=False,
        malformed=malformed,
    )


def _content_and_calls(answer: str) -> tuple[str, tuple[ToolCall, ...]]:
    start, end = answer.find(CALLS_OPEN), answer.find(EOS)
    if start < 0 or 0 <= end < start:
        content, _, rest = answer.partition(EOS)
        if rest:
            raise _MalformedError("text after the end of the sequence")
        return content, ()
    calls, index = _read_calls(answer, start + len(CALLS_OPEN))
    if answer[index:] not in ("", EOS):
        raise _MalformedError("text after the tool calls")
    return answer[:start], calls


def _read_calls(text: str, index: int) -> tuple[tuple[ToolCall, ...], int]:
    """Calls of one block; index stands behind the opening tag's name and is returned behind the closing tag."""
    calls: list[ToolCall] = []
    while True:
        between, stop, index = _until(text, index, INVOKE_OPEN, CALLS_CLOSE)
        if between != ">\n":
            raise _MalformedError(f"expected a tool call or the end of the block, got {between[:40]!r}")
        if stop == CALLS_CLOSE:
            return tuple(calls), index
        call, index = _read_call(text, index)
        calls.append(call)


def _read_call(text: str, index: int) -> tuple[ToolCall, int]:
    header, stop, index = _until(text, index, PARAMETER_OPEN, INVOKE_CLOSE)
    name = _NAME.match(header)
    if name is None:
        raise _MalformedError(f'expected name="…"> behind invoke, got {header[:40]!r}')
    arguments: dict[str, Any] = {}
    while stop == PARAMETER_OPEN:
        body, _, index = _until(text, index, PARAMETER_CLOSE)
        parameter = _PARAMETER.match(body)
        if parameter is None:
            raise _MalformedError(f'expected name="…" string="true|false">…< behind parameter, got {body[:40]!r}')
        key, is_string, value = parameter.groups()
        if key in arguments:
            raise _MalformedError(f"argument {key!r} twice")
        arguments[key] = value if is_string == "true" else _json_value(key, value)
        between, stop, index = _until(text, index, PARAMETER_OPEN, INVOKE_CLOSE)
        if between != ">\n":
            raise _MalformedError(f"expected a parameter or the end of the call, got {between[:40]!r}")
    return ToolCall(name=name[1], arguments=arguments), index


def _until(text: str, index: int, *stops: str) -> tuple[str, str, int]:
    """Text up to the nearest stop, that stop, and the index behind it."""
    found = [(position, stop) for stop in stops if (position := text.find(stop, index)) >= 0]
    if not found:
        raise _MalformedError(f"{stops[-1]} is missing")
    position, stop = min(found)
    return text[index:position], stop, position + len(stop)


def _json_value(key: str, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _MalformedError(f"argument {key!r}: expected JSON, got {text[:40]!r}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

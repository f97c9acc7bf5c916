"""Tool calls in Hermes markup: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Qwen2.5 and Qwen3 write them.

Source: NousResearch/Hermes-Function-Calling, README; the chat templates of Qwen2.5 and Qwen3.
"""

import json
from typing import Any, NoReturn

from model.chat.encoding import ToolCall

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


def parse_hermes(text: str) -> tuple[str, tuple[ToolCall, ...], str | None]:
    """Content outside the calls, the calls, and why they are malformed (then the whole text is content, no calls)."""
    content: list[str] = []
    calls: list[ToolCall] = []
    rest = text
    while True:
        before, opened, rest = rest.partition(OPEN)
        content.append(before)
        if not opened:
            break
        body, closed, rest = rest.partition(CLOSE)
        call = _call(body) if closed else f"{CLOSE} is missing"
        if isinstance(call, str):
            return text, (), call
        calls.append(call)
    if not calls:
        return text, (), None
    return "".join(content).strip(), tuple(calls), None


def _call(body: str) -> ToolCall | str:
    """The call, or why it is none."""
    try:
        value: Any = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return f"expected JSON in a tool call, got {body.strip()[:40]!r}"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return "expected an object with a name in a tool call"
    if not isinstance(value.get("arguments"), dict):
        return f"tool call {value['name']!r}: expected an object as arguments"
    return ToolCall(name=value["name"], arguments=value["arguments"])


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

"""From an answer's text to its score: decode by category and mode, then compare."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.tool_use.calls import MAX_CHARS, MAX_DEPTH, Call, DecodeError, NoCallError, canonical
from tasks.tool_use.checker import check_calls, language_of
from tasks.tool_use.decode_java import decode_java
from tasks.tool_use.decode_javascript import decode_javascript
from tasks.tool_use.decode_python import decode_python

NO_CALL = "no call"
_DECODERS: dict[str, Callable[[str], list[Call]]] = {
    "python": decode_python,
    "java": decode_java,
    "javascript": decode_javascript,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallScore:
    """Score of one answer.

    `decoded`: at least one call could be read. `answer`: the calls as one text; None if none could be read, but
    "no call" where the right answer is not to call. `reason`: empty if right, else the official error kind, a detail.
    """

    right: bool
    decoded: bool
    answer: str | None
    reason: str


def score_answer(
    text: str, functions: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], category: str, mode: str
) -> CallScore:
    """Score one answer by the official rules; never raises, whatever the text is.

    Args:
        text: the answer behind the thought; in native mode a JSON list of {"name", "arguments"}.
        functions: descriptions as in the data.
        answers: accepted calls as in the data; empty for the relevance categories.
        category: BFCL category.
        mode: "prompting" or "native".
    """
    relevance = "relevance" in category
    try:
        if mode == "native":
            calls = decode_native(text)
        else:  # the official runner reads relevance answers as Python whatever the functions' language
            calls = _DECODERS["python" if relevance else language_of(category)](text)
        kind, failure = "", ""
    except DecodeError as error:
        kind = "decoder_wrong_output_format" if isinstance(error, NoCallError) else "decoder_failed"
        calls, failure = [], str(error)
    decoded = bool(calls)
    answer = canonical(calls) if decoded else None
    if "irrelevance" in category:
        reason = "irrelevance_error:decoder_success" if decoded else ""
        return CallScore(right=not decoded, decoded=decoded, answer=answer or NO_CALL, reason=reason)
    if relevance:
        reason = "" if decoded else f"relevance_error:decoder_failed: {failure or 'an empty list'}"
        return CallScore(right=decoded, decoded=decoded, answer=answer, reason=reason)
    if failure:
        return CallScore(right=False, decoded=False, answer=None, reason=f"ast_decoder:{kind}: {failure}")
    verdict = check_calls(functions, calls, answers, category, underscores=mode == "native")
    reason = ": ".join(part for part in (verdict.error, verdict.detail) if part)
    return CallScore(right=verdict.right, decoded=decoded, answer=answer, reason=reason)


def decode_native(text: str) -> list[Call]:
    """Calls of the model's own tool format, which arrive as a JSON list of {"name", "arguments"}.

    Raises:
        DecodeError: anything else, as when the model answered in words.
    """
    if len(text) > MAX_CHARS:
        raise DecodeError(f"longer than {MAX_CHARS} characters")
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        raise DecodeError("no tool call in the answer") from None
    if not isinstance(items, list) or _depth(items) > MAX_DEPTH:
        raise DecodeError("tool calls are no JSON list of bounded depth")
    return [_native_call(item) for item in items]


def _native_call(item: Any) -> Call:
    name = item.get("name") if isinstance(item, dict) else None
    arguments = item.get("arguments") if isinstance(item, dict) else None
    if isinstance(arguments, str):  # some endpoints hand the arguments on as JSON text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict) or _depth(arguments) > MAX_DEPTH:
        raise DecodeError('a tool call is no {"name", "arguments"}')
    return {name: arguments}


def _depth(value: Any) -> int:
    """Levels of lists and dicts, counted without recursion."""
    levels, layer = 0, [value]
    while layer and levels <= MAX_DEPTH:
        layer = [
            child
            for item in layer
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
        levels += 1
    return levels

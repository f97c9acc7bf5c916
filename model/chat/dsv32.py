"""DeepSeek-V3.2's own chat encoding, which it ships as code instead of a jinja template.

Fixed strings and rules: encoding_dsv32.py and its test outputs, distributed with deepseek-ai/DeepSeek-V3.2's weights
(copies: sgl-project/sglang `encoding_dsv32.py`, InternLM/lmdeploy `deepseek_v32_encoding.py`). vLLM's copy and later
ones of sglang lost the blank lines inside the tools text; the official test outputs have them, and so has this file.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from model.chat.dsv32_parse import ASSISTANT, BOS, DSML, EOS, THINK, THINK_END, USER, open_thought, parse_answer
from model.chat.encoding import Message, Reply, Span, Tool
from model.chat.tokenizer import TextTokenizer, without_eos
from model.errors import ModelError

TOOLS_TEXT = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your reply to the \
user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

{THINK}...thinking about results{THINK_END}

Here are the functions available in JSONSchema format:
<functions>
%s
</functions>
"""
RESPONSE_FORMAT_TEXT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n%s"


class Dsv32Encoding:
    """`ChatEncoding` of DeepSeek-V3.2 around the tokenizer of its folder."""

    has_template = True
    has_native_tools = True
    has_thinking_switch = True

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.fingerprint = tokenizer.fingerprint("deepseek_v32")
        eos = tokenizer.token_id(EOS)
        self.eos_ids = tuple(sorted({*tokenizer.eos_ids, *([] if eos is None else [eos])}))
        self.think_end_id = tokenizer.token_id(THINK_END)

    @staticmethod
    def fits(tokenizer: TextTokenizer) -> bool:
        """Every marker is one token of the vocabulary."""
        return all(tokenizer.token_id(text) is not None for text in (BOS, EOS, USER, ASSISTANT, THINK, THINK_END))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        return self._tokenizer.encode_with_offsets(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, thinking: bool = False, prefix: str = ""
    ) -> str:
        """See `render_messages`."""
        return render_messages(messages, tools, thinking, prefix)

    def plain(self, text: str) -> str:
        return BOS + text

    def parse(self, ids: Sequence[int], thinking: bool) -> Reply:
        """The thought ends at the first end-of-thought *token*; the same letters spelled otherwise are text."""
        tokens = without_eos(ids, self.eos_ids)
        if not thinking:
            return parse_answer("", self.decode(tokens), 0)
        if self.think_end_id not in tokens:
            return open_thought(self.decode(tokens), len(tokens))
        end = tokens.index(self.think_end_id)
        return parse_answer(self.decode(tokens[:end]), self.decode(tokens[end + 1 :]), end)


def render_messages(
    messages: Sequence[Message], tools: Sequence[Tool] | None = None, thinking: bool = False, prefix: str = ""
) -> str:
    """The prompt of a conversation, or its whole text if the last message is the assistant's.

    tools: declared in the first message if that is the system's, else in an empty system message put before it.
    A system or developer message may also bring its own `tools` and `response_format`.
    Reasoning is kept behind the last user (or developer) message only, across any number of tool turns.
    prefix: start of the answer; it cannot be given to an open thought.
    Raises ModelError for a conversation that the format cannot hold.
    """
    turns = list(messages)
    if tools:
        if turns and turns[0].get("role") == "system":
            turns[0] = {**turns[0], "tools": [*(turns[0].get("tools") or ()), *tools]}
        else:
            turns.insert(0, {"role": "system", "content": "", "tools": tools})
    if prefix and thinking:
        raise ModelError(
            "messages: a start of the answer cannot be given to a model that thinks first; set thinking: false"
        )
    if prefix and turns and turns[-1].get("role") == "assistant":
        raise ModelError(
            "messages: a start of the answer needs a user or tool message before it, got an assistant message"
        )
    last_user = max((i for i, turn in enumerate(turns) if turn.get("role") in ("user", "developer")), default=-1)
    parts = [BOS]
    open_results = 0
    for index, turn in enumerate(turns):
        role, where = turn.get("role"), f"messages[{index}]"
        opening = THINK if thinking and index >= last_user else THINK_END
        if role == "tool":
            if not open_results:
                raise ModelError(f"{where}: a tool result without a tool call of the assistant before it")
            first = turns[index - 1].get("role") != "tool"
            open_results -= 1
            parts.append("\n\n<function_results>" if first else "")
            parts.append(f"\n<result>{_text(turn, where)}</result>")
            parts.append("" if open_results else f"\n</function_results>\n\n{opening}")
            continue
        if open_results and index and turns[index - 1].get("role") == "tool":
            raise ModelError(f"{where}: {open_results} more tool results expected, got a message of role {role!r}")
        open_results = 0
        if role == "system":
            parts.append(_text(turn, where, optional=True) + _declarations(turn, where))
        elif role == "user":
            parts.append(f"{USER}{_text(turn, where)}{ASSISTANT}{opening}")
        elif role == "developer":
            request = f"{_declarations(turn, where)}\n\n# The user's message is: {_text(turn, where)}"
            parts.append(f"{USER}{request}{ASSISTANT}{opening}")
        elif role == "assistant":
            parts.append(_assistant(turn, where, keep_thought=thinking and index > last_user))
            open_results = len(turn.get("tool_calls") or ())
        else:
            raise ModelError(f"{where}: expected role system, developer, user, assistant or tool, got {role!r}")
    if turns and turns[-1].get("role") == "tool" and open_results:
        raise ModelError(f"messages: {open_results} more tool results expected at the end")
    return "".join(parts) + prefix


def _declarations(turn: Message, where: str) -> str:
    """Tools and response format of a system or developer message, each behind a blank line."""
    text = ""
    if tools := turn.get("tools"):
        schemas = [_json(_field(tool, "function", Mapping, f"{where}.tools")) for tool in tools]
        text += "\n\n" + TOOLS_TEXT % "\n".join(schemas)
    if schema := turn.get("response_format"):
        text += "\n\n" + RESPONSE_FORMAT_TEXT % _json(schema)
    return text


def _assistant(turn: Message, where: str, keep_thought: bool) -> str:
    calls = turn.get("tool_calls") or ()
    reasoning = turn.get("reasoning_content") or ""
    thought = ""
    if keep_thought:
        if not (reasoning or calls):
            raise ModelError(f"{where}: expected reasoning_content or tool_calls behind the last user message")
        thought = reasoning + THINK_END
    return thought + _text(turn, where, optional=True) + _calls(calls, where) + EOS


def _calls(calls: Sequence[Mapping[str, Any]], where: str) -> str:
    if not calls:
        return ""
    lines = ["", "", f"<{DSML}function_calls>"]
    for number, call in enumerate(calls):
        here = f"{where}.tool_calls[{number}]"
        function = _field(call, "function", Mapping, here)
        lines.append(f'<{DSML}invoke name="{_field(function, "name", str, here)}">')
        # an empty argument list leaves an empty line
        lines.append("\n".join(_parameter(key, value) for key, value in _arguments(function, here).items()))
        lines.append(f"</{DSML}invoke>")
    return "\n".join([*lines, f"</{DSML}function_calls>"])


def _parameter(key: str, value: Any) -> str:
    is_string = isinstance(value, str)
    text = value if is_string else _json(value)
    return f'<{DSML}parameter name="{key}" string="{"true" if is_string else "false"}">{text}</{DSML}parameter>'


def _arguments(function: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Arguments of a call, given as an object or as its JSON text."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ModelError(f"{where}.arguments: expected a JSON object, got {error}") from error
    if not isinstance(arguments, Mapping):
        raise ModelError(f"{where}.arguments: expected a JSON object, got {type(arguments).__name__}")
    return arguments


def _text(turn: Message, where: str, optional: bool = False) -> str:
    content = turn.get("content")
    if content is None and optional:
        return ""
    if not isinstance(content, str):
        raise ModelError(f"{where}.content: expected a text, got {type(content).__name__}")
    return content


def _field(owner: Any, name: str, kind: type, where: str) -> Any:
    value = owner.get(name) if isinstance(owner, Mapping) else None
    if not isinstance(value, kind):
        raise ModelError(f"{where}.{name}: expected {kind.__name__.lower()}, got {type(value).__name__}")
    return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

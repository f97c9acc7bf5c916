"""Chat encodings of all other models: the tokenizer's own jinja template, or raw text where there is none."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from model.chat.encoding import Message, Reply, Span, Tool, ToolCall
from model.chat.hermes import parse_hermes
from model.chat.tokenizer import TextTokenizer, without_eos
from model.errors import ModelError

THINK = "<think>"
THINK_END = "</think>"

_PROBE: dict[str, Any] = {"name": "probe_7f3", "description": "", "parameters": {"type": "object", "properties": {}}}

# templates that print today's date would give another prompt tomorrow; this is the date Llama 3 templates fall back to
_DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")


class RawEncoding:
    """`ChatEncoding` without roles: what a base model continues."""

    has_template = False
    has_native_tools = False
    has_thinking_switch = False
    think_end_id: int | None = None
    kind = "raw"

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.fingerprint = tokenizer.fingerprint(self.kind)
        self.eos_ids = tokenizer.eos_ids

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        return self._tokenizer.encode_with_offsets(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, thinking: bool = False, prefix: str = ""
    ) -> str:
        """Contents with a blank line between them, the prefix behind a space; begins as the tokenizer's rule says."""
        if tools:
            raise ModelError("tools: raw text has no tool format; use the prompting mode")
        text = "\n\n".join(str(message.get("content") or "") for message in messages)
        # as lm-eval joins a question and its gen_prefix
        gap = " " if text and prefix and not text[-1].isspace() and not prefix[0].isspace() else ""
        return self._tokenizer.bos + text + gap + prefix

    def plain(self, text: str) -> str:
        return self._tokenizer.bos + text

    def parse(self, ids: Sequence[int], thinking: bool) -> Reply:
        """Everything is content."""
        return _reply(content=self.decode(without_eos(ids, self.eos_ids)))


class TemplateEncoding(RawEncoding):
    """`ChatEncoding` by the chat template of a tokenizer.

    The thinking switch is the template's variable `enable_thinking` or `thinking`. Tools are native if the template
    takes them and writes a call in Hermes markup.
    """

    has_template = True
    kind = "template"

    def __init__(self, tokenizer: TextTokenizer) -> None:
        super().__init__(tokenizer)
        self.think_end_id = tokenizer.token_id(THINK_END)
        # what a template can do is what changes its rendering: the words alone may stand in a text or a comment
        self._switches = [
            name
            for name in ("enable_thinking", "thinking")
            if self._probe(None, **{name: True}) != self._probe(None, **{name: False})
        ]
        self._takes_tools = _PROBE["name"] in self._probe(tools=[{"type": "function", "function": _PROBE}])
        self.has_thinking_switch = self.think_end_id is not None and bool(self._switches)
        self.has_native_tools = self._takes_tools and self._writes_hermes()
        # a prompt that itself opens the thought: always, or when switched on
        self._opens_thought = {
            thinking: self._probe(None, **dict.fromkeys(self._switches, thinking)).rstrip().endswith(THINK)
            for thinking in (False, True)
        }

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, thinking: bool = False, prefix: str = ""
    ) -> str:
        """Raises ModelError if the template refuses the messages, or tools, or a prefix to an open thought."""
        if tools and not self._takes_tools:
            raise ModelError("tools: this model's chat template takes no tools; use the prompting mode")
        if prefix and thinking and self.has_thinking_switch:
            raise ModelError("a start of the answer cannot be given to a model that thinks first; set thinking: false")
        return self._apply(messages, tools, **dict.fromkeys(self._switches, thinking)) + prefix

    def parse(self, ids: Sequence[int], thinking: bool) -> Reply:
        """The thought ends at the first end-of-thought token; a thought that was never opened cannot be truncated."""
        tokens = without_eos(ids, self.eos_ids)
        end = tokens.index(self.think_end_id) if self.think_end_id in tokens else None
        if end is not None:
            reasoning, answer = self.decode(tokens[:end]), self.decode(tokens[end + 1 :]).lstrip("\n")
        else:
            reasoning, answer = "", self.decode(tokens)
            opened = self._opens_thought[thinking] or answer.lstrip().startswith(THINK)
            if self.think_end_id is not None and opened:
                return _reply(
                    reasoning=_bare(answer),
                    tool_calls=() if self.has_native_tools else None,
                    reasoning_tokens=len(tokens),
                    truncated_thought=True,
                )
        content, calls, malformed = parse_hermes(answer) if self.has_native_tools else (answer, None, None)
        return _reply(
            reasoning=_bare(reasoning),
            content=content,
            tool_calls=calls,
            reasoning_tokens=None if self.think_end_id is None else end or 0,
            malformed=malformed,
        )

    def _apply(self, messages: Sequence[Message], tools: Sequence[Tool] | None, **switches: bool) -> str:
        source = self._tokenizer.source
        try:
            text = source.apply_chat_template(
                [_with_argument_objects(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=_TODAY.sub(_fixed_date, source.get_chat_template(tools=tools)),
                tokenize=False,
                add_generation_prompt=True,
                **switches,
            )
        except Exception as error:
            # templates raise whatever jinja or their own raise_exception gives
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelError(f"messages: the model's chat template refuses them: {reason}") from error
        bos = self._tokenizer.bos
        return str(text) if str(text).startswith(bos) else bos + str(text)

    def _probe(self, tools: Sequence[Tool] | None, **switches: bool) -> str:
        """The smallest prompt, "" if the template refuses it: then the first real prompt says so."""
        try:
            return self._apply([{"role": "user", "content": "a"}], tools, **switches)
        except ModelError:
            return ""

    def _writes_hermes(self) -> bool:
        """Does a call written by the template come back from the parser?"""
        call = {"name": _PROBE["name"], "arguments": {"x": [1]}}
        calls = [{"id": "call00001", "type": "function", "function": call}]
        messages: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        try:
            _, found, _ = parse_hermes(self._apply(messages, None))
        except ModelError:
            return False
        return [{"name": back.name, "arguments": back.arguments} for back in found] == [call]


def _reply(
    reasoning: str = "",
    content: str = "",
    tool_calls: tuple[ToolCall, ...] | None = None,
    reasoning_tokens: int | None = None,
    truncated_thought: bool = False,
    malformed: str | None = None,
) -> Reply:
    return Reply(
        reasoning=reasoning,
        content=content,
        tool_calls=tool_calls,
        reasoning_tokens=reasoning_tokens,
        truncated_thought=truncated_thought,
        malformed=malformed,
    )


def _bare(thought: str) -> str:
    """A thought without the marker that the model itself opened it with, and without the line breaks around it."""
    return thought.lstrip().removeprefix(THINK).strip("\n")


def _fixed_date(call: re.Match[str]) -> str:
    return json.dumps(_DATE.strftime(call[2]))


def _with_argument_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with arguments of tool calls as objects: templates write them with `tojson`."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"])
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}

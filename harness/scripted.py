"""Engines without a model: they answer what the plan wrote into the request, and so prove plan, journal and scorers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from harness.engine import Reply, Request, Result, Usage
from harness.errors import HarnessError


class ScriptedEngine:
    """Answers `Request.reply`, whole, whatever the token limit: a script has no tokens to count.

    A continuation to score gets log-probability 0 per token where it is the reply, -1 elsewhere. A request without a
    reply is an error.
    """

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            yield _answer(request)


def _answer(request: Request) -> Result:
    reply = request.reply
    usage = Usage(prompt_tokens=len(request.token_ids), completion_tokens=0)
    if reply is None:
        error = "the plan wrote no reply for the scripted model"
        return Result(id=request.id, token_ids=(), text="", finish_reason="error", usage=usage, error=error)
    ids = tuple(reply.encode())
    if request.continuation is not None:
        is_reply = request.continuation == ids
        logprob = 0.0 if is_reply else -1.0
        return Result(
            id=request.id,
            token_ids=(),
            text="",
            finish_reason="scored",
            usage=usage,
            logprobs=tuple(logprob for _ in request.continuation),
            is_greedy=is_reply,
        )
    usage = Usage(prompt_tokens=len(request.token_ids), completion_tokens=len(ids))
    return Result(id=request.id, token_ids=ids, text=reply, finish_reason="stop", usage=usage)


class ByteEncoding:
    """A `ChatEncoding` whose tokens are the UTF-8 bytes of the text, for scripts and for endpoints without a tokenizer.

    Messages are rendered with their roles on lines of their own. There is no native tool format and no thinking token,
    so thoughts have no token count; a thought that an answer spells out between <think> and </think> is still cut off.
    """

    fingerprint = "utf8-bytes-1"
    eos_ids: tuple[int, ...] = ()
    think_end_id = None
    has_template = True
    has_native_tools = False
    has_thinking_switch = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [(index, index + 1) for index, character in enumerate(text) for _ in character.encode()]
        return self.encode(text), spans

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        prefix: str = "",
    ) -> str:
        if tools:
            raise HarnessError("tools: expected an encoding with a tool format of its own, this one has bytes only")
        turns = [f"{message['role']}:\n{message['content']}\n\n" for message in messages]
        return "".join(turns) + "assistant:\n" + ("<think>" if thinking else "") + prefix

    def plain(self, text: str) -> str:
        return text

    def parse(self, ids: Sequence[int], thinking: bool) -> Reply:
        text = self.decode(ids)
        if not (thinking or text.startswith("<think>")):
            thought, mark, content = "", "", text
        else:
            thought, mark, content = text.removeprefix("<think>").partition("</think>")
            content = content.lstrip("\n")
        return Reply(
            reasoning=thought,
            content=content,
            tool_calls=None,
            reasoning_tokens=None,
            truncated_thought=bool(thought) and not mark,
            malformed=None,
        )

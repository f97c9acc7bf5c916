"""An engine behind an OpenAI-compatible server: chat completions, several in flight, retried where that can help."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from harness.engine import FinishReason, Request, Result, Usage
from harness.errors import HarnessError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion


class EndpointEngine:
    """Sends messages, never token ids: the server renders its own prompt.

    Args:
        url: base of the API, e.g. http://localhost:8000/v1.
        name: the model's name there.
        key_env: environment variable that holds the key; None is a server without keys.
        max_in_flight: requests open at the same time.
        max_retries: after refusals (408, 409, 429, 5xx), broken connections and timeouts, with growing pauses.
        timeout_seconds: of one try.

    A request that still fails is an error result. Raises HarnessError when the key is missing.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        key_env: str | None = None,
        max_in_flight: int = 16,
        max_retries: int = 5,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self._url = url
        self._name = name
        self._key = _key(key_env)
        self._max_in_flight = max_in_flight
        self._max_retries = max_retries
        self._timeout_seconds = timeout_seconds

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        import openai

        client = openai.OpenAI(
            base_url=self._url, api_key=self._key, max_retries=self._max_retries, timeout=self._timeout_seconds
        )
        source = iter(requests)
        running: set[Future[Result]] = set()
        with client, ThreadPoolExecutor(self._max_in_flight) as threads:
            while True:
                while len(running) < self._max_in_flight and (request := next(source, None)) is not None:
                    running.add(threads.submit(self._answer, client, request))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()

    def _answer(self, client: "OpenAI", request: Request) -> Result:
        import openai

        if request.continuation is not None:
            return _failed(request, "an endpoint gives no log-likelihoods of a prompt; use a generate_until task")
        if request.messages is None:
            return _failed(request, "an endpoint needs messages, the plan gave token ids only")
        start = time.perf_counter()
        try:
            reply = client.chat.completions.create(**self._body(request))
        except openai.APIStatusError as error:
            return _failed(request, f"the server answered {error.status_code}: {_shorten(error.message)}")
        except openai.OpenAIError as error:
            return _failed(request, f"{type(error).__name__}: {_shorten(str(error))}")
        return _result(request, reply, seconds=time.perf_counter() - start)

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._name,
            "messages": [dict(message) for message in request.messages or ()],
            "max_tokens": request.max_tokens,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "seed": request.seed,
        }
        if request.tools:
            body["tools"] = [dict(tool) for tool in request.tools]
        extra: dict[str, Any] = {}
        if request.sampling.top_k is not None:
            extra["top_k"] = request.sampling.top_k
        if request.thinking:
            # templates name their switch differently; servers hand both on to the template, which ignores one
            extra["chat_template_kwargs"] = {"thinking": True, "enable_thinking": True}
        elif request.stop:
            body["stop"] = list(request.stop[:4])  # the API takes four; a server would also stop inside a thought
        return {**body, "extra_body": extra} if extra else body


def _result(request: Request, reply: "ChatCompletion", seconds: float) -> Result:
    if not reply.choices:
        return _failed(request, "the server answered without a choice")
    choice = reply.choices[0]
    message = choice.message
    calls = [call for call in message.tool_calls or () if call.type == "function"]
    content = message.content or ""
    if calls:
        content = json.dumps([{"name": call.function.name, "arguments": _arguments(call)} for call in calls])
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    finish: FinishReason = "length" if choice.finish_reason == "length" else "stop"
    usage = reply.usage
    cached = usage.prompt_tokens_details if usage else None
    spent = usage.completion_tokens_details if usage else None
    return Result(
        id=request.id,
        token_ids=(),
        text=_with_thought(thought, _cut(content, request.stop), request.thinking, finish),
        finish_reason=finish,
        usage=Usage(
            prompt_tokens=usage.prompt_tokens if usage else len(request.token_ids),
            completion_tokens=usage.completion_tokens if usage else 0,
            cached_tokens=(cached.cached_tokens or 0) if cached else 0,
            reasoning_tokens=spent.reasoning_tokens if spent else None,
        ),
        seconds=seconds,
    )


def _with_thought(thought: str | None, content: str, thinking: bool, finish: FinishReason) -> str:
    """Thought and answer as one text with the marker between them, as a local engine would give it.

    Servers without a reasoning parser send the markers in the content; those that hide the thought send neither.
    """
    if thought:
        is_cut = finish == "length" and not content
        return f"<think>{thought}" if is_cut else f"<think>{thought}</think>{content}"
    if thinking and finish == "stop" and "</think>" not in content:
        return f"<think></think>{content}"
    return content


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """Up to the first stop string behind the thought, for servers that took none or only four."""
    content = text.rpartition("</think>")[2]
    ends = [content.find(string) for string in stop if string in content]
    return text if not ends else text[: len(text) - len(content) + min(ends)]


def _arguments(call: Any) -> Any:
    """Arguments as JSON values; a server that sends broken JSON has its text kept, and the scorer finds it wrong."""
    try:
        return json.loads(call.function.arguments or "{}")
    except ValueError:
        return call.function.arguments


def _failed(request: Request, reason: str) -> Result:
    usage = Usage(prompt_tokens=len(request.token_ids), completion_tokens=0)
    return Result(id=request.id, token_ids=(), text="", finish_reason="error", usage=usage, error=reason)


def _key(key_env: str | None) -> str:
    if key_env is None:
        return "none"
    key = os.environ.get(key_env)
    if not key:
        raise HarnessError(f"model.key_env: expected the key in the environment variable {key_env}, it is not set")
    return key


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"

"""Planned work and the journal line that it becomes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from harness.engine import ChatEncoding, Request, Result
from harness.records import Record, Response


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedItem:
    """One (variant, task, doc, repeat): becomes one journal line when all its requests are answered.

    task: name of the suite entry. prompt_tokens: of the longest request. max_tokens: answer budget.
    requests: one for generation, one per choice for log-likelihoods; ids are `<key>/<index>`, so the key
    of a result is `result.id.rpartition("/")[0]` and its place is behind the slash.
    """

    key: str
    variant: str
    task: str
    doc_id: str
    repeat: int
    group: Mapping[str, Any]
    cluster: str
    doc_hash: str
    prompt_hash: str
    prompt_tokens: int
    max_tokens: int
    requests: tuple[Request, ...]


def record_of(item: PlannedItem, results: Sequence[Result], encoding: ChatEncoding) -> Record:
    """The journal line of an item; `results` are in the order of `item.requests`.

    An error in any of the results makes the record an error without responses.
    """
    assert [result.id for result in results] == [request.id for request in item.requests], "results of another item"
    failed = next((result for result in results if result.finish_reason == "error"), None)
    pairs = zip(item.requests, results, strict=True)
    probes = results[0].probes
    recall = None
    if probes is not None and failed is None:
        from harness.recall import summarise

        recall = summarise(probes)
    return Record(
        key=item.key,
        variant=item.variant,
        task=item.task,
        doc_id=item.doc_id,
        repeat=item.repeat,
        group=item.group,
        cluster=item.cluster,
        doc_hash=item.doc_hash,
        prompt_hash=item.prompt_hash,
        prompt_tokens=item.prompt_tokens,
        responses=() if failed else tuple(response_of(request, result, encoding) for request, result in pairs),
        max_tokens=item.max_tokens,
        seconds=sum(result.seconds for result in results),
        recall=recall,
        error=(failed.error or "the engine gave no reason") if failed else None,
    )


def response_of(request: Request, result: Result, encoding: ChatEncoding) -> Response:
    """What scorers and tables need of one completion; the thought is separated by token ids, never by text alone."""
    if request.continuation is not None:
        return Response(
            text="",
            answer="",
            finish_reason=result.finish_reason,
            completion_tokens=result.usage.completion_tokens,
            logprob=sum(result.logprobs or ()),
            is_greedy=bool(result.is_greedy),
        )
    # engines that get text only (endpoints) leave the ids empty
    reply = encoding.parse(result.token_ids or encoding.encode(result.text), request.thinking)
    answer = _until(reply.content, request.stop)
    if reply.tool_calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
        answer = json.dumps(calls, ensure_ascii=False)
    return Response(
        text=result.text,
        answer="" if reply.truncated_thought else answer,
        finish_reason=result.finish_reason,
        completion_tokens=result.usage.completion_tokens,
        reasoning_tokens=result.usage.reasoning_tokens if reply.reasoning_tokens is None else reply.reasoning_tokens,
        truncated_thought=reply.truncated_thought,
    )


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string: token ids may reach beyond it."""
    ends = [place for place in (text.find(ending) for ending in stop) if place >= 0]
    return text[: min(ends)] if ends else text

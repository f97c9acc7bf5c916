"""The lines of a journal and the scores made from them: what run, scores, comparison and report hand each other."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One completion of a record (a log-likelihood task has one per choice).

    text: raw completion, thought included. answer: what scorers see: the text behind the thought, "" when the thought
    was cut off; for native tool calls a JSON list of {"name", "arguments"}. reasoning_tokens: None where the model has
    no thinking marker. logprob: sum over the continuation, natural log; None for generation.
    """

    text: str
    answer: str
    finish_reason: str
    completion_tokens: int
    reasoning_tokens: int | None = None
    truncated_thought: bool = False
    logprob: float | None = None
    is_greedy: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One journal line: one finished (variant, task, doc, repeat).

    key: the journal key of design.md §3.5. task: name of the suite entry. doc_id: unique within the task.
    group: the doc's table fields, e.g. {"category": "math"} or {"length": 4096, "depth": 50.0}.
    cluster: samples that share a context share it. recall: summary of the probes, see harness/recall.py.
    error: a failed sample; it has no responses and is never counted as a wrong answer.
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
    responses: tuple[Response, ...]
    max_tokens: int
    seconds: float
    recall: Mapping[str, Any] | None = None
    recall_part: str | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleScore:
    """A record after scoring.

    metrics: numbers named by the task, 0..1 unless the task's README says otherwise; empty when the record is an error.
    answer: the extracted answer, None when nothing could be parsed. headline: name of the metric that tables lead with.
    truncated: a completion hit its token limit.
    """

    variant: str
    task: str
    doc_id: str
    repeat: int
    group: Mapping[str, Any]
    cluster: str
    doc_hash: str
    prompt_hash: str
    headline: str
    metrics: Mapping[str, float]
    answer: str | None
    unparsed: bool
    truncated: bool
    error: str | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int | None
    answer_tokens: int | None
    text: str
    recall: Mapping[str, Any] | None = None

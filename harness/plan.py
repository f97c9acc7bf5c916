"""From a config to the list of everything that must be run: prompts as token ids, keys, what the run folder stores."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.config import Config
from harness.engine import Request, Result
from harness.records import Record

if TYPE_CHECKING:
    from model.chat.encoding import ChatEncoding

    from harness.taskset import Task


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All work of one config, and what is stored so that scoring needs neither model nor data set.

    docs: per task the lines of docs/<task>.jsonl. Besides the contract's fields a line has "keys":
    {variant: [journal key of repeat 0, 1, …]}; a journal line whose key is not listed belongs to older settings.
    entries: the suite's tasks, opened. encodings: chat encoding per variant (shared where the model is).
    fingerprints: of the weights per variant, for the manifest.
    """

    config: Config
    items: tuple[PlannedItem, ...]
    docs: Mapping[str, list[dict[str, Any]]]
    entries: Mapping[str, "Task"]
    encodings: Mapping[str, "ChatEncoding"]
    fingerprints: Mapping[str, str]


def make_plan(config: Config, *, limit: int | None = None) -> Plan:
    """Everything is checked here: names, options, data, needle spans, prompts that do not fit.

    limit: first N docs of every task (generated tasks: of the whole task, spread over its cells).
    Raises HarnessError, TaskError or ModelError, each with one line.
    """
    raise NotImplementedError


def record_of(item: PlannedItem, results: Sequence[Result], encoding: "ChatEncoding") -> Record:
    """The journal line of an item; `results` are in the order of `item.requests`.

    An error in any of the results makes the record an error without responses.
    """
    raise NotImplementedError

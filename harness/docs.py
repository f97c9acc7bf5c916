"""Samples of a task: what is asked, what is stored in the run folder, what a script would answer."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

EXCERPT = 1_500  # characters of head, needle neighbourhood and tail that the run folder keeps of a prompt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a sample. prefix: start of the answer. continuation: text to score; None generates.

    text: plain text without roles in place of messages. messages: empty asks for the continuation without any context.
    """

    messages: tuple[Mapping[str, Any], ...]
    prefix: str = ""
    tools: tuple[Mapping[str, Any], ...] | None = None
    continuation: str | None = None
    text: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Doc:
    """One sample. row: what scorers see, without the fields that are too large to store.

    asks: one for generation, one per choice for log-likelihoods. gold, wrong: what the scripted models answer.
    gold_ask, wrong_ask: of a log-likelihood task the ask that they hold for true, None where none is.
    needles: sentences that must be in the prompt.
    """

    id: str
    hash: str
    row: Mapping[str, Any]
    group: Mapping[str, Any]
    cluster: str
    asks: tuple[Ask, ...]
    gold: str
    wrong: str
    gold_ask: int | None = None
    wrong_ask: int | None = None
    needles: tuple[str, ...] = ()


def plain(value: Any) -> Any:
    """The value as JSON gives it back, so that a sample scores the same before and after it was stored."""
    return json.loads(json.dumps(value, default=str, ensure_ascii=False))


def hash_of(value: Any) -> str:
    """A short hash of anything that JSON can hold; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def excerpts(prompt: str, needles: Sequence[str]) -> dict[str, str | None]:
    """Head, neighbourhood of the first needle and tail of a prompt, each at most EXCERPT characters.

    A short prompt is whole in the head, a middling one in head and tail. needle: None without needles.
    """
    head, tail = prompt[:EXCERPT], prompt[max(EXCERPT, len(prompt) - EXCERPT) :]
    around = None
    if needles:
        start = prompt.find(needles[0])
        margin = max(0, EXCERPT - len(needles[0])) // 2
        around = prompt[max(0, start - margin) :][:EXCERPT]
    return {"head": head, "needle": around, "tail": tail}

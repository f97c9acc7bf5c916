"""What a training sample is before it has tokens: user texts, thoughts, answers and calls, each part with its role."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tasks.words import Vocabulary

# phrase: fixed words of an answer; value: what had to be found or computed; letter: a choice between few tokens
Role = Literal["phrase", "value", "letter"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One tool call; arguments are JSON values by name."""

    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question and its answer. The user's text is the join of its segments, which may be long and repeated.

    thought: None answers without one. calls: native tool calls behind the answer's text.
    """

    user: tuple[str, ...]
    answer: tuple[tuple[str, Role], ...]
    thought: tuple[tuple[str, Role], ...] | None = None
    calls: tuple[Call, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """`kind` names the generator. tools: OpenAI tools of the whole dialogue. text: plain text instead of turns."""

    kind: str
    turns: tuple[Turn, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What generators draw from.

    books: sentences of each book, in order. made_up: sentences of a small vocabulary, in no order.
    count: tokens of a text.
    """

    vocabulary: Vocabulary
    books: Sequence[Sequence[str]]
    made_up: Sequence[str]
    count: Callable[[str], int]


MARKUP_TOKENS = 6  # of a turn: user, assistant, the markers of a thought and the end; the first turn's start too

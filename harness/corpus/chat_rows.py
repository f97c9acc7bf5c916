"""Dialogues as token rows of any model: in its own tokens and chat format (`model.chat.encoding.ChatEncoding`)."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from harness.corpus.rows import Part, Row, row_of
from model.chat.encoding import ChatEncoding
from tasks.dialogues.dialogue import MARKUP_TOKENS, Dialogue, Turn

_MAX_TURNS = 12  # of a dialogue, see tasks/dialogues/mixture.py
_CHUNK = 4096  # sentences counted at a time


class ChatRows:
    """Encodes dialogues as one text, so that ids are the tokenizer's own; roles are found again by offsets.

    A thought is the beginning of the answer: many models have no marker for it. Dialogues with tools are not written.
    A chat format that rewrites earlier turns (some drop their thoughts) ends a dialogue before the turn that would.
    """

    kinds_left_out: tuple[str, ...] = ("tools",)

    def __init__(self, encoding: ChatEncoding) -> None:
        self._encoding = encoding
        self._counts: dict[str, int] = {}
        self.pad_id = encoding.eos_ids[0]  # never predicted, so any id would do
        one, three = (self._encoding.render(messages) for messages in (_told("a"), _told("a", "b", "c")))
        behind = three.removeprefix(one + "b")
        ends = [encoding.decode([token]) for token in encoding.eos_ids]
        self._end = next((end for end in ends if behind.startswith(end)), ends[0])
        first, later = (len(encoding.encode(text)) for text in (one, three))
        self.markup = first + (_MAX_TURNS - 1) * max(0, later - first - MARKUP_TOKENS)

    def count(self, text: str) -> int:
        """Tokens of a text alone; of texts that are joined at blanks or line breaks the sum is all but exact."""
        known = self._counts.get(text)
        return len(self._encoding.encode(text)) if known is None else known

    def remember(self, texts: Iterable[str]) -> None:
        """Keep the counts of texts that come often, such as sentences of books."""
        for text in texts:
            if text not in self._counts:
                self._counts[text] = len(self._encoding.encode(text))

    def row(self, dialogue: Dialogue) -> Row:
        """Ids, weights and masks of one dialogue; a token belongs to the part that its first character is in."""
        parts = list(self.parts(dialogue))
        ids, spans = self._encoding.encode_with_offsets("".join(text for text, _ in parts))
        ends = np.cumsum([len(text) for text, _ in parts])
        places = np.searchsorted(ends, [start for start, _ in spans], side="right")
        return row_of(np.array(ids, np.int32), [parts[min(place, len(parts) - 1)][1] for place in places])

    def parts(self, dialogue: Dialogue) -> Iterator[Part]:
        """Texts with roles; joined they are what the chat format renders, with the answers and the end behind them."""
        if dialogue.text:
            yield self._encoding.plain(""), "prompt"
            yield from ((text, "prompt") for text in dialogue.text)
            return
        messages: list[dict[str, Any]] = []
        written = ""
        for turn in dialogue.turns:
            messages.append({"role": "user", "content": "".join(turn.user)})
            prompt = self._encoding.render(messages)
            if not prompt.startswith(written):
                break
            between = prompt[len(written) :]
            if written and between.startswith(self._end):
                yield self._end, "phrase"
                between = between.removeprefix(self._end)
            yield between, "prompt"
            answer = list(_answer(turn))
            yield from answer
            content = "".join(text for text, _ in answer)
            messages.append({"role": "assistant", "content": content})
            written = prompt + content
        yield self._end, "phrase"


def _told(*contents: str) -> list[dict[str, str]]:
    """User and assistant by turns."""
    return [
        {"role": "assistant" if place % 2 else "user", "content": content} for place, content in enumerate(contents)
    ]


def _answer(turn: Turn) -> Iterator[Part]:
    if turn.thought:
        yield from turn.thought
        yield "\n", "phrase"
    yield from turn.answer

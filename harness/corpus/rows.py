"""From a dialogue to token ids, and from dialogues to a row of exactly one length."""

import dataclasses
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from model.chat.dsv32 import render_messages
from model.chat.dsv32_parse import ASSISTANT, BOS, EOS, THINK, THINK_END, USER
from model.training.pieces import PieceEncoder, splits_between
from model.training.tokenizer import PAD
from tasks.dialogues.dialogue import Call, Dialogue, Role, Sources, Turn
from tasks.dialogues.drills import text_dialogue
from tasks.dialogues.mixture import LONG_SHARE, MIN_SHORT, Kinds, draw_long, draw_short

_ROLES = ("prompt", "phrase", "value", "letter")
_WEIGHTS = np.array([1.0, 0.5, 1.0, 4.0], np.float32)  # of the roles; the trainer averages prompt and answers apart
_MARKERS = frozenset((BOS, EOS, USER, ASSISTANT, THINK, THINK_END))
_CALL_VALUES = re.compile(r'((?<=name=")[^"]*(?=")|(?<=">)[^<\n]+(?=</))')
_TRIES = 3  # samples that do not fit before plain text fills a row


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """is_critical: answer tokens that had to be found or computed; they decide whether an evaluation row is right."""

    token_ids: NDArray[np.int32]  # [l]
    weights: NDArray[np.float32]  # [l]
    is_answer: NDArray[np.bool_]  # [l]
    is_critical: NDArray[np.bool_]  # [l]

    def __len__(self) -> int:
        return len(self.token_ids)


Part = tuple[str, Role | Literal["prompt"]]


def dialogue_parts(dialogue: Dialogue) -> Iterator[Part]:
    """Texts with roles in DeepSeek-V3.2's markup; joined they are its rendering, earlier turns' thoughts kept."""
    if dialogue.text:
        yield BOS, "prompt"
        yield from ((text, "prompt") for text in dialogue.text)
        return
    yield BOS, "prompt"
    if dialogue.tools:
        yield render_messages([], dialogue.tools).removeprefix(BOS), "prompt"
    for turn in dialogue.turns:
        yield from _turn_parts(turn)


def _turn_parts(turn: Turn) -> Iterator[Part]:
    yield USER, "prompt"
    yield from ((text, "prompt") for text in turn.user)
    yield ASSISTANT, "prompt"
    yield (THINK_END if turn.thought is None else THINK), "prompt"
    if turn.thought is not None:
        yield from turn.thought
        yield THINK_END, "value"
    yield from turn.answer
    if turn.calls:
        yield from _call_parts(turn.calls)
    yield EOS, "phrase"


def _call_parts(calls: tuple[Call, ...]) -> Iterator[Part]:
    """Names of functions and parameters, and values, are what had to be found; the rest is markup."""
    listed = [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in calls]
    text = render_messages([{"role": "assistant", "tool_calls": listed}]).removeprefix(BOS).removesuffix(EOS)
    for number, part in enumerate(_CALL_VALUES.split(text)):
        if part:
            yield part, "value" if number % 2 else "phrase"


class RowEncoder(Protocol):
    """What makes rows of one model's tokens. markup: tokens that a chat format adds to a dialogue beyond what its
    generator allows for. kinds_left_out: kinds of dialogues that cannot be written."""

    pad_id: int
    markup: int
    kinds_left_out: tuple[str, ...]

    def count(self, text: str) -> int: ...

    def remember(self, texts: Iterable[str]) -> None: ...

    def row(self, dialogue: Dialogue) -> Row: ...


class OwnRows:
    """Rows in DeepSeek-V3.2's markup; the tokenizer's split is local, so parts are encoded apart, most from a cache."""

    markup = 0
    kinds_left_out: tuple[str, ...] = ()

    def __init__(self, pieces: PieceEncoder) -> None:
        self.pieces = pieces
        self.pad_id = pieces.special(PAD)
        self.count = pieces.count
        self.remember = pieces.remember

    def row(self, dialogue: Dialogue) -> Row:
        """Ids, weights and masks of one dialogue."""
        parts = list(dialogue_parts(dialogue))
        before = ""
        for text, _ in parts:
            if text in _MARKERS:
                before = ""
            elif text:
                assert splits_between(before[-1:], text[0]), (
                    f"{dialogue.kind}: {before[-20:]!r} and {text[:20]!r} would merge"
                )
                before = text
        ids = [self.pieces.ids(text) for text, _ in parts]
        return row_of(np.concatenate(ids), [role for _, role in parts], [len(part) for part in ids])


def row_of(token_ids: NDArray[np.int32], roles: Sequence[str], lengths: Sequence[int] | int = 1) -> Row:
    """A row from the role of each part and the tokens of each part."""
    numbers = np.repeat([_ROLES.index(role) for role in roles], lengths)
    return Row(token_ids=token_ids, weights=_WEIGHTS[numbers], is_answer=numbers > 0, is_critical=numbers > 1)


def padded(row: Row, length: int, pad_id: int) -> Row:
    """The row cut or filled to `length`; padding is never predicted."""
    missing = max(0, length - len(row))
    return Row(
        token_ids=np.pad(row.token_ids[:length], (0, missing), constant_values=pad_id),
        weights=np.pad(row.weights[:length], (0, missing)),
        is_answer=np.pad(row.is_answer[:length], (0, missing)),
        is_critical=np.pad(row.is_critical[:length], (0, missing)),
    )


def draw_row(rng: random.Random, length: int, sources: Sources, encoder: RowEncoder, kinds: Kinds = None) -> Row:
    """One training row: often a long sample, then short ones, then plain text up to exactly `length` tokens."""
    rows = list(_samples(rng, length, sources, encoder, kinds))
    joined = Row(
        token_ids=np.concatenate([row.token_ids for row in rows]),
        weights=np.concatenate([row.weights for row in rows]),
        is_answer=np.concatenate([row.is_answer for row in rows]),
        is_critical=np.concatenate([row.is_critical for row in rows]),
    )
    return padded(joined, length, encoder.pad_id)


def _samples(rng: random.Random, length: int, sources: Sources, encoder: RowEncoder, kinds: Kinds) -> Iterator[Row]:
    room = length
    if rng.random() < LONG_SHARE:
        size = length if rng.random() < 0.6 else rng.randrange(length // 2, length)
        size -= encoder.markup
        for _ in range(_TRIES):
            drawn = draw_long(rng, size, sources, kinds)
            if drawn is None:
                break
            row = encoder.row(drawn)
            if len(row) <= room:
                room -= len(row)
                yield row
                break
            if encoder.markup:  # sums of parts are not quite exact there
                size -= len(row) - room
    failures = 0
    while failures < _TRIES and room >= MIN_SHORT:
        drawn = draw_short(rng, room, sources, kinds)
        if drawn is None:
            break
        row = encoder.row(drawn)
        if len(row) > room:
            failures += 1
            continue
        room -= len(row)
        yield row
    if room > 1:
        yield encoder.row(text_dialogue(rng, room + 200, sources))  # cut by the caller

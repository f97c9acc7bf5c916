"""Needles in a haystack with several questions, in the wording of tasks/niah."""

import dataclasses
import random
from collections.abc import Callable
from typing import Literal

from tasks.dialogues.dialogue import MARKUP_TOKENS, Dialogue, Sources, Turn
from tasks.dialogues.haystack import HaystackKind, fill, hide, separator_of
from tasks.niah.needles import GEN_PREFIX, HEAD, NEEDLE, TAIL, Kind, draw_number, draw_uuid, fill_template, listed

_SHARED_HALF = 0.2  # of the key lists: keys with one half in common are the hard ones


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NeedleShape:
    """keys: in the haystack. values: of each key. queries: keys of one question. turns: questions at most."""

    haystack: HaystackKind | Literal["lines"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    turns: int = 1


def needle_dialogue(shape: NeedleShape, rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """About `length` tokens; keys and turns are dropped as long as questions and needles alone would not fit."""
    while True:
        dialogue, room = _attempt(shape, rng, length, sources)
        if room >= 0 or (shape.keys == shape.queries and shape.turns == 1):
            return dialogue
        keys = max(shape.queries, shape.keys * 2 // 3)
        shape = dataclasses.replace(shape, keys=keys, turns=max(1, shape.turns - 1))


def _attempt(shape: NeedleShape, rng: random.Random, length: int, sources: Sources) -> tuple[Dialogue, int]:
    """The dialogue, and the tokens that were left for the haystack."""
    keys = _draw_keys(shape.key, shape.keys, rng, sources)
    values = _distinct_values(shape, rng, sources)
    by_key = {key: values[i * shape.values : (i + 1) * shape.values] for i, key in enumerate(keys)}
    needles = [(key, value) for key in keys for value in by_key[key]]
    rng.shuffle(needles)
    in_order = {key: [value for other, value in needles if other == key] for key in keys}  # of appearance
    asked = list(keys)
    rng.shuffle(asked)
    groups = [asked[i : i + shape.queries] for i in range(0, len(asked) - shape.queries + 1, shape.queries)]
    singular = shape.queries * shape.values == 1
    head = fill_template(HEAD, shape.value, "", singular)
    turns = [_turn(shape, group, in_order, singular) for group in groups[: shape.turns]]
    hidden = [NEEDLE.format(kind=shape.value, key=key, value=value) for key, value in needles]
    separator = separator_of(shape.haystack)
    count = sources.count
    spent = count(head) + sum(count(separator + text) for text in hidden)
    spent += sum(count(text) + MARKUP_TOKENS for turn in turns for text in (*turn.user, *(t for t, _ in turn.answer)))
    room = length - spent
    if shape.haystack == "lines":
        pieces = _lines(shape, rng, room, sources, {*keys, *values})
    else:
        pieces = fill(shape.haystack, rng, room, sources)
    first, *rest = turns
    first = dataclasses.replace(first, user=(head, *hide(pieces, hidden, rng, separator), "\n", *first.user))
    return Dialogue(kind="needles", turns=(first, *rest)), room


def _turn(shape: NeedleShape, group: list[str], in_order: dict[str, list[str]], singular: bool) -> Turn:
    query = listed(group)
    answer = listed([value for key in group for value in in_order[key]])
    return Turn(
        user=(fill_template(TAIL, shape.value, query, singular).removeprefix("\n"),),
        answer=(
            (fill_template(GEN_PREFIX, shape.value, query, singular), "phrase"),
            (f" {answer}", "value"),
            (".", "phrase"),
        ),
    )


def _draw(kind: Kind, rng: random.Random, sources: Sources) -> str:
    if kind == "words":
        return sources.vocabulary.pair(rng)
    return draw_number(rng) if kind == "numbers" else draw_uuid(rng)


def _draw_keys(kind: Kind, num: int, rng: random.Random, sources: Sources) -> list[str]:
    words = sources.vocabulary
    if kind != "words" or num == 1 or rng.random() >= _SHARED_HALF:
        return _distinct(num, lambda: _draw(kind, rng, sources))
    share = 2 + num // 4
    adjectives = [words.adjective(rng) for _ in range(share)]
    nouns = [words.noun(rng) for _ in range(share)]

    def half_shared() -> str:
        if rng.random() < 0.5:
            return f"{rng.choice(adjectives)}-{words.noun(rng)}"
        return f"{words.adjective(rng)}-{rng.choice(nouns)}"

    return _distinct(num, half_shared)


def _distinct_values(shape: NeedleShape, rng: random.Random, sources: Sources) -> list[str]:
    return _distinct(shape.keys * shape.values, lambda: _draw(shape.value, rng, sources))


def _distinct(num: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < num:
        found[draw()] = None
    return list(found)


def _lines(shape: NeedleShape, rng: random.Random, room: int, sources: Sources, taken: set[str]) -> list[str]:
    """Distractor needles, one a line, that repeat no key and no value."""
    lines: list[str] = []
    while True:
        key, value = _draw(shape.key, rng, sources), _draw(shape.value, rng, sources)
        if key in taken or value in taken:
            continue
        line = NEEDLE.format(kind=shape.value, key=key, value=value)
        room -= sources.count("\n" + line)
        if room < 0:
            return lines
        lines.append(line)

"""Haystacks of a given number of tokens, as segments that can be tokenised apart."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from tasks.dialogues.dialogue import Sources
from tasks.niah.needles import NOISE
from tasks.niah.puzzle import interleave

HaystackKind = Literal["noise", "books", "made_up"]


def separator_of(kind: HaystackKind | Literal["lines"]) -> str:
    return " " if kind in ("books", "made_up") else "\n"


def fill(kind: HaystackKind, rng: random.Random, room: int, sources: Sources) -> list[str]:
    """Pieces of haystack whose tokens, each with a separator before it, are at most `room`."""
    if kind == "noise":
        return [NOISE] * max(0, room // sources.count("\n" + NOISE))
    return take(_books(rng, sources) if kind == "books" and sources.books else _made_up(rng, sources), room, sources)


def take(pieces: Iterator[str], room: int, sources: Sources) -> list[str]:
    """Sentences from an endless source while they fit."""
    taken: list[str] = []
    for piece in pieces:
        room -= sources.count(" " + piece)
        if room < 0:
            return taken
        taken.append(piece)
    return taken


def hide(pieces: Sequence[str], hidden: Sequence[str], rng: random.Random, separator: str) -> tuple[str, ...]:
    """Segments with `hidden` at random boundaries, in the given order; each but the first starts with `separator`."""
    boundaries = sorted(rng.randrange(len(pieces) + 1) for _ in hidden)
    mixed = interleave(pieces, hidden, boundaries)
    return (mixed[0], *(separator + piece for piece in mixed[1:])) if mixed else ()


def _books(rng: random.Random, sources: Sources) -> Iterator[str]:
    book = sources.books[rng.choices(range(len(sources.books)), [len(book) for book in sources.books])[0]]
    start = rng.randrange(len(book))
    yield from (book[i % len(book)] for i in itertools.count(start))


def _made_up(rng: random.Random, sources: Sources) -> Iterator[str]:
    while True:
        yield rng.choice(sources.made_up)

"""RULER's needle tasks: one generator and a table of its arguments.

Source of wording, table and singular rule: NVIDIA/RULER, scripts/data/synthetic/{constants,niah}.py and
scripts/synthetic.yaml.
"""

import dataclasses
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from tasks.niah import sentences
from tasks.niah.puzzle import Haystack, Puzzle
from tasks.words import Split, word_list

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
HEAD = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
TAIL = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
GEN_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"

Kind = Literal["words", "numbers", "uuids"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NeedleTask:
    """Arguments of one task. `keys` include the queried ones; each key has `values` values, each its own needle."""

    haystack: Literal["noise", "texts", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask(haystack="noise"),
    "niah_single_2": NeedleTask(haystack="texts"),
    "niah_single_3": NeedleTask(haystack="texts", value="uuids"),
    "niah_multikey_1": NeedleTask(haystack="texts", keys=4),
    "niah_multikey_2": NeedleTask(haystack="needles"),
    "niah_multikey_3": NeedleTask(haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": NeedleTask(haystack="texts", values=4),
    "niah_multiquery": NeedleTask(haystack="texts", keys=4, queries=4),
}


class Words:
    """Adjective-noun pairs from wonderwords' lists, drawn with the caller's generator."""

    def __init__(self, split: Split = "all") -> None:
        self._adjectives = word_list("adjective", split)
        self._nouns = word_list("noun", split)

    def draw(self, rng: random.Random) -> str:
        return f"{rng.choice(self._adjectives)}-{rng.choice(self._nouns)}"


def draw_value(kind: Kind, rng: random.Random, words: Words) -> str:
    """A random word pair, 7-digit number or version 4 uuid."""
    match kind:
        case "words":
            return words.draw(rng)
        case "numbers":
            return draw_number(rng)
        case "uuids":
            return draw_uuid(rng)


def draw_number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def draw_uuid(rng: random.Random) -> str:
    """A version 4 uuid."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def fill_template(template: str, kind: Kind, query: str, singular: bool) -> str:
    """HEAD, TAIL or GEN_PREFIX with its blanks filled; `singular` where one value is asked."""
    if singular:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
    return template.format(kind=kind[:-1] if singular else kind, query=query)


def listed(items: Sequence[str]) -> str:
    """RULER's enumeration: a comma stands before the "and" of two items too."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def draw_needles(task: NeedleTask, rng: random.Random, words: Words, texts: Sequence[str] | None) -> Puzzle:
    """One sample of `task` without its length. `texts`: sentences of the user's haystack, None for made-up ones."""
    keys = _distinct(task.keys, lambda: draw_value(task.key, rng, words))
    values = _distinct(task.keys * task.values, lambda: draw_value(task.value, rng, words))
    hidden = tuple(
        NEEDLE.format(kind=task.value, key=keys[i // task.values], value=value) for i, value in enumerate(values)
    )
    queried = task.queries * task.values  # the first keys are the queried ones; all places are random
    query = listed(keys[: task.queries])
    places = tuple(rng.random() for _ in hidden[1:])

    if task.haystack == "noise":
        haystack = Haystack(_forever(NOISE), "\n")
    elif task.haystack == "needles":
        haystack = Haystack(_distractors(task, rng, words, {*keys, *values}), "\n")
    elif texts is None:
        haystack = Haystack(sentences.made_up(rng), " ")
    else:
        haystack = Haystack(_cycle(texts, rng.randrange(len(texts))), " ")

    return Puzzle(
        head=fill_template(HEAD, task.value, query, singular=queried == 1),
        tail=fill_template(TAIL, task.value, query, singular=queried == 1),
        gen_prefix=fill_template(GEN_PREFIX, task.value, query, singular=queried == 1),
        hidden=hidden,
        places=places,
        ordered=False,
        haystack=haystack,
        needles=hidden[:queried],
        answers=tuple(values[:queried]),
    )


def _distinct(num: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < num:
        found[draw()] = None
    return list(found)


def _forever(line: str) -> Iterator[str]:
    while True:
        yield line


def _cycle(texts: Sequence[str], start: int) -> Iterator[str]:
    while True:
        yield from texts[start:]
        start = 0


def _distractors(task: NeedleTask, rng: random.Random, words: Words, taken: set[str]) -> Iterator[str]:
    while True:
        key, value = draw_value(task.key, rng, words), draw_value(task.value, rng, words)
        if key not in taken and value not in taken:
            yield NEEDLE.format(kind=task.value, key=key, value=value)

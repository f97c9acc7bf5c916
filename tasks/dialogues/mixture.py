"""Which dialogues a training row holds, and how often: shares of long and short samples."""

import random
from collections.abc import Callable, Mapping

from tasks.dialogues.dialogue import Dialogue, Sources
from tasks.dialogues.drills import copy_dialogue, letter_dialogue, text_dialogue
from tasks.dialogues.haystack import HaystackKind
from tasks.dialogues.needles import NeedleShape, needle_dialogue
from tasks.dialogues.questions import ChoiceShape, choice_dialogue, sum_dialogue, tool_dialogue
from tasks.dialogues.tracking import ChainShape, chain_dialogue
from tasks.niah.needles import Kind
from tasks.synthetic.tools import MAX_FUNCTIONS

LONG_SHARE = 0.72  # of the rows hold one long sample
TOOLS_TEXT_TOKENS = 420  # of the chat encoding's fixed words about tools, roughly
FUNCTION_TOKENS = 75  # of one function's schema, roughly
MIN_SHORT = 100  # tokens; less room than this is filled with text

Draw = Callable[[random.Random, int, Sources], Dialogue]
Table = Mapping[Draw, tuple[str, float, int]]
Kinds = Mapping[str, float] | None  # factors of the shares by kind, absent ones are left out; None is all as they are


def draw_long(rng: random.Random, length: int, sources: Sources, kinds: Kinds = None) -> Dialogue | None:
    """One sample of about `length` tokens; None if no such sample is of `kinds`."""
    draw = _pick(rng, _LONG, length, kinds)
    return None if draw is None else draw(rng, length, sources)


def draw_short(rng: random.Random, length: int, sources: Sources, kinds: Kinds = None) -> Dialogue | None:
    """One sample of at most a few hundred tokens; `length` is what the row has left, at least MIN_SHORT."""
    draw = _pick(rng, _SHORT, length, kinds)
    return None if draw is None else draw(rng, length, sources)


def _pick(rng: random.Random, table: Table, length: int, kinds: Kinds) -> Draw | None:
    fitting = {
        draw: share * (1.0 if kinds is None else kinds.get(kind, 0.0))
        for draw, (kind, share, smallest) in table.items()
        if length >= smallest and (kinds is None or kinds.get(kind))
    }
    return rng.choices(list(fitting), list(fitting.values()))[0] if fitting else None


def _haystack(rng: random.Random, noise: float = 0.25) -> HaystackKind:
    """Book sentences twice as often as made-up ones."""
    return "noise" if rng.random() < noise else rng.choice(("books", "books", "made_up"))


def _value_kind(rng: random.Random) -> Kind:
    return rng.choices(("numbers", "words", "uuids"), (66, 28, 6))[0]


def _max_turns(length: int) -> int:
    return max(2, min(12, length // 200))


def _one_of_many(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """One to 48 keys in noise or sentences."""
    haystack = _haystack(rng)
    most = max(2, min(8 if haystack == "noise" else 48, length // 50))
    shape = NeedleShape(
        haystack=haystack, value=_value_kind(rng), keys=rng.randint(1, most), turns=_max_turns(length)
    )  # fmt: skip
    return needle_dialogue(shape, rng, length, sources)


def _all_lines(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """A haystack of needles only; sometimes keys and values are uuids."""
    turns = _max_turns(length)
    uuids = rng.random() < 0.06
    value: Kind = "uuids" if uuids else rng.choices(("numbers", "words"), (7, 3))[0]
    shape = NeedleShape(haystack="lines", key="uuids" if uuids else "words", value=value, keys=turns, turns=turns)
    return needle_dialogue(shape, rng, length, sources)


def _many_values(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """Keys with two to four values, to be given in order of appearance."""
    shape = NeedleShape(
        haystack=_haystack(rng), value=rng.choices(("numbers", "words"), (7, 3))[0],
        keys=rng.randint(1, 4), values=rng.choice((2, 3, 4, 4)), turns=rng.randint(1, 4),
    )  # fmt: skip
    return needle_dialogue(shape, rng, length, sources)


def _many_keys(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """Two to four keys in one question."""
    queries = rng.choice((2, 3, 4, 4))
    shape = NeedleShape(
        haystack=_haystack(rng), value=rng.choices(("numbers", "words"), (7, 3))[0],
        keys=rng.randint(queries, 9), queries=queries, turns=rng.randint(1, 3),
    )  # fmt: skip
    return needle_dialogue(shape, rng, length, sources)


def _tracking(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    shape = ChainShape(
        haystack=_haystack(rng, noise=0.7), chains=rng.choice((1, 1, 2, 3)), hops=rng.choice((1, 2, 3, 4, 4)),
        example=rng.random() < 0.6 and length >= 384,
    )  # fmt: skip
    return chain_dialogue(shape, rng, length, sources)


def _choice(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    questions = rng.randint(1, max(1, min(8, length // 120)))
    shape = ChoiceShape(
        haystack=rng.choice(("books", "books", "made_up")), facts=rng.randint(2, max(3, min(24, length // 60))),
        options=rng.choice((4, 4, 5, 8, 10)), questions=questions, thinking=rng.random() < 0.9,
    )  # fmt: skip
    return choice_dialogue(shape, rng, length, sources)


def _many_tools(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """As many functions as fit, some fewer, with several requests."""
    most = max(1, min(MAX_FUNCTIONS, (length - TOOLS_TEXT_TOKENS) // (FUNCTION_TOKENS + 20)))
    return tool_dialogue(rng.randint((most + 1) // 2, most), max(1, min(10, most // 3)), rng, sources)


def _sums(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    return sum_dialogue(rng.choice((2, 2, 3, 3, 4, 5)), rng, sources, thinking=rng.random() < 0.7)


def _few_tools(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    return tool_dialogue(rng.randint(1, 4), rng.randint(1, 3), rng, sources)


def _short_choice(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    shape = ChoiceShape(
        haystack=rng.choice(("books", "made_up")), facts=rng.randint(2, 8), options=rng.choice((2, 3, 4, 4, 5, 8, 10)),
        questions=rng.randint(1, 3), thinking=rng.random() < 0.9,
    )  # fmt: skip
    return choice_dialogue(shape, rng, rng.randrange(150, 400), sources)


def _copy(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    return copy_dialogue(rng.randrange(5, 40), rng, sources)


def _letters(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    return letter_dialogue(rng.choice((2, 3, 4, 4, 6, 8, 10)), rng.choice((4, 6, 8)), rng, sources)


def _short_needles(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    shape = NeedleShape(
        haystack=rng.choice(("books", "made_up", "noise", "lines")), value=rng.choice(("numbers", "words")),
        keys=rng.randint(1, 5), values=rng.choice((1, 1, 2, 3)), turns=2,
    )  # fmt: skip
    return needle_dialogue(shape, rng, rng.randrange(120, 300), sources)


def _short_tracking(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    shape = ChainShape(hops=rng.choice((1, 2, 3, 4)), example=False)
    return chain_dialogue(shape, rng, rng.randrange(150, 300), sources)


# kind, share, and the smallest room that it is tried in
_LONG: Table = {
    _one_of_many: ("needles", 0.17, 0),
    _all_lines: ("needles", 0.11, 0),
    _many_values: ("needles", 0.17, 0),
    _many_keys: ("needles", 0.07, 0),
    _tracking: ("tracking", 0.12, 0),
    _choice: ("choice", 0.14, 0),
    _many_tools: ("tools", 0.18, 800),
    text_dialogue: ("text", 0.04, 0),
}
_SHORT: Table = {
    _sums: ("sums", 0.30, 0),
    _few_tools: ("tools", 0.15, 600),
    _short_choice: ("choice", 0.22, 300),
    _letters: ("letters", 0.08, 160),
    _copy: ("copy", 0.08, 120),
    _short_needles: ("needles", 0.11, 240),
    _short_tracking: ("tracking", 0.06, 240),
}
KINDS = tuple(dict.fromkeys(kind for kind, _, _ in (*_LONG.values(), *_SHORT.values())))

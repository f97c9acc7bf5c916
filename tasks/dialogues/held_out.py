"""Small evaluation sets of the training tasks, drawn from words, books and seeds that no training row has."""

import random
from collections.abc import Callable

from tasks.dialogues.dialogue import Dialogue, Sources
from tasks.dialogues.mixture import FUNCTION_TOKENS, TOOLS_TEXT_TOKENS
from tasks.dialogues.needles import NeedleShape, needle_dialogue
from tasks.dialogues.questions import ChoiceShape, choice_dialogue, sum_dialogue, tool_dialogue
from tasks.dialogues.tracking import ChainShape, chain_dialogue
from tasks.synthetic.tools import MAX_FUNCTIONS

_NEEDLES = {
    "single_noise": NeedleShape(haystack="noise"),
    "single_book": NeedleShape(haystack="books"),
    "single_word": NeedleShape(haystack="books", value="words"),
    "multikey_4": NeedleShape(haystack="books", keys=4),
    "multikey_lines": NeedleShape(haystack="lines"),
    "multivalue_4": NeedleShape(haystack="books", values=4),
    "multiquery_4": NeedleShape(haystack="books", keys=4, queries=4),
}
_CHOICE = ChoiceShape(facts=8, options=10)


def held_out_tasks() -> tuple[str, ...]:
    return (*_NEEDLES, "tracking_4", "choice", "sums_5", "tools")


def draw_held_out(task: str, rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """One question of a task in about `length` tokens (sums are short whatever the length)."""
    if task in _NEEDLES:
        return needle_dialogue(_NEEDLES[task], rng, length, sources)
    others: dict[str, Callable[[], Dialogue]] = {
        "tracking_4": lambda: chain_dialogue(ChainShape(example=length >= 384), rng, length, sources),
        "choice": lambda: choice_dialogue(_CHOICE, rng, length, sources),
        "sums_5": lambda: sum_dialogue(5, rng, sources, thinking=True),
        "tools": lambda: tool_dialogue(_num_functions(length), 1, rng, sources),
    }
    return others[task]()


def _num_functions(length: int) -> int:
    return max(1, min(MAX_FUNCTIONS, (length - TOOLS_TEXT_TOKENS - 150) // (FUNCTION_TOKENS + 10)))

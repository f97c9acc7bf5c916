"""RULER's variable tracking: which variables hold a value, after four assignments from one to the next?

Source of wording and sizes: NVIDIA/RULER, scripts/data/synthetic/{constants,variable_tracking}.py.
"""

import itertools
import random
import string
from collections.abc import Callable

from tasks.niah.needles import NOISE
from tasks.niah.puzzle import Haystack, Puzzle, interleave

NUM_VARIABLES = 5  # one chain of four hops
EXAMPLE_TOKENS = 500  # size of the worked example, RULER's max_seq_length for it
HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
TAIL = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
# the blank at the end is RULER's; its worked example has two blanks there, so that names always follow a blank
GEN_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{num} variables are assigned the value {value}, they are: "
)


def draw_chain(rng: random.Random, length: int, count_tokens: Callable[[str, str], int]) -> Puzzle:
    """One sample without its length: a worked example with names of 3 letters, then the question with names of 5.

    Args:
        length: tokens asked for; the example takes at most 500, and at most a quarter of it (one noise line at least).
        count_tokens: tokens of the rendered prompt for (user text, start of the answer).
    """
    example_names, names = draw_names(rng, 3), draw_names(rng, NUM_VARIABLES)
    value, example_value = (str(number) for number in rng.sample(range(10_000, 99_999), 2))
    places = tuple(rng.random() for _ in names[1:])
    example_places = sorted(rng.random() for _ in names)

    def example(num_lines: int) -> str:
        boundaries = [int(place * num_lines) for place in example_places]
        lines = interleave([NOISE] * num_lines, assignments(example_names, example_value), boundaries)
        answer = " ".join(example_names)
        return f"{question(chr(10).join(lines), example_value)}{answer_prefix(example_value)} {answer}\n\n"

    tail = TAIL.format(value=value)
    none, one, two = (count_tokens(text + HEAD + tail, "") for text in ("", example(1), example(2)))
    # the lines are alike, so their tokens add up
    spare = min(EXAMPLE_TOKENS, length // 4) - (one - none)
    num_lines = 1 + max(0, spare // max(1, two - one))

    hidden = assignments(names, value)
    return Puzzle(
        head=example(num_lines) + HEAD,
        tail=tail,
        gen_prefix=answer_prefix(value),
        hidden=hidden,
        places=places,
        ordered=True,
        haystack=Haystack(iter(lambda: NOISE, None), "\n"),
        needles=tuple(line.strip() for line in hidden),
        answers=tuple(names),
    )


def draw_names(rng: random.Random, num_letters: int, num_names: int = NUM_VARIABLES) -> list[str]:
    """Different names of variables, in capital letters."""
    names: dict[str, None] = {}
    while len(names) < num_names:
        names["".join(rng.choices(string.ascii_uppercase, k=num_letters))] = None
        names.pop("VAR", None)
    return list(names)


def assignments(names: list[str], value: str) -> tuple[str, ...]:
    """The chain's lines: the value to the first name, then from each name to the next."""
    hops = (f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names))
    return (f"VAR {names[0]} = {value}", *hops)


def question(context: str, value: str) -> str:
    """A prompt whose lines are `context`."""
    return HEAD + context + TAIL.format(value=value)


def answer_prefix(value: str, num_names: int = NUM_VARIABLES) -> str:
    """The start of the answer."""
    return GEN_PREFIX.format(num=num_names, value=value)

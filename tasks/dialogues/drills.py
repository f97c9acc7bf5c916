"""Short drills that no task asks for: words repeated, the letter that stands before a word; and plain text."""

import random

from tasks.dialogues.dialogue import Dialogue, Sources, Turn
from tasks.dialogues.haystack import fill
from tasks.synthetic.choice import LETTERS


def copy_dialogue(num_words: int, rng: random.Random, sources: Sources) -> Dialogue:
    """Words in an order of chance, to be repeated."""
    draw = (sources.vocabulary.name, sources.vocabulary.adjective, sources.vocabulary.pair)
    words = " ".join(rng.choice(draw)(rng) for _ in range(num_words))
    return Dialogue(kind="copy", turns=(Turn(user=(f"Repeat these words: {words}",), answer=((words, "value"),)),))


def letter_dialogue(num_options: int, num_turns: int, rng: random.Random, sources: Sources) -> Dialogue:
    """Which letter stands before an option? Asked several times about one list."""
    words: dict[str, None] = {}
    while len(words) < num_options:
        words[sources.vocabulary.name(rng)] = None
    options = list(words)
    listed = "Options:\n" + "\n".join(f"{letter}. {word}" for letter, word in zip(LETTERS, options, strict=False))
    turns = []
    for number in range(num_turns):
        right = rng.randrange(num_options)
        question = f"Question: Which option is {options[right]}?"
        turns.append(
            Turn(
                user=(f"{listed}\n{question}" if number == 0 else question,),
                answer=(("The answer is (", "phrase"), (LETTERS[right], "letter"), (").", "phrase")),
            )
        )
    return Dialogue(kind="letters", turns=tuple(turns))


def text_dialogue(rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """Consecutive sentences of a book."""
    pieces = fill("books", rng, length - 2, sources)
    return Dialogue(kind="text", text=tuple(piece if i == 0 else " " + piece for i, piece in enumerate(pieces)))

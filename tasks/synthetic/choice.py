"""Questions on facts that are hidden in a passage, with up to ten options, and the walk down the options."""

import dataclasses
import random
from collections.abc import Sequence

from tasks.synthetic.sums import NAMES
from tasks.words import Vocabulary

LETTERS = "ABCDEFGHIJ"
ATTRIBUTES = (
    "favorite color", "home town", "pet", "job", "favorite food", "best friend", "lucky charm", "hobby", "vehicle",
    "favorite game", "instrument", "favorite tree", "birthday gift", "nickname", "garden plant", "secret word",
)  # fmt: skip
HEAD = "Read the passage and answer the question.\n\n"
INSTRUCTION = 'End with "The answer is (X)", where X is the letter of the right option.'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceQuestion:
    """A fact that is asked. `walk`: for each option up to the right one (line without its verdict, right or not)."""

    about: str  # "The pet of Anna is"
    value: str
    options: tuple[str, ...]
    question: str

    @property
    def letter(self) -> str:
        return LETTERS[self.options.index(self.value)]

    @property
    def text(self) -> str:
        """Question and options, as they stand behind the passage."""
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return f"Question: {self.question}\nOptions:\n{listed}\n{INSTRUCTION}"

    @property
    def walk(self) -> tuple[tuple[str, bool], ...]:
        right = self.options.index(self.value)
        lines = zip(LETTERS, self.options[: right + 1], strict=False)
        return tuple((f"\n{letter}. {option}", option == self.value) for letter, option in lines)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Sentences to hide, and questions about them in random order."""

    facts: tuple[str, ...]
    questions: tuple[ChoiceQuestion, ...]


def draw_passage(
    num_facts: int, num_options: int, num_questions: int, rng: random.Random, vocabulary: Vocabulary
) -> Passage:
    """Half of the wrong options are stated in the passage for other questions, as far as there are so many.

    num_facts: at most 60. num_options: 2 to 10.
    """
    people = rng.sample(NAMES, min(len(NAMES), max(3, num_facts)))
    subjects = [(name, attribute) for name in people for attribute in rng.sample(ATTRIBUTES, 2)]
    rng.shuffle(subjects)
    subjects = subjects[:num_facts]
    words: dict[str, None] = {}
    while len(words) < num_facts + num_options:
        words[vocabulary.name(rng)] = None
    values = list(words)[:num_facts]
    strangers = list(words)[num_facts:]
    abouts = [f"The {attribute} of {name} is" for name, attribute in subjects]
    questions = [
        ChoiceQuestion(
            about=abouts[i],
            value=values[i],
            options=_options(i, values, strangers, num_options, rng),
            question=f"What is the {subjects[i][1]} of {subjects[i][0]}?",
        )
        for i in range(min(num_questions, num_facts))
    ]
    facts = [f"{about} {value}." for about, value in zip(abouts, values, strict=True)]
    rng.shuffle(facts)
    return Passage(facts=tuple(facts), questions=tuple(questions))


def _options(
    right: int, values: Sequence[str], strangers: Sequence[str], num_options: int, rng: random.Random
) -> tuple[str, ...]:
    others = [value for i, value in enumerate(values) if i != right]
    stated = rng.sample(others, min(len(others), num_options // 2))
    options = [values[right], *stated, *rng.sample(list(strangers), num_options - 1 - len(stated))]
    rng.shuffle(options)
    return tuple(options)

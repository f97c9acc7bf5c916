"""Sums of two to five terms, as numbers or as a short story, with the chain of intermediate results."""

import dataclasses
import random

from tasks.words import Vocabulary

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo", "Maria",
    "Nora", "Oscar", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Xavier", "Yara", "Zoe",
    "Alan", "Bella", "Carl", "Dora",
)  # fmt: skip
INSTRUCTION = "Put the final answer in \\boxed{}."
_GAINS = ("buys", "finds", "gets")
_LOSSES = ("sells", "loses", "gives away")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """chain: one step for each term behind the first, e.g. "12 + 30 = 42."."""

    question: str
    chain: tuple[str, ...]
    value: int

    @property
    def prompt(self) -> str:
        return f"{self.question} {INSTRUCTION}"


def draw_sum(num_terms: int, rng: random.Random, vocabulary: Vocabulary) -> Sum:
    """Terms below 100 (the first below 500), plus or minus; no intermediate result is negative."""
    first = total = rng.randrange(1, 100) if rng.random() < 0.8 else rng.randrange(100, 500)
    steps: list[tuple[str, int]] = []
    chain = []
    for _ in range(num_terms - 1):
        term = rng.randrange(1, 100)
        sign = "+" if rng.random() < 0.65 or total < term else "-"
        result = total + term if sign == "+" else total - term
        chain.append(f"{total} {sign} {term} = {result}.")
        steps.append((sign, term))
        total = result
    written = str(first) + "".join(f" {sign} {term}" for sign, term in steps)
    form = rng.randrange(3)
    if form == 0:
        question = f"What is {written}?"
    elif form == 1:
        question = f"Compute {written}."
    else:
        name, thing = rng.choice(NAMES), vocabulary.name(rng)
        events = (f" Then {name} {rng.choice(_GAINS if sign == '+' else _LOSSES)} {term}." for sign, term in steps)
        question = f"{name} has {first} {thing}s.{''.join(events)} How many {thing}s does {name} have now?"
    return Sum(question=question, chain=tuple(chain), value=total)

"""Variable tracking in the wording of tasks/niah: one or more chains, every chain asked."""

import dataclasses
import random

from tasks.dialogues.dialogue import MARKUP_TOKENS, Dialogue, Sources, Turn
from tasks.dialogues.haystack import HaystackKind, fill, hide, separator_of
from tasks.niah.chains import EXAMPLE_TOKENS, HEAD, TAIL, answer_prefix, assignments, draw_names, question
from tasks.niah.needles import NOISE
from tasks.niah.puzzle import interleave


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChainShape:
    """hops: assignments behind the first one. example: RULER's worked example stands in front."""

    haystack: HaystackKind = "noise"
    chains: int = 1
    hops: int = 4
    example: bool = True


def chain_dialogue(shape: ChainShape, rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """About `length` tokens."""
    size = shape.hops + 1
    names = draw_names(rng, 5, shape.chains * size)
    chains = [names[i : i + size] for i in range(0, len(names), size)]
    values = [str(value) for value in rng.sample(range(10_000, 99_999), shape.chains)]
    lines = [list(assignments(chain, value)) for chain, value in zip(chains, values, strict=True)]
    order = [i for i in range(shape.chains) for _ in range(size)]
    rng.shuffle(order)
    hidden = [lines[i].pop(0) for i in order]
    if shape.haystack != "noise":
        hidden = [line.strip() + "." for line in hidden]
    asked = list(range(shape.chains))
    rng.shuffle(asked)
    turns = [
        Turn(
            user=(TAIL.format(value=values[i]).removeprefix("\n"),),
            answer=((answer_prefix(values[i], size), "phrase"), (" " + " ".join(chains[i]), "value")),
        )
        for i in asked
    ]
    count, separator = sources.count, separator_of(shape.haystack)
    head = (_example(rng, length, shape.hops, sources) if shape.example else "") + HEAD
    spent = count(head) + sum(count(separator + line) for line in hidden)
    spent += sum(count(text) + MARKUP_TOKENS for turn in turns for text in (*turn.user, *(t for t, _ in turn.answer)))
    pieces = fill(shape.haystack, rng, length - spent, sources)
    first, *rest = turns
    first = dataclasses.replace(first, user=(head, *hide(pieces, hidden, rng, separator), "\n", *first.user))
    return Dialogue(kind="tracking", turns=(first, *rest))


def _example(rng: random.Random, length: int, hops: int, sources: Sources) -> str:
    """The worked example with names of three letters, as long as the task's own."""
    names, value = draw_names(rng, 3, hops + 1), str(rng.randrange(10_000, 99_999))
    num_lines = max(1, min(EXAMPLE_TOKENS, length // 4) // sources.count("\n" + NOISE) - 4)
    boundaries = [int(place * num_lines) for place in sorted(rng.random() for _ in names)]
    lines = interleave([NOISE] * num_lines, assignments(names, value), boundaries)
    return f"{question(chr(10).join(lines), value)}{answer_prefix(value, hops + 1)} {' '.join(names)}\n\n"

"""Dialogues of the tasks of tasks/synthetic: passage choice, sums and tool calls."""

import dataclasses
import random

from tasks.dialogues.dialogue import MARKUP_TOKENS, Call, Dialogue, Role, Sources, Turn
from tasks.dialogues.haystack import HaystackKind, fill, hide
from tasks.synthetic.choice import HEAD, ChoiceQuestion, draw_passage
from tasks.synthetic.sums import draw_sum
from tasks.synthetic.tools import as_tools, draw_functions, draw_request


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceShape:
    """thinking: walk down the options in the thought; else the letter comes at once."""

    haystack: HaystackKind = "books"
    facts: int = 6
    options: int = 4
    questions: int = 1
    thinking: bool = True


def choice_dialogue(shape: ChoiceShape, rng: random.Random, length: int, sources: Sources) -> Dialogue:
    """About `length` tokens; questions beyond the first are turns of their own."""
    passage = draw_passage(shape.facts, shape.options, shape.questions, rng, sources.vocabulary)
    turns = [_choice_turn(question, shape.thinking) for question in passage.questions]
    count = sources.count
    spent = count(HEAD) + sum(count(" " + fact) for fact in passage.facts)
    for turn in turns:
        parts = (*turn.user, *(text for text, _ in (*(turn.thought or ()), *turn.answer)))
        spent += MARKUP_TOKENS + sum(count(text) for text in parts)
    pieces = fill(shape.haystack, rng, length - spent, sources)
    first, *rest = turns
    first = dataclasses.replace(first, user=(HEAD, *hide(pieces, passage.facts, rng, " "), "\n\n", *first.user))
    return Dialogue(kind="choice", turns=(first, *rest))


def _choice_turn(question: ChoiceQuestion, thinking: bool) -> Turn:
    thought: list[tuple[str, Role]] = [(question.about, "phrase"), (f" {question.value}", "value"), (".", "phrase")]
    for line, right in question.walk:
        thought += [(line, "value"), (" yes" if right else " no", "letter")]
    return Turn(
        user=(question.text,),
        thought=tuple(thought) if thinking else None,
        answer=(("The answer is (", "phrase"), (question.letter, "letter"), (").", "phrase")),
    )


def sum_dialogue(num_terms: int, rng: random.Random, sources: Sources, thinking: bool) -> Dialogue:
    """The chain stands in the thought, or in front of the answer where there is none."""
    drawn = draw_sum(num_terms, rng, sources.vocabulary)
    chain: tuple[tuple[str, Role], ...] = ((" ".join(drawn.chain), "value"),)
    end: tuple[tuple[str, Role], ...] = (
        ("The answer is \\boxed{", "phrase"),
        (str(drawn.value), "value"),
        ("}.", "phrase"),
    )
    if thinking:
        return Dialogue(kind="sums", turns=(Turn(user=(drawn.prompt,), thought=chain, answer=end),))
    return Dialogue(kind="sums", turns=(Turn(user=(drawn.prompt,), answer=(*chain, ("\n", "phrase"), *end)),))


def tool_dialogue(num_functions: int, num_turns: int, rng: random.Random, sources: Sources) -> Dialogue:
    """Each turn asks for one call of another function."""
    functions = draw_functions(num_functions, rng, sources.vocabulary)
    turns = []
    for function in rng.sample(functions, min(num_turns, num_functions)):
        request = draw_request(function, rng, sources.vocabulary)
        turns.append(
            Turn(user=(request.text,), answer=(), calls=(Call(name=request.name, arguments=request.arguments),))
        )
    return Dialogue(kind="tools", tools=tuple(as_tools(functions)), turns=tuple(turns))

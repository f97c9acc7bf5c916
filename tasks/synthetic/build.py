"""What the YAML files call: documents of the three tasks, prompts, targets and wrong answers."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets

from tasks.errors import TaskError
from tasks.niah import sentences
from tasks.niah.build import CountTokens, plain_counter
from tasks.niah.fitting import largest_fit
from tasks.niah.options import read_lengths, read_samples
from tasks.niah.puzzle import Haystack, Puzzle
from tasks.niah.texts import read_sentences
from tasks.synthetic import choice
from tasks.synthetic.sums import draw_sum
from tasks.synthetic.tools import MAX_FUNCTIONS, as_tools, draw_functions, draw_request
from tasks.threads import make_all
from tasks.tool_use.prompt import prompt_messages
from tasks.words import Vocabulary

DEFAULT_SAMPLES = 20
_CATEGORY = "multiple"  # BFCL's: one call of the right one of several functions

Doc = dict[str, Any]
Built = dict[str, datasets.Dataset]


def build_sums(*, seed: int = 0, samples: int | None = None, terms: Any = (2, 3, 4, 5), **_: Any) -> Built:
    """`samples` sums for each number of terms, on held-out words. Raises TaskError for options that cannot be used."""
    task = "synthetic_sums"
    counts = _counts(task, "terms", terms, 2, 5)

    def make(num_terms: int, index: int) -> Doc:
        rng = random.Random(f"{seed}/{task}/{num_terms}/{index}")
        drawn = draw_sum(num_terms, rng, Vocabulary("held_out"))
        return {"id": f"{num_terms}/{index}", "terms": num_terms, "prompt": drawn.prompt, "value": str(drawn.value)}

    return _documents(task, make, counts, samples)


def build_choice(
    *,
    seed: int = 0,
    data: str | None = None,
    samples: int | None = None,
    lengths: Any = (4096,),
    facts: int = 8,
    choices: int = 10,
    count_tokens: CountTokens | None = None,
    tokenizer: str | None = None,
    max_tokens: int = 512,
    **_: Any,
) -> Built:
    """`samples` questions for each length, on held-out words.

    Args:
        data: a .txt file or a folder of them for the passage; None makes sentences up.
        lengths: tokens of rendered prompt plus answer budget, a list.
        facts: hidden in the passage, one of them asked. choices: options of the question.
        count_tokens: tokens of the whole rendered prompt for (user text, start of the answer).
        tokenizer: a tokenizer.json that counts plain text where there is no `count_tokens`.
        max_tokens: answer budget.

    Raises TaskError for options or data that cannot be used.
    """
    task = "synthetic_choice"
    _counts(task, "facts", [facts], 1, 2 * len(choice.ATTRIBUTES))
    _counts(task, "choices", [choices], 2, len(choice.LETTERS))
    all_lengths = read_lengths(task, lengths)
    texts = None if data is None else read_sentences(data)
    count = count_tokens or plain_counter(task, tokenizer)

    def make(length: int, index: int) -> Doc:
        rng = random.Random(f"{seed}/{task}/{length}/{index}")
        passage = choice.draw_passage(facts, choices, 1, rng, Vocabulary("held_out"))
        (question,) = passage.questions
        asked = f"{question.about} {question.value}."
        others = [fact for fact in passage.facts if fact != asked]
        puzzle = Puzzle(
            head=choice.HEAD,
            tail=f"\n\n{question.text}",
            gen_prefix="",
            hidden=(asked, *others),
            places=tuple(rng.random() for _ in others),
            ordered=False,
            haystack=Haystack(_sentences(rng, texts), " "),
            needles=(asked,),
            answers=(question.letter,),
        )
        depth = 100 * rng.random()
        num_pieces = largest_fit(puzzle.haystack, lambda num: count(puzzle.prompt(num, depth), "") + max_tokens, length)
        if num_pieces is None:
            raise TaskError(
                f"{task}: lengths: {length} is too short for question, facts, one sentence and {max_tokens} answer "
                "tokens; ask for more"
            )
        return {
            "id": f"{length}/{index}",
            "length": length,
            "prompt": puzzle.prompt(num_pieces, depth),
            "needles": [asked],
            "options": list(question.options),
            "letter": question.letter,
        }

    return _documents(task, make, all_lengths, samples)


def build_tools(
    *, seed: int = 0, samples: int | None = None, functions: Any = (4, 16, 32), mode: str = "native", **_: Any
) -> Built:
    """`samples` requests for each number of offered functions, on held-out words.

    mode: "native" offers the functions as tools, "prompting" as text in BFCL's words.
    Raises TaskError for options that cannot be used.
    """
    task = "synthetic_tools"
    if mode not in ("native", "prompting"):
        raise TaskError(f"{task}: mode: expected native or prompting, got {mode!r}")
    counts = _counts(task, "functions", functions, 1, MAX_FUNCTIONS)

    def make(num_functions: int, index: int) -> Doc:
        rng = random.Random(f"{seed}/{task}/{num_functions}/{index}")
        vocabulary = Vocabulary("held_out")
        offered = draw_functions(num_functions, rng, vocabulary)
        request = draw_request(rng.choice(offered), rng, vocabulary)
        accepted = {request.name: {name: [value] for name, value in request.arguments.items()}}
        return {
            "id": f"{num_functions}/{index}",
            "num_functions": num_functions,
            "mode": mode,
            "category": _CATEGORY,
            "request": request.text,
            "functions": json.dumps(offered),
            "answers": json.dumps([accepted]),
        }

    return _documents(task, make, counts, samples)


def tool_messages(doc: Mapping[str, Any]) -> list[dict[str, str]]:
    """The request; in prompting mode behind BFCL's system message."""
    asked = [{"role": "user", "content": doc["request"]}]
    return asked if doc["mode"] == "native" else prompt_messages(asked, json.loads(doc["functions"]), doc["category"])


def offered_tools(doc: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """OpenAI tools in native mode, None in prompting mode."""
    return as_tools(json.loads(doc["functions"])) if doc["mode"] == "native" else None


def tool_text(doc: Mapping[str, Any]) -> str:
    """The messages as plain text, for models without a chat template."""
    return "\n\n".join(message["content"] for message in tool_messages(doc)) + "\n\n"


def _documents(task: str, make: Callable[[int, int], Doc], cells: list[int], samples: int | None) -> Built:
    num_samples = read_samples(task, DEFAULT_SAMPLES if samples is None else samples)
    docs = make_all(make, itertools.product(cells, range(num_samples)))
    return {"test": datasets.Dataset.from_list(docs)}


def _counts(task: str, option: str, values: Any, smallest: int, largest: int) -> list[int]:
    """A list of different numbers within a range."""
    usable = isinstance(values, list | tuple) and values and len(set(map(repr, values))) == len(values)
    if not usable or not all(type(value) is int and smallest <= value <= largest for value in values):
        raise TaskError(f"{task}: {option}: expected different numbers from {smallest} to {largest}, got {values!r}")
    return list(values)


def _sentences(rng: random.Random, texts: list[str] | None) -> Iterator[str]:
    if texts is None:
        return sentences.made_up(rng)
    start = rng.randrange(len(texts))
    return (texts[i % len(texts)] for i in itertools.count(start))

"""The documents of a needle task: every length, depth and index, each made from its own seed."""

import itertools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from tasks.errors import TaskError
from tasks.niah.chains import draw_chain
from tasks.niah.fitting import largest_fit
from tasks.niah.needles import NEEDLE_TASKS, Words, draw_needles
from tasks.niah.options import read_depths, read_lengths, read_samples, read_words
from tasks.niah.texts import read_sentences
from tasks.threads import make_all

CountTokens = Callable[[str, str], int]
DEFAULT_SAMPLES = 20


def build(
    *,
    task: str,
    options: Mapping[str, Any],
    seed: int = 0,
    data: str | None = None,
    samples: int | None = None,
    lengths: Any = None,
    depths: Any = None,
    words: Any = None,
    count_tokens: CountTokens | None = None,
    tokenizer: str | None = None,
    max_tokens: int | None = None,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """All samples of `task` as lm-eval's `custom_dataset`.

    Args:
        options: defaults of lengths and depths from the task's YAML.
        data: a .txt file or a folder of them for the haystack; None makes sentences up.
        samples: number for each (length, depth).
        lengths: tokens of rendered prompt plus answer budget, a list.
        depths: how many, spread evenly over 0..100, or a list of percentages.
        words: "all" word pairs, or those of "held_out" words, which no model of this project was trained on.
        count_tokens: tokens of the whole rendered prompt for (user text, start of the answer).
        tokenizer: a tokenizer.json that counts plain text where there is no `count_tokens`.
        max_tokens: answer budget; None takes RULER's.

    Raises TaskError for options or data that cannot be used.
    """
    all_lengths = read_lengths(task, options["lengths"] if lengths is None else lengths)
    all_depths = read_depths(task, options["depths"] if depths is None else depths)
    num_samples = read_samples(task, DEFAULT_SAMPLES if samples is None else samples)
    count = count_tokens or plain_counter(task, tokenizer)
    budget = (128 if task in NEEDLE_TASKS else 30) if max_tokens is None else max_tokens  # RULER's budgets
    texts = None
    if data is not None:
        if task not in NEEDLE_TASKS or NEEDLE_TASKS[task].haystack != "texts":
            raise TaskError(f"{task}: data: this task makes its own haystack and reads no texts; remove data")
        texts = read_sentences(data)
    vocabulary = Words(read_words(task, options.get("words", "all") if words is None else words))

    def make(length: int, depth: float, index: int) -> dict[str, Any]:
        rng = random.Random(f"{seed}/{task}/{length}/{depth:g}/{index}")
        if task in NEEDLE_TASKS:
            puzzle = draw_needles(NEEDLE_TASKS[task], rng, vocabulary, texts)
        else:
            puzzle = draw_chain(rng, length, count)

        def tokens(num_pieces: int) -> int:
            return count(puzzle.prompt(num_pieces, depth), puzzle.gen_prefix) + budget

        num_pieces = largest_fit(puzzle.haystack, tokens, length)
        if num_pieces is None:
            raise TaskError(
                f"{task}: lengths: {length} is too short: question, needles, one piece of haystack and {budget} answer "
                f"tokens take {tokens(1)}; ask for more"
            )
        prompt = puzzle.prompt(num_pieces, depth)
        for needle in puzzle.needles:
            assert prompt.count(needle) == 1, f"{task}: expected the needle once in the prompt: {needle}"
        name = f"{length}/{depth:g}/{index}"
        return {
            "id": name,
            "prompt": prompt,
            "gen_prefix": puzzle.gen_prefix,
            "needles": list(puzzle.needles),
            "answers": list(puzzle.answers),
            "target": ", ".join(puzzle.answers),
            "length": length,
            "depth": depth,
            "index": index,
            "cluster": name,
        }

    docs = make_all(make, itertools.product(all_lengths, all_depths, range(num_samples)))
    return {"test": datasets.Dataset.from_list(docs)}


def plain_counter(task: str, tokenizer: str | None) -> CountTokens:
    """Tokens of plain text, for a task that lm-eval runs without the harness."""
    if tokenizer is None:
        raise TaskError(
            f"{task}: lengths are counted in the model's tokens; "
            'pass --metadata \'{"tokenizer": "path/to/tokenizer.json"}\' or count_tokens'
        )
    path = Path(tokenizer).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise TaskError(f"{task}: tokenizer: {path} does not exist; expected a tokenizer.json file or its folder")

    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(path))
    return lambda text, prefix: len(encoder.encode(text + prefix).ids)

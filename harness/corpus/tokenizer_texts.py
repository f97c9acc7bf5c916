"""What the tokenizer of a small model learns from: training books, training words, the fixed words of prompts."""

import json
import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.corpus.config import CorpusConfig, book_files
from model.chat.dsv32 import TOOLS_TEXT
from model.chat.dsv32_parse import DSML
from model.training.tokenizer import train_tokenizer
from tasks.niah import chains, needles, sentences
from tasks.synthetic import choice, sums, tools
from tasks.words import Vocabulary, word_list

_WORD_REPEATS = 30  # so that words of the lists become few tokens
_FIXED_REPEATS = 600
_NUM_NAMES = 6_000


def write_tokenizer(config: CorpusConfig, folder: Path, vocab_size: int = 4096) -> None:
    """Train on the config's books (not the held-out ones) and write tokenizer.json and tokenizer_config.json."""
    books = [sentences.split(file.read_text(encoding="utf-8-sig")) for file in book_files(config)[0]]
    train_tokenizer(tokenizer_texts(books), folder, vocab_size)


def tokenizer_texts(books: Sequence[Sequence[str]]) -> Iterator[str]:
    """The same texts in the same order every time."""
    rng = random.Random("tokenizer")
    for book in books:
        yield from (" " + sentence for sentence in book)
    words = (*word_list("adjective", "training"), *word_list("noun", "training"))
    for _ in range(_WORD_REPEATS):
        for word in words:
            yield " " + word if rng.random() < 0.5 else word
    for _ in range(_NUM_NAMES):  # variables of chains: capital letters in any order
        yield " " + "".join(rng.choices(string.ascii_uppercase, k=5))
    yield from _fixed(rng)


def _fixed(rng: random.Random) -> Iterator[str]:
    vocabulary = Vocabulary("training")
    fixed = (
        needles.HEAD, needles.TAIL, needles.GEN_PREFIX, needles.NEEDLE, needles.NOISE,
        chains.HEAD, chains.TAIL, chains.GEN_PREFIX,
        sums.INSTRUCTION, choice.HEAD, choice.INSTRUCTION, *choice.ATTRIBUTES,
    )  # fmt: skip
    call = f'\n\n<{DSML}invoke name="">\n<{DSML}parameter name="" string="true"></{DSML}parameter>\n</{DSML}invoke>'
    for _ in range(_FIXED_REPEATS):
        for text in fixed:
            yield text.replace("{kind}", rng.choice(("words", "numbers", "word", "number"))).replace("{query}", "")
        yield TOOLS_TEXT
        yield json.dumps(tools.as_tools(tools.draw_functions(1, rng, vocabulary))[0]["function"])
        yield call
        first, second = chains.draw_names(rng, 5, 2)
        yield from chains.assignments([first, second], "12345")

"""Windows of a book: what stands before, and the last part whose probability is asked."""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from tasks.errors import TaskError
from tasks.niah.build import CountTokens, plain_counter
from tasks.niah.options import read_lengths, read_samples
from tasks.niah.texts import read_sentences

DEFAULT_SAMPLES = 20
TASK = "book_perplexity"


def build(
    *,
    data: str | None = None,
    samples: int | None = None,
    lengths: Any = (4096,),
    scored: Any = 512,
    count_tokens: CountTokens | None = None,
    tokenizer: str | None = None,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """`samples` windows for each length; the same index has the same scored part at every length.

    Args:
        data: a .txt file or a folder of them.
        lengths: tokens of a window at most, a list. scored: tokens at its end at least, up to the end of a sentence.
        count_tokens: tokens of plain text for (text, ""). tokenizer: a tokenizer.json that counts where there is none.

    Raises TaskError for options or data that cannot be used.
    """
    all_lengths = read_lengths(TASK, lengths)
    num_windows = read_samples(TASK, DEFAULT_SAMPLES if samples is None else samples)
    if type(scored) is not int or not 0 < scored < min(all_lengths):
        raise TaskError(f"{TASK}: scored: expected tokens below the shortest length {min(all_lengths)}, got {scored!r}")
    if data is None:
        raise TaskError(f"{TASK}: data: expected a .txt file or a folder of .txt files, got nothing")
    book = _Book(read_sentences(data), count_tokens or plain_counter(TASK, tokenizer))
    parts = _scored_parts(book, max(all_lengths), scored, num_windows)
    docs = [_document(book, part, length, index) for length in all_lengths for index, part in enumerate(parts)]
    return {"test": datasets.Dataset.from_list(docs)}


def score(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float | str]:
    """From the natural log-probability of the scored part; perplexity is exp(nats per token)."""
    nats = -results[0][0]
    each = nats / doc["num_tokens"]
    return {
        "token_probability": math.exp(-each),
        "nats_per_token": each,
        "bits_per_byte": nats / math.log(2) / doc["num_bytes"],
        "answer": f"perplexity {math.exp(each):.3f}" if each < 50 else f"{each:.1f} nats a token",
    }


class _Book:
    """Sentences with running token counts, which are exact for one sentence and nearly so for their sum."""

    def __init__(self, sentences: Sequence[str], count: CountTokens) -> None:
        self._sentences = sentences
        self._count = count
        start = count("", "")  # what the tokenizer puts before every text
        self.ends = [0, *itertools.accumulate(count(f" {sentence}", "") - start for sentence in sentences)]

    def text(self, first: int, last: int) -> str:
        return " ".join(self._sentences[first:last])

    def tokens(self, first: int, last: int) -> int:
        return self._count(self.text(first, last), "")


def _scored_parts(book: _Book, length: int, scored: int, num_windows: int) -> list[tuple[int, int]]:
    """Sentences [first, last) of each scored part: spread evenly, behind at least one longest window's context."""
    total = book.ends[-1]
    if total < length:
        raise TaskError(f"{TASK}: lengths: {length} is more than the {total} tokens of data; ask for less")
    parts: list[tuple[int, int]] = []
    for index in range(num_windows):
        place = length + (total - length) * (index / (num_windows - 1) if num_windows > 1 else 0.5)
        last = max(1, bisect.bisect_right(book.ends, place) - 1)
        first = max(0, bisect.bisect_right(book.ends, book.ends[last] - scored) - 1)
        if parts and first < parts[-1][1]:
            most = max(1, (total - length) // (scored + 100))
            raise TaskError(
                f"{TASK}: samples: {num_windows} scored parts of {scored} tokens would overlap in {total} tokens of "
                f"data; ask for {most} or fewer, or a lower `scored`"
            )
        parts.append((first, last))
    return parts


def _document(book: _Book, part: tuple[int, int], length: int, index: int) -> dict[str, Any]:
    """As many sentences before the scored part as fit `length`, counted as the whole text."""
    middle, last = part
    first = min(bisect.bisect_left(book.ends, book.ends[last] - length), middle - 1)
    while first >= 0 and first + 1 < middle and book.tokens(first, last) > length:
        first += 1
    while first > 0 and book.tokens(first - 1, last) <= length:
        first -= 1
    whole = book.tokens(max(first, 0), last)
    if first < 0 or whole > length:
        raise TaskError(f"{TASK}: lengths: {length} leaves no sentence before the scored part; ask for more")
    context, continuation = book.text(first, middle), " " + book.text(middle, last)
    return {
        "id": f"{length}/{index}",
        "cluster": str(index),
        "length": length,
        "context": context,
        "continuation": continuation,
        "num_tokens": whole - book.tokens(first, middle),
        "num_bytes": len(continuation.encode()),
    }

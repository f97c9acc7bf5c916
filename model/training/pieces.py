"""Text to token ids piece by piece: equal to the tokenizer's own ids, and many times faster with a cache of pieces.

The tokenizer's split is local (a word with the blank before it, one digit, one run of other characters, one white
space), so that pieces can be encoded apart, and whole sentences kept.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# spelled without classes such as \w, which regular expression engines fill differently
LETTERS = "A-Za-zÀ-ÖØ-öø-ɏ"
SPACES = r" \t\n\r"
PATTERN = rf" ?[{LETTERS}]+|[0-9]| ?[^{LETTERS}0-9{SPACES}]+|[{SPACES}]"

Ids = NDArray[np.int32]


class _Pieces(dict[str, list[int]]):
    """Ids of a piece, asked of the tokenizer once."""

    def __init__(self, tokenizer: object) -> None:
        super().__init__()
        self._encode = tokenizer.encode  # type: ignore[attr-defined]

    def __missing__(self, piece: str) -> list[int]:
        ids: list[int] = self._encode(piece, add_special_tokens=False).ids
        self[piece] = ids
        return ids


class PieceEncoder:
    """Encodes with a tokenizer.json whose split is `PATTERN`."""

    def __init__(self, tokenizer_json: Path) -> None:
        """Raises ValueError if the tokenizer splits text otherwise."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_json))
        if PATTERN not in _split_patterns(tokenizer.to_str()):
            raise ValueError(
                f"{tokenizer_json}: expected a tokenizer trained by this project: its text is not split by {PATTERN!r}"
            )
        self._special_ids = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._find = re.compile(PATTERN).findall
        self._pieces = _Pieces(tokenizer)
        self._whole: dict[str, Ids] = {}
        self.vocab_size = int(tokenizer.get_vocab_size())

    def special(self, text: str) -> int:
        return self._special_ids[text]

    def ids(self, text: str) -> Ids:
        """Token ids of a text, special tokens in it read as such."""
        known = self._whole.get(text)
        if known is not None:
            return known
        found: list[int] = []
        pieces = self._pieces
        if self._specials.search(text) is None:
            for piece in self._find(text):
                found += pieces[piece]
            return np.array(found, np.int32)
        for part in self._specials.split(text):
            if part in self._special_ids:
                found.append(self._special_ids[part])
            else:
                for piece in self._find(part):
                    found += pieces[piece]
        return np.array(found, np.int32)

    def count(self, text: str) -> int:
        return len(self.ids(text))

    def remember(self, texts: Iterable[str]) -> None:
        """Keep the ids of texts that come often as a whole, such as sentences of books."""
        for text in texts:
            if text not in self._whole:
                self._whole[text] = self.ids(text)


@functools.cache
def splits_between(last: str, first: str) -> bool:
    """Whether the tokenizer splits for sure between two characters, so that ids of texts before and after join."""
    return not last or len(re.findall(PATTERN, last + first)) == 2


def _split_patterns(serialised: str) -> list[str]:
    import json

    steps = json.loads(serialised).get("pre_tokenizer") or {}
    found = []
    for step in steps.get("pretokenizers", [steps]):
        pattern = step.get("pattern") or {}
        found += [text for text in pattern.values() if isinstance(text, str)]
    return found

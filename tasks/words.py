"""Words for keys, values and names: wonderwords' lists, a tenth of them never trained on, and made-up words."""

import functools
import random
import re
import zlib
from typing import Literal

Split = Literal["all", "training", "held_out"]

_PLAIN = re.compile(r"[a-z]{3,12}")
_ONSETS = (
    "b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "ch", "cl", "cr",
    "dr", "fl", "gr", "pl", "pr", "sh", "sk", "sl", "st", "str", "th", "tr",
)  # fmt: skip
_NUCLEI = (
    "a", "e", "i", "o", "u", "ai", "ea", "ee", "ou", "oo",
)  # fmt: skip
_CODAS = ("", "", "", "n", "r", "s", "t", "l", "m", "ck", "nd", "st", "sh", "rm")


def is_held_out(word: str) -> bool:
    """Whether a word belongs to the tenth that no training row has as a key, a value or a name."""
    return zlib.crc32(word.lower().encode()) % 10 == 0


@functools.cache
def word_list(category: Literal["adjective", "noun"], split: Split, plain: bool = False) -> tuple[str, ...]:
    """Sorted words of one category. `plain`: only lower-case words of 3 to 12 letters."""
    from wonderwords import RandomWord

    words = sorted(set(RandomWord(enhanced_prefixes=False).filter(include_categories=(category,))))
    if plain:
        words = [word for word in words if _PLAIN.fullmatch(word)]
    return tuple(word for word in words if split == "all" or is_held_out(word) == (split == "held_out"))


def made_up_word(rng: random.Random) -> str:
    """Syllables, or parts of two words, that no word list has on purpose: only copying helps.

    Halves of training words are what a tokenizer makes of words that it has never seen. A whole word with a number or
    with another's ending lets every word's own tokens be copied, also of those that are held out: the word itself
    never is.
    """
    kind = rng.random()
    if kind < 0.4:
        nouns = word_list("noun", "all", plain=True)
        ending = str(rng.randrange(100)) if kind < 0.2 else rng.choice(nouns)[-rng.randint(2, 4) :]
        return rng.choice(nouns) + ending
    if kind < 0.7:
        nouns = word_list("noun", "training", plain=True)
        first, second = rng.choice(nouns), rng.choice(nouns)
        return first[: rng.randint(2, 5)] + second[-rng.randint(2, 5) :]
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 3)))
    )


class Vocabulary:
    """Draws words of one split; a share of them is made up."""

    def __init__(self, split: Split, made_up: float = 0.0) -> None:
        """made_up: share of made-up words, 0..1."""
        self.made_up = made_up
        self._split = split
        self._adjectives = word_list("adjective", split)
        self._nouns = word_list("noun", split)
        self._plain_nouns = word_list("noun", split, plain=True)

    def name(self, rng: random.Random) -> str:
        """A plain lower-case noun, as in names of functions and options."""
        return self._made_up(rng) if rng.random() < self.made_up else rng.choice(self._plain_nouns)

    def adjective(self, rng: random.Random) -> str:
        return self._made_up(rng) if rng.random() < self.made_up else rng.choice(self._adjectives)

    def noun(self, rng: random.Random) -> str:
        return self._made_up(rng) if rng.random() < self.made_up else rng.choice(self._nouns)

    def pair(self, rng: random.Random) -> str:
        """An adjective and a noun, as the keys of needles are."""
        return f"{self.adjective(rng)}-{self.noun(rng)}"

    def _made_up(self, rng: random.Random) -> str:
        """A made-up word is never a held-out one by chance in training, nor a training one in evaluation."""
        while True:
            word = made_up_word(rng)
            if self._split == "all" or is_held_out(word) == (self._split == "held_out"):
                return word

"""A prompt before its length is known: fixed words, things to hide, and an endless haystack."""

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence


class Haystack:
    """Sentences or lines of an endless haystack, drawn in order: piece i never depends on how many are asked."""

    def __init__(self, pieces: Iterator[str], separator: str) -> None:
        self.separator = separator
        self._source = pieces
        self._pieces: list[str] = []
        self._ends: list[int] = []  # _ends[i]: characters of pieces 0..i, one separator after each

    def take(self, num_pieces: int) -> list[str]:
        """The first `num_pieces` pieces."""
        while len(self._pieces) < num_pieces:
            self._draw()
        return self._pieces[:num_pieces]

    def chars(self, num_pieces: int) -> int:
        """Characters of the first `num_pieces` pieces, separators included."""
        self.take(num_pieces)
        return self._ends[num_pieces - 1] if num_pieces else 0

    def within(self, num_chars: int) -> int:
        """The largest number of pieces that have at most `num_chars` characters."""
        while not self._ends or self._ends[-1] <= num_chars:
            self._draw()
        return bisect_right(self._ends, num_chars)

    def boundary(self, num_pieces: int, share: float) -> int:
        """Of the boundaries 0..num_pieces the one nearest to `share` (0..1) of the characters; ties go to the front."""
        target = share * self.chars(num_pieces)
        after = min(bisect_left(self._ends, target, hi=num_pieces) + 1, num_pieces)
        before = after - 1
        return before if target - self.chars(before) <= self.chars(after) - target else after

    def _draw(self) -> None:
        piece = next(self._source)
        self._pieces.append(piece)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(piece) + len(self.separator))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """All of a sample but the amount of haystack.

    `hidden[0]` goes to the asked depth, `hidden[i]` to a random place given by `places[i - 1]` (0..1). With
    `ordered` the later ones stay behind the first and in order, as the hops of a chain must.
    """

    head: str  # prompt text before the haystack
    tail: str  # prompt text behind it
    gen_prefix: str  # start of the answer, behind the assistant tag
    hidden: tuple[str, ...]
    places: tuple[float, ...]
    ordered: bool
    haystack: Haystack
    needles: tuple[str, ...]  # the sentences that hold the answer, as they stand in the prompt
    answers: tuple[str, ...]

    def prompt(self, num_pieces: int, depth: float) -> str:
        """The prompt with `num_pieces` of haystack; depth in percent of the haystack's characters."""
        first = self.haystack.boundary(num_pieces, depth / 100)
        if self.ordered:
            others = [first + int(place * (num_pieces - first + 1)) for place in sorted(self.places)]
        else:
            others = [int(place * (num_pieces + 1)) for place in self.places]
        pieces = interleave(self.haystack.take(num_pieces), self.hidden, [first, *others])
        return self.head + self.haystack.separator.join(pieces) + self.tail


def interleave(pieces: Sequence[str], hidden: Sequence[str], boundaries: Sequence[int]) -> list[str]:
    """`pieces` with `hidden[i]` before piece `boundaries[i]`; at one boundary the order of `hidden` is kept."""
    out: list[str] = []
    start = 0
    for boundary, text in sorted(zip(boundaries, hidden, strict=True), key=lambda pair: pair[0]):
        out += pieces[start:boundary]
        out.append(text)
        start = boundary
    return out + list(pieces[start:])

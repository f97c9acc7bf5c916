"""A cursor over Java or JavaScript source: the part of their grammars that the two call parsers share."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.tool_use.calls import MAX_CHARS, MAX_DEPTH, DecodeError

_SPACE = re.compile(r"(?:\s|//[^\n]*|/\*(?:[^*]|\*(?!/))*\*/)*")
_WORD = re.compile(r"(?:[^\W\d]|[$_])[\w$]*")
_NUMBER = re.compile(
    r"0[xX][\da-fA-F_]+[lLn]?|0[bB][01_]+[lLn]?|0[oO][0-7_]+n?|\d[\d_]*[lLn]|"
    r"(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d[\d_]*)?[fFdD]?"
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class Scanner:
    """Reads forward from `position`; every `take` skips blanks and comments first.

    Args:
        text: the source; longer than MAX_CHARS is refused.
        strings: pattern of the language's string and character literals.
    """

    def __init__(self, text: str, strings: re.Pattern[str]) -> None:
        if len(text) > MAX_CHARS:
            raise DecodeError(f"longer than {MAX_CHARS} characters")
        self.text = text
        self.position = 0
        self.end = 0  # behind the last token taken, before the blanks that follow it
        self._strings = strings
        self.depth = 0
        self._ends: dict[int, int] = {}  # position of an opening bracket -> behind its partner

    @contextmanager
    def nested(self) -> Iterator[None]:
        """One level deeper, up to MAX_DEPTH."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise DecodeError(f"nested more than {MAX_DEPTH} deep")
        yield
        self.depth -= 1

    def move(self, position: int) -> None:
        """A token ends at `position`; also used to go back to where one ended."""
        self.position = self.end = position

    def skip(self) -> int:
        """Move over blanks and comments; gives the position of the next token."""
        match = _SPACE.match(self.text, self.position)
        assert match is not None, "the pattern matches the empty string"
        self.position = match.end()
        return self.position

    def on_new_line(self) -> bool:
        """Whether a line break stands before the next token."""
        return "\n" in self.text[self.end : self.skip()]

    def at_end(self) -> bool:
        return self.skip() == len(self.text)

    def sees(self, *symbols: str) -> str | None:
        """The first of `symbols` that comes next, without moving."""
        start = self.skip()
        for symbol in symbols:
            if self.text.startswith(symbol, start):
                return symbol
        return None

    def take(self, *symbols: str) -> str | None:
        """Like `sees`, and moves behind it."""
        symbol = self.sees(*symbols)
        if symbol is not None:
            self.move(self.position + len(symbol))
        return symbol

    def expect(self, symbol: str) -> None:
        if self.take(symbol) is None:
            found = self.text[self.position : self.position + 12] or "the end"
            raise DecodeError(f"expected {symbol!r} at character {self.position}, got {found!r}")

    def sees_word(self) -> str | None:
        """The identifier or keyword that comes next, without moving."""
        match = _WORD.match(self.text, self.skip())
        return match.group() if match else None

    def take_word(self, *words: str) -> str | None:
        """The next identifier, any or one of `words`, and moves behind it."""
        word = self.sees_word()
        if word is None or (words and word not in words):
            return None
        self.move(self.position + len(word))
        return word

    def take_number(self) -> bool:
        return self.take_pattern(_NUMBER)

    def take_string(self) -> bool:
        return self.take_pattern(self._strings)

    def take_pattern(self, pattern: re.Pattern[str]) -> bool:
        match = pattern.match(self.text, self.skip())
        if match is None or match.end() == match.start():
            return False
        self.move(match.end())
        return True

    def fail(self, expected: str) -> DecodeError:
        found = self.text[self.position : self.position + 12] or "the end"
        return DecodeError(f"expected {expected} at character {self.position}, got {found!r}")

    def matching_end(self) -> int:
        """Behind the partner of the bracket that comes next, without moving; every bracket is looked for once."""
        start = self.skip()
        if start not in self._ends:
            for _ in self.balanced():
                pass
            self.move(start)
        return self._ends[start]

    def balanced(self) -> Iterator[str]:
        """Tokens of a bracketed block, brackets included; the cursor ends behind it."""
        closing: list[str] = []
        opened: list[int] = []
        while True:
            start = self.skip()
            if self.take_string() or self.take_word() or self.take_number():
                yield self.text[start : self.position]
                continue
            if start == len(self.text):
                raise self.fail("a closing bracket")
            symbol = self.text[start]
            self.move(start + 1)
            if symbol in _CLOSING:
                closing.append(_CLOSING[symbol])
                opened.append(start)
                if len(closing) > MAX_DEPTH:
                    raise DecodeError(f"nested more than {MAX_DEPTH} deep")
            elif symbol in ")]}":
                if not closing or closing.pop() != symbol:
                    raise DecodeError(f"bracket {symbol!r} at character {start} closes nothing")
                self._ends[opened.pop()] = self.end
            yield symbol
            if not closing:
                return

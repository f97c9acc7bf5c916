"""One JavaScript call such as `draw(x=5, style={dash: [1, 2]})` from an answer's text; every value stays source text.

Rules: BFCL (bfcl-eval 2026.3.23), `model_handler/parser/js_parser.py`, which walks a tree-sitter tree of the answer
without its outer brackets. This parser covers expression statements and variable declarations; what tree-sitter
repairs by guessing is refused here.
"""

import re
from dataclasses import dataclass

from tasks.tool_use.calls import Call, DecodeError, NoCallError
from tasks.tool_use.decode_python import bracketed
from tasks.tool_use.scanner import Scanner

_STRINGS = re.compile(r"'(?:\\.|[^\\'\n])*'|\"(?:\\.|[^\\\"\n])*\"", re.DOTALL)
_REGEX = re.compile(r"/(?![*/])(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\[\n])+/[a-z]*")
_TEMPLATE = re.compile(r"(?:\\.|\$(?!\{)|[^`\\$])*", re.DOTALL)
_PREFIX = ("++", "--", "+", "-", "!", "~")
_PREFIX_WORDS = ("typeof", "void", "delete", "await")
_BINARY = (
    *("===", "!==", "==", "!=", "&&", "||", "??", "**", "<<", ">>>", ">>", "<=", ">="),
    *("+", "-", "*", "/", "%", "&", "|", "^", "<", ">"),
)
_ASSIGN = (">>>=", "**=", "<<=", ">>=", "&&=", "||=", "??=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "=")
_DECLARATIONS = ("let", "const", "var")
_NEVER_OPERANDS = ("in", "instanceof", "return", "throw", "if", "for", "while", "do", "switch", "try", "else", "case")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expression:
    """Where an expression ends and, if it is a call or an assignment as a whole, its parts."""

    kind: str  # call, assignment, name, true, target (may be assigned to) or other
    start: int
    end: int
    callee_end: int = 0
    value_start: int = 0
    arguments: tuple["_Expression", ...] = ()


def decode_javascript(text: str) -> list[Call]:
    """The first statement of the text that is a call, with its named arguments as source text.

    Values in quotes lose them. Unnamed literals are dropped, an unnamed variable (or `true`) is kept under None.

    Raises:
        DecodeError: not JavaScript, no statement is a call, an argument named twice.
    """
    parser = _Parser(bracketed(text)[1:-1])
    call = parser.first_call()
    if call is None:
        raise NoCallError("no statement of the JavaScript source is a call")
    source = parser.text
    arguments: dict[str | None, str] = {}
    for part in call.arguments:
        if part.kind == "assignment":
            name: str | None = source[part.start : part.callee_end]
            value = _unquoted(source[part.value_start : part.end])
        elif part.kind in ("name", "true"):
            name, value = None, source[part.start : part.end]
        else:
            continue
        if name in arguments:
            raise DecodeError(f"argument {name} is given twice")
        arguments[name] = value
    return [{source[call.start : call.callee_end]: arguments}]


def _unquoted(value: str) -> str:
    return value[1:-1] if value[0] in "'\"" and value[0] == value[-1] else value


class _Parser(Scanner):
    def __init__(self, text: str) -> None:
        super().__init__(text, _STRINGS)

    def first_call(self) -> _Expression | None:
        """Read the whole program, so that a broken rest is noticed; give the first statement that is a call."""
        found: _Expression | None = None
        while not self.at_end():
            if self.take(";"):
                continue
            declares = self.take_word(*_DECLARATIONS, "return") is not None
            statement = self.expression()
            listed = False
            while self.take(","):
                self.expression()
                listed = True
            if found is None and statement.kind == "call" and not declares and not listed:
                found = statement
            if not self.at_end() and not self.on_new_line() and not self.take(";"):
                raise self.fail("';'")
        return found

    def expression(self) -> _Expression:
        with self.nested():
            start = self.skip()
            first = self._operand()
            if first.kind in ("name", "target") and (symbol := self._assignment()):
                value = self.skip()
                self.expression()
                kind = "assignment" if symbol == "=" else "other"
                return _Expression(kind=kind, start=start, end=self.end, callee_end=first.end, value_start=value)
            alone = True
            while self._binary():
                alone = False
                self._operand()
            if self.sees("?") and not self.sees("?."):
                self.expect("?")
                self.expression()
                self.expect(":")
                self.expression()
                alone = False
        return first if alone else _Expression(kind="other", start=start, end=self.end)

    def _assignment(self) -> str | None:
        if self.sees("==", "=>"):
            return None
        return self.take(*_ASSIGN)

    def _binary(self) -> bool:
        if self.take_word("in", "instanceof"):
            return True
        return not self.sees("=>", "++", "--") and self.take(*_BINARY) is not None

    def _operand(self) -> _Expression:
        with self.nested():
            start = self.skip()
            prefixed = False
            while self.take(*_PREFIX) or self.take_word(*_PREFIX_WORDS):
                prefixed = True
            expression = self._postfix(self._primary())
        return _Expression(kind="other", start=start, end=expression.end) if prefixed else expression

    def _primary(self) -> _Expression:
        start = self.skip()
        kind = "other"
        if self.sees("("):
            self._parenthesized()
        elif self.sees("["):
            self._list("[", "]")
        elif self.sees("{"):
            self._object()
            kind = "target" if self.sees("=") and not self.sees("==", "=>") else "other"
        elif self.sees("`"):
            self._template()
        elif self.sees("/"):
            if not self.take_pattern(_REGEX):
                raise self.fail("a value")
        elif self.take_string() or self.take_number():
            pass
        else:
            kind = self._word()
        return self._spans(kind, start)

    def _spans(self, kind: str, start: int) -> _Expression:
        return _Expression(kind=kind, start=start, end=self.end)

    def _word(self) -> str:
        word = self.sees_word()
        if word is None or word in _NEVER_OPERANDS:
            raise self.fail("a value")
        self.take_word()
        if word == "async" and (self.sees("(") or (self.sees_word() and self.sees_word() not in _NEVER_OPERANDS)):
            word = self.sees_word() or ""
            if word and self.take_word() and word != "function":
                self._arrow_body()
                return "other"
            if word != "function":
                self._parenthesized()
                return "other"
        if word == "function":
            self.take("*")
            self.take_word()
            self._skip_block("(")
            self._skip_block("{")
            return "other"
        if word == "class":
            while not self.sees("{"):
                if self.take_word() is None and self.take(".") is None:
                    raise self.fail("a class body")
            self._skip_block("{")
            return "other"
        if word == "new":
            if self.sees("("):
                self._parenthesized()
            else:
                self._word()
            while self.take("."):
                if self.take_word() is None:
                    raise self.fail("a name")
            if self.sees("("):
                self._list("(", ")")
            return "other"
        if self.sees("=>"):
            self._arrow_body()
            return "other"
        if word == "true":
            return "true"
        return "other" if word in ("false", "null", "this", "super") else "name"

    def _arrow_body(self) -> None:
        self.expect("=>")
        if self.sees("{"):
            self._skip_block("{")
        else:
            self.expression()

    def _skip_block(self, opening: str) -> None:
        if not self.sees(opening):
            raise self.fail(repr(opening))
        for _ in self.balanced():
            pass

    def _parenthesized(self) -> None:
        start, end = self.skip(), self.matching_end()
        self.move(end)
        if self.sees("=>"):
            self._arrow_body()
            return
        self.move(start)
        self.expect("(")
        self.expression()
        while self.take(","):
            self.expression()
        self.expect(")")

    def _list(self, opening: str, closing: str) -> tuple[_Expression, ...]:
        with self.nested():
            self.expect(opening)
            parts: list[_Expression] = []
            while not self.take(closing):
                if self.take(","):
                    continue
                spread = self.take("...")
                part = self.expression()
                parts.append(part if not spread else self._spans("other", part.start))
                if not self.sees(",", closing):
                    raise self.fail(repr(closing))
        return tuple(parts)

    def _object(self) -> None:
        with self.nested():
            self.expect("{")
            while not self.take("}"):
                if self.take("..."):
                    self.expression()
                else:
                    self._member()
                if not self.take(","):
                    self.expect("}")
                    return

    def _member(self) -> None:
        self.take("*")
        word = self.take_word()
        if word in ("get", "set", "async") and not self.sees(":", ",", "}", "("):
            word = self.take_word()
        if word is None:
            if self.sees("["):
                self._list("[", "]")
            elif not self.take_string() and not self.take_number():
                raise self.fail("a key")
        if self.sees("("):
            self._skip_block("(")
            self._skip_block("{")
        elif self.take(":"):
            self.expression()
        elif word is None:
            raise self.fail("':'")

    def _template(self) -> None:
        with self.nested():
            self.expect("`")
            while True:
                rest = _TEMPLATE.match(self.text, self.position)
                assert rest is not None, "the pattern matches the empty string"
                self.move(rest.end())
                if self.text.startswith("`", self.position):
                    self.move(self.position + 1)
                    return
                if not self.text.startswith("${", self.position):
                    raise self.fail("a closing backtick")
                self.move(self.position + 2)
                self.expression()
                self.expect("}")

    def _postfix(self, node: _Expression) -> _Expression:
        start, kind, callee_end, arguments = node.start, node.kind, 0, node.arguments
        while True:
            end = self.end
            if self.take("?.") or (self.sees(".") and not self.sees("...") and self.take(".")):
                if self.sees("("):
                    self._list("(", ")")
                    kind, callee_end, arguments = "call", end, ()
                    continue
                if self.sees("["):
                    continue
                self.take("#")
                if self.take_word() is None:
                    raise self.fail("a name")
                kind = "target"
            elif self.sees("["):
                self._list("[", "]")
                kind = "target"
            elif self.sees("("):
                arguments = self._list("(", ")")
                kind, callee_end = "call", end
            elif not self.on_new_line() and self.take("++", "--"):
                kind = "other"
            else:
                return _Expression(kind=kind, start=start, end=end, callee_end=callee_end, arguments=arguments)

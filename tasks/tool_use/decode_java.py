"""One Java call such as `Shape.draw(x=5, label="a")` from an answer's text; every value stays source text.

Rules: BFCL (bfcl-eval 2026.3.23), `model_handler/parser/java_parser.py`, which walks a tree-sitter tree of the answer
without its outer brackets. This parser covers statements made of expressions and plain declarations; what tree-sitter
repairs by guessing is refused here.
"""

import re
from dataclasses import dataclass, field

from tasks.tool_use.calls import Call, DecodeError, NoCallError
from tasks.tool_use.decode_python import bracketed
from tasks.tool_use.scanner import Scanner

_STRINGS = re.compile(r'"""(?:\\.|[^\\])*?"""|"(?:\\.|[^\\"])*"|' + r"'(?:\\.|[^\\'\n])+'", re.DOTALL)
_PRIMITIVES = ("byte", "short", "int", "long", "float", "double", "boolean", "char", "void")
_CAST = re.compile(rf"\(\s*+(?:({'|'.join(_PRIMITIVES)})\b)?[\w$.<>,?&\[\]\s]*\)")
_PREFIX = ("++", "--", "+", "-", "!", "~")
_BINARY = ("&&", "||", "==", "!=", "<=", "<<", "*", "/", "%", "&", "|", "^", "+", "-", "<")
_ASSIGN = (">>>=", "<<=", ">>=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "=")
_LITERALS = ("true", "false", "null", "this", "super")
_NEVER_OPERANDS = ("new", "instanceof", "return", "throw", "import", "package")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """A piece of the syntax tree: `kind` decides how its text is given back."""

    kind: str  # token, string, name (given back as written), access, array, object, assignment or other
    start: int
    end: int
    parts: tuple["_Node", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Invocation:
    start: int
    end: int
    name: str
    arguments: tuple[_Node, ...] = field(default=())


def decode_java(text: str) -> list[Call]:
    """The first call in the text, with its named arguments; none if the text is Java without a call.

    Strings and characters lose their quotes, `new` expressions and operators lose their blanks, class bodies are
    dropped, calls inside a value stay as written. Unnamed literals are dropped, an unnamed variable is kept under None.

    Raises:
        DecodeError: not Java, an argument named twice, an array without its elements.
    """
    parser = _Parser(bracketed(text)[1:-1])
    parser.statements()
    if not parser.invocations:
        raise NoCallError("no call in the Java source")
    first = min(parser.invocations, key=lambda call: (call.start, -call.end))
    arguments: dict[str | None, str] = {}
    for node in first.arguments:
        if node.kind == "assignment":
            name: str | None = parser.source(node.parts[0])
            value = parser.render(node.parts[2], nested=False)
        elif node.kind == "name" and not parser.source(node).endswith(")"):
            name, value = None, parser.source(node)
        else:
            continue
        if name in arguments:
            raise DecodeError(f"argument {name} is given twice")
        arguments[name] = value
    return [{first.name: arguments}]


class _Parser(Scanner):
    def __init__(self, text: str) -> None:
        super().__init__(text, _STRINGS)
        self.invocations: list[_Invocation] = []

    def source(self, node: _Node) -> str:
        return self.text[node.start : node.end]

    def render(self, node: _Node, nested: bool) -> str:
        """Text of a value; `nested` tells whether it is inside another one, where strings keep their quotes."""
        match node.kind:
            case "string":
                return self.source(node) if nested else self.source(node)[1:-1]
            case "token" | "name":
                return self.source(node)
            case "array":
                element, *values = node.parts
                if not values:
                    raise DecodeError("an array without its elements")
                return f"new {self.render(element, True)}[]{self.render(values[0], True)}"
            case "object":
                created, *arguments = node.parts
                return f"new {self.render(created, True)}({', '.join(self.render(part, True) for part in arguments)})"
        return "".join(self.render(part, True) for part in node.parts)

    def statements(self) -> None:
        while not self.at_end():
            if self.take(";"):
                continue
            self.take_word("return", "assert")
            self._declared_variable()
            self.expression()
            if not self.at_end():
                self.expect(";")

    def _declared_variable(self) -> None:
        start = self.position
        depth = self.depth
        try:
            self._type()
            if self.take_word() and self.sees("=") and not self.sees("=="):
                self.expect("=")
                return
        except DecodeError:
            self.depth = depth
        self.move(start)

    def expression(self) -> _Node:
        with self.nested():
            parts = [self._operand()]
            while True:
                if parts[-1].kind in ("name", "access") and len(parts) == 1 and (mark := self._assignment()):
                    parts += [mark, self.expression()]
                    return self._node("assignment", parts)
                if (mark := self._binary()) is None:
                    break
                parts.append(mark)
                if self.source(mark) == "?":
                    parts += [self.expression(), self._token(":")]
                parts.append(self._type() if self.source(mark) == "instanceof" else self._operand())
        return parts[0] if len(parts) == 1 else self._node("other", parts)

    def _assignment(self) -> _Node | None:
        if self.sees("=="):
            return None
        symbol = self.sees(*_ASSIGN)
        return self._token(symbol) if symbol else None

    def _binary(self) -> _Node | None:
        start = self.skip()
        if self.take_word("instanceof"):
            return _Node(kind="token", start=start, end=self.end)
        if self.sees("->", "++", "--"):
            return None
        if symbol := self.sees(">>>", ">>", ">=", ">", "?", *_BINARY):
            return self._token(symbol)
        return None

    def _operand(self) -> _Node:
        with self.nested():
            parts: list[_Node] = []
            while symbol := self.sees(*_PREFIX):
                parts.append(self._token(symbol))
            parts.append(self._postfix(self._primary()))
        return parts[0] if len(parts) == 1 else self._node("other", parts)

    def _primary(self) -> _Node:
        start = self.skip()
        if self.sees("("):
            return self._parenthesized()
        if self.take_string():
            return _Node(kind="string", start=start, end=self.end)
        if self.take_number():
            return _Node(kind="token", start=start, end=self.end)
        word = self.sees_word()
        if word == "new":
            return self._creation()
        if word in _PRIMITIVES:
            return self._class_literal(self._type())
        if word is None or word in _NEVER_OPERANDS:
            raise self.fail("a value")
        self.take_word()
        name = _Node(kind="token" if word in _LITERALS else "name", start=start, end=self.end)
        if self.sees("->"):
            return self._lambda(name)
        if self.sees("("):
            return self._invoke(start, "", word)
        return name

    def _class_literal(self, type_: _Node) -> _Node:
        if self.take("."):
            self.skip()
            if self.take_word("class"):
                return _Node(kind="name", start=type_.start, end=self.end)
        if self.sees("::"):
            return type_
        raise self.fail("'.class'")

    def _parenthesized(self) -> _Node:
        start, end = self.skip(), self.matching_end()
        self.move(end)
        is_lambda = self.sees("->")
        word = self.sees_word()
        type_ = _CAST.fullmatch(self.text, start, end)
        is_cast = type_ and (type_.group(1) or self.sees("(", '"', "'", "!", "~") or (word and word != "instanceof"))
        self.move(start)
        if is_lambda:
            return self._lambda(self._block())
        if is_cast:
            return self._node("other", [self._block(), self._operand()])
        return self._node("other", [self._token("("), self.expression(), self._token(")")])

    def _block(self) -> _Node:
        """A bracketed piece token by token."""
        tokens = [_Node(kind="token", start=self.end - len(token), end=self.end) for token in self.balanced()]
        return self._node("other", tokens)

    def _lambda(self, parameters: _Node) -> _Node:
        arrow = self._token("->")
        if not self.sees("{"):
            return self._node("other", [parameters, arrow, self.expression()])
        return self._node("other", [parameters, arrow, self._block()])

    def _creation(self) -> _Node:
        start = self.skip()
        self.take_word("new")
        created = self._type(dimensions=False)
        parts = [created]
        if self.sees("["):
            while self.take("["):
                if not self.take("]"):
                    self.expression()
                    self.expect("]")
            if self.sees("{"):
                parts.append(self._initializer())
            return _Node(kind="array", start=start, end=self.end, parts=tuple(parts))
        parts += self._arguments()
        if self.sees("{"):
            for _ in self.balanced():
                pass
        return _Node(kind="object", start=start, end=self.end, parts=tuple(parts))

    def _initializer(self) -> _Node:
        with self.nested():
            parts = [self._token("{")]
            while not self.sees("}"):
                parts.append(self._initializer() if self.sees("{") else self.expression())
                if not self.sees(","):
                    break
                parts.append(self._token(","))
            parts.append(self._token("}"))
        return self._node("other", parts)

    def _type(self, dimensions: bool = True) -> _Node:
        with self.nested():
            parts = [self._word()]
            while True:
                if self.sees("<"):
                    parts += self._type_arguments()
                elif self.sees(".") and not self.sees("..."):
                    mark = self.end
                    dot = self._token(".")
                    if self.sees_word() in (None, "class"):
                        self.move(mark)
                        break
                    parts += [dot, self._word()]
                elif dimensions and self.sees("["):
                    parts += [self._token("["), self._token("]")]
                else:
                    break
        return self._node("other", parts)

    def _type_arguments(self) -> list[_Node]:
        parts = [self._token("<")]
        while not self.sees(">"):
            if self.sees("?"):
                parts.append(self._token("?"))
                if self.sees_word() in ("extends", "super"):
                    parts += [self._word(), self._type()]
            else:
                parts.append(self._type())
            if not self.sees(","):
                break
            parts.append(self._token(","))
        return [*parts, self._token(">")]

    def _postfix(self, node: _Node) -> _Node:
        while True:
            if self.sees(".") and not self.sees("..."):
                mark, dot = self.end, self._token(".")
                generic = self.sees("<") is not None and bool(self._type_arguments())
                start = self.skip()
                word = self.take_word()
                if word is None or (generic and not self.sees("(")):
                    raise self.fail("a method name")
                if self.sees("("):
                    node = self._invoke(node.start, self.text[node.start : mark] + ".", word)
                elif word == "class":
                    node = _Node(kind="name", start=node.start, end=self.end)
                else:
                    node = self._node("access", [node, dot, _Node(kind="token", start=start, end=self.end)])
            elif self.sees("["):
                node = self._node("access", [node, self._token("["), self.expression(), self._token("]")])
            elif symbol := self.sees("++", "--"):
                node = self._node("other", [node, self._token(symbol)])
            elif self.sees("::"):
                node = self._node("other", [node, self._token("::"), self._word()])
            else:
                return node

    def _invoke(self, start: int, prefix: str, name: str) -> _Node:
        arguments = tuple(self._arguments())
        call = _Invocation(start=start, end=self.end, name=prefix + name, arguments=arguments)
        self.invocations.append(call)
        return _Node(kind="name", start=start, end=self.end)

    def _arguments(self) -> list[_Node]:
        with self.nested():
            self.expect("(")
            arguments: list[_Node] = []
            while not self.sees(")"):
                arguments.append(self.expression())
                if not self.take(","):
                    break
                if self.sees(")"):
                    raise self.fail("an argument")
            self.expect(")")
        return arguments

    def _word(self) -> _Node:
        start = self.skip()
        if self.take_word() is None:
            raise self.fail("a name")
        return _Node(kind="token", start=start, end=self.end)

    def _token(self, symbol: str) -> _Node:
        start = self.skip()
        self.expect(symbol)
        return _Node(kind="token", start=start, end=self.end)

    def _node(self, kind: str, parts: list[_Node]) -> _Node:
        return _Node(kind=kind, start=parts[0].start, end=parts[-1].end, parts=tuple(parts))

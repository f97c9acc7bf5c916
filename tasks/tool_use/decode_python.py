"""Python call lists such as `[f(a=1), g()]` from an answer's text: Python's grammar, nothing is evaluated.

Rules: BFCL (bfcl-eval 2026.3.23), `model_handler/utils.py`, `default_decode_ast_prompting` and `resolve_ast_call`.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

from tasks.tool_use.calls import MAX_CHARS, MAX_DEPTH, Call, DecodeError

_STRINGS_AND_BRACKETS = re.compile(
    r"'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|'(?:\\.|[^\\'\n])*'|\"(?:\\.|[^\\\"\n])*\"|[\[\](){}]",
    re.DOTALL,
)
_MAX_BITS = 4096  # arithmetic on literals stops here: 2 ** 10 ** 9 must not run
_MAX_ITEMS = 10_000

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}


def bracketed(text: str) -> str:
    """The answer as the official prompting decoder first sees it.

    Backticks, blanks and newlines are taken off both ends, then a missing `[` or `]` is put back. So a bare
    ``` fence is harmless, a ```python fence is not (its word stays and breaks the list), and an empty answer
    is the empty list.
    """
    text = text.strip("`\n ")
    if not text.startswith("["):
        text = "[" + text
    if not text.endswith("]"):
        text = text + "]"
    return text


def decode_python(text: str) -> list[Call]:
    """Calls of a Python call list, in order; positional arguments are dropped as the official decoder does.

    Raises:
        DecodeError: not a list of calls, an argument that is not a literal, too long or nested too deeply.
    """
    if len(text) > MAX_CHARS:
        raise DecodeError(f"longer than {MAX_CHARS} characters")
    source = bracketed(text).strip().strip("'")
    _check_depth(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in model text is no business of the user's
            body = ast.parse(source, mode="eval").body
        return _calls(body)
    except DecodeError:
        raise
    except SyntaxError as error:
        raise DecodeError(f"not a Python call list: {error.msg}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, MemoryError, RecursionError) as error:
        raise DecodeError(f"not a Python call list: {type(error).__name__}") from None


def _check_depth(source: str) -> None:
    depth = 0
    for match in _STRINGS_AND_BRACKETS.finditer(source):
        depth += {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}.get(match.group(), 0)
        if depth > MAX_DEPTH:
            raise DecodeError(f"brackets nested more than {MAX_DEPTH} deep")


def _calls(body: ast.expr) -> list[Call]:
    if isinstance(body, ast.Call):  # only a quoted answer can lose its list
        return [_call(body, 0)]
    if not isinstance(body, ast.List | ast.Tuple | ast.Set):
        raise DecodeError("not a list of calls")
    if not all(isinstance(element, ast.Call) for element in body.elts):
        raise DecodeError("the list holds something that is not a call")
    return [_call(element, 0) for element in body.elts if isinstance(element, ast.Call)]


def _call(node: ast.Call, depth: int) -> Call:
    parts: list[str] = []
    func: ast.expr = node.func
    while isinstance(func, ast.Attribute):
        parts.append(func.attr)
        func = func.value
    if isinstance(func, ast.Name):
        parts.append(func.id)
    return {".".join(reversed(parts)): {word.arg: _value(word.value, depth + 1) for word in node.keywords}}


def _value(node: ast.expr | None, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise DecodeError(f"values nested more than {MAX_DEPTH} deep")
    match node:
        case ast.Constant(value=value):
            return "..." if value is Ellipsis else value
        case ast.UnaryOp(operand=ast.Constant(value=value)):
            return -value  # type: ignore[operator]  # whatever the sign: the official decoder negates for +, ~ and not as well
        case ast.List(elts=elements):
            return [_value(element, depth + 1) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(element, depth + 1) for element in elements)
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {_value(key, depth + 1): _value(value, depth + 1) for key, value in pairs}
        case ast.BinOp():
            return _arithmetic(node, depth)
        case ast.Name(id=name):
            return name
        case ast.Call(keywords=[]):
            return ast.unparse(node)
        case ast.Call():
            return _call(node, depth)
        case ast.Subscript(value=value, slice=index):
            return f"{ast.unparse(value)}[{ast.unparse(index)}]"
    raise DecodeError(f"a value is no literal: {type(node).__name__}")


def _arithmetic(node: ast.expr, depth: int) -> Any:
    """Value of an expression of literals; the official decoder hands it to `eval`, names and calls included."""
    if depth > MAX_DEPTH:
        raise DecodeError(f"operators nested more than {MAX_DEPTH} deep")
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_arithmetic(operand, depth + 1))
        case ast.List(elts=elements):
            return [_arithmetic(element, depth + 1) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_arithmetic(element, depth + 1) for element in elements)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            first, second = _arithmetic(left, depth + 1), _arithmetic(right, depth + 1)
            _check_size(op, first, second)
            return _BINARY[type(op)](first, second)
    raise DecodeError("an expression with something that is no literal")


def _check_size(op: ast.operator, first: Any, second: Any) -> None:
    numbers = isinstance(first, int | float | complex) and isinstance(second, int | float | complex)
    bits = max((abs(x).bit_length() for x in (first, second) if isinstance(x, int)), default=0)
    if bits > _MAX_BITS:
        raise DecodeError("an expression with too large a number")
    if isinstance(op, ast.Pow | ast.LShift) and numbers and isinstance(second, int):
        growth = abs(second) * (abs(first).bit_length() if isinstance(op, ast.Pow) and isinstance(first, int) else 1)
        if isinstance(first, int) and growth > _MAX_BITS:
            raise DecodeError("an expression with too large a result")
    if isinstance(op, ast.Mult) and not numbers:
        items = [len(x) for x in (first, second) if isinstance(x, str | bytes | list | tuple)]
        times = [x for x in (first, second) if isinstance(x, int)]
        if items and times and items[0] * times[0] > _MAX_ITEMS:
            raise DecodeError("an expression with too long a result")
    if isinstance(op, ast.Mod) and isinstance(first, str | bytes):
        raise DecodeError("an expression with string formatting")  # "%99999999d" fills the memory

"""Whatever the text is, a decoder gives calls or a clean failure, and soon."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.tool_use.calls import MAX_CHARS, DecodeError, canonical
from tasks.tool_use.convert_java import convert_java
from tasks.tool_use.convert_javascript import convert_javascript
from tasks.tool_use.decode_java import decode_java
from tasks.tool_use.decode_javascript import decode_javascript
from tasks.tool_use.decode_python import decode_python
from tasks.tool_use.score import decode_native, score_answer

DECODERS = [decode_python, decode_java, decode_javascript, decode_native]
PIECES = st.sampled_from(
    [
        *(
            "[",
            "]",
            "(",
            ")",
            "{",
            "}",
            "<",
            ">",
            ",",
            ".",
            ":",
            ";",
            "=",
            "==",
            "->",
            "=>",
            "+",
            "-",
            "*",
            "**",
            "/",
            "!",
        ),
        *(
            "'",
            '"',
            "`",
            "${",
            "\\",
            "\n",
            " ",
            "//",
            "/*",
            "*/",
            "f",
            "x.y",
            "new ",
            "int",
            "ArrayList",
            "Arrays.asList(",
        ),
        *(
            "true",
            "None",
            "lambda ",
            "function",
            "async ",
            "class ",
            "return ",
            "1",
            "2.5f",
            "0x",
            "é",
            "\x00",
            "?",
            "...",
        ),
        *(
            "f(a=",
            "new int[]{",
            "{{ put(",
            "[[",
            "]]",
            "not ",
            "for x in y",
            "instanceof ",
            "::",
            '"name"',
            '"arguments"',
        ),
    ]
)
ANY_TEXT = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=60).map("".join))
JAVA_TYPES = ["integer", "long", "float", "double", "boolean", "char", "String", "any", "HashMap", "Set"]


@pytest.mark.parametrize("decode", DECODERS)
@given(text=ANY_TEXT)
@settings(max_examples=300, deadline=1000)
def test_any_text_gives_calls_or_a_decode_error(decode: Callable[[str], list[Any]], text: str) -> None:
    try:
        calls = decode(text)
    except DecodeError as error:
        assert str(error)
        return
    assert all(len(call) == 1 for call in calls)
    assert canonical(calls).startswith("[")


@given(text=ANY_TEXT, type_=st.sampled_from(JAVA_TYPES), element=st.sampled_from([None, *JAVA_TYPES]))
@settings(max_examples=300, deadline=1000)
def test_any_java_value_converts_to_its_type_or_stays_text(text: str, type_: str, element: str | None) -> None:
    kinds = {"integer": int, "long": int, "float": float, "double": float, "boolean": bool, "HashMap": dict}
    assert isinstance(convert_java(text, type_), (str, kinds.get(type_, str)))
    for collection in ("Array", "ArrayList"):
        assert isinstance(convert_java(text, collection, element), (str, list))


@given(text=ANY_TEXT, element=st.sampled_from([None, "String", "integer", "float", "Boolean", "dict", "array", "any"]))
@settings(max_examples=300, deadline=1000)
def test_any_javascript_value_converts_to_its_type_or_stays_text(text: str, element: str | None) -> None:
    kinds = {"integer": int, "float": float, "Bigint": int, "Boolean": bool, "dict": dict, "String": str, "any": str}
    for type_, kind in kinds.items():
        assert isinstance(convert_javascript(text, type_), (str, kind))
    assert isinstance(convert_javascript(text, "array", element), (str, list))


def _pathological(size: int) -> dict[str, str]:
    texts = {f"{piece!r} repeated": piece * (size // len(piece)) for piece in _REPEATED}
    texts |= {
        f"{opening!r} closed": f"[f(a={opening * (size // 3)}1{closing * (size // 3)})]" for opening, closing in _PAIRS
    }
    texts |= {f"[f(a= and {piece!r}": f"[f(a={piece * (size // len(piece))}" for piece in _REPEATED}
    return texts


_PAIRS = [("[", "]"), ("(", ")"), ("{", "}"), ("f(", ")"), ("f(a=", ")"), ("{1:", "}"), ("[[", "]]"), ("new F(", ")")]
_REPEATED = [
    *(
        "[",
        "(",
        "{",
        "]",
        "f(",
        "f(a=",
        "-",
        "not ",
        "~",
        "lambda:",
        "x.",
        "x[",
        "1+",
        "1**",
        "'",
        '"',
        '"""',
        "`",
        "${",
    ),
    *(
        "\\",
        "/*",
        "//",
        "\n",
        " ",
        "a=",
        "a,",
        "a if ",
        "x->",
        "(x)->",
        "new int[]{",
        "{{",
        "f<",
        "x?",
        "(int)",
        "::",
        "…",
    ),
    *(
        "[f(a=1),",
        "f(a=[],",
        "{'a':",
        "f'{",
        "await ",
        "x=>",
        "(a)=>",
        "async ",
        "function(){",
        "class ",
        "/x/",
        "0x1",
        "9",
    ),
]


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("size", [300, MAX_CHARS - 100])
def test_nothing_is_slow_or_too_deep(decode: Callable[[str], list[Any]], size: int) -> None:
    for name, text in _pathological(size).items():
        start = time.process_time()
        with contextlib.suppress(DecodeError):
            decode(text)
        assert time.process_time() - start < 2.0, name


@pytest.mark.parametrize("size", [300, 1_999, 100_000])
def test_no_conversion_is_slow(size: int) -> None:
    heads = [
        "",
        "[[",
        "[",
        "{a:",
        "new Array(",
        "new ArrayList<>(Arrays.asList(",
        "new ArrayList<>() {{",
        "new HashMap<",
    ]
    pieces = ["[],", "[", "],", " ", "},", "a:", ", ", 'put("', '",', ">", "add(", "new HashMap<>() {{", ">()", "new "]
    for head in heads:
        for piece in pieces:
            text = head + piece * ((size - len(head)) // len(piece))
            start = time.process_time()
            for type_ in ("Array", "ArrayList", "HashMap"):
                convert_java(text, type_)
            for type_ in ("array", "dict"):
                convert_javascript(text, type_)
            assert time.process_time() - start < 2.0, (head, piece)


@pytest.mark.parametrize("decode", DECODERS)
def test_too_long_an_answer_is_refused(decode: Callable[[str], list[Any]]) -> None:
    with pytest.raises(DecodeError, match=str(MAX_CHARS)):
        decode("[f(a='" + "x" * MAX_CHARS + "')]")


@pytest.mark.parametrize(
    "expression",
    [
        "2 ** 10 ** 9",
        "1 << 10 ** 9",
        "'x' * 10 ** 9",
        "[0] * 10 ** 9",
        "'%999999999d' % 1",
        "1 / 0",
        "9 ** 9 ** 9 ** 9",
    ],
)
def test_arithmetic_that_would_fill_the_memory_is_refused(expression: str) -> None:
    with pytest.raises(DecodeError):
        decode_python(f"[f(a={expression})]")


@pytest.mark.parametrize("value", ["0x" + "f" * 20_000, "9" * 4_000, "1e999", "-1e999", "1j"])
def test_huge_numbers_are_scored_without_an_error(value: str) -> None:
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "float"}}, "required": ["a"]}}
    score = score_answer(f"[f(a={value})]", [function], [{"f": {"a": [1.0]}}], "simple_python", "prompting")
    assert score.decoded and not score.right

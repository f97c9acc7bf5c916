# ruff: noqa: RUF001 (the markers are spelled with full-width bars)
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.chat.dsv32 import render_messages
from model.chat.dsv32_parse import parse_completion
from model.chat.encoding import Reply, ToolCall

EOS = "<｜end▁of▁sentence｜>"
OPEN, CLOSE = "\n\n<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"
NOW = '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + "".join(line + "\n" for line in parameters) + "</｜DSML｜invoke>\n"


def parameter(name: str, value: str, string: str = "false") -> str:
    return f'<｜DSML｜parameter name="{name}" string="{string}">{value}</｜DSML｜parameter>'


def answer(block: str) -> Reply:
    return parse_completion("Yes." + OPEN + block + CLOSE + EOS, thinking=False)


def test_arguments_keep_their_json_types():
    values = {"s": "7", "i": 7, "f": 0.5, "t": True, "n": None, "l": [1, "a"], "o": {"k": {}}}
    lines = [parameter("s", "7", "true")]
    lines += [parameter(key, json.dumps(value)) for key, value in values.items() if key != "s"]
    reply = answer(invoke("f", *lines))
    assert reply.malformed is None and reply.content == "Yes."
    assert reply.tool_calls == (ToolCall(name="f", arguments=values),)


def test_several_calls_and_calls_without_arguments():
    reply = answer(NOW + invoke("g") + invoke("h", parameter("x", "1")))
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("now", {}), ("g", {}), ("h", {"x": 1})]


def test_string_arguments_are_raw_text():
    value = ' "quoted"\n<b>&lt;</b> {"a": 1}\n'
    assert answer(invoke("f", parameter("x", value, "true"))).tool_calls[0].arguments == {"x": value}


@pytest.mark.parametrize(
    "block, reason",
    [
        (invoke("f", parameter("x", "{1}")), "argument 'x': expected JSON, got '{1}'"),
        (invoke("f", parameter("x", "NaN")), "argument 'x': expected JSON, got 'NaN'"),
        (invoke("f", parameter("x", "[" * 100_000)), "argument 'x': expected JSON"),
        (invoke("f", parameter("x", "9" * 5000)), "argument 'x': expected JSON"),
        (invoke("f", parameter("x", "")), "argument 'x': expected JSON, got ''"),
        (invoke("f", parameter("x", "1"), parameter("x", "2")), "argument 'x' twice"),
        (invoke("f", parameter("x", "1", "yes")), "behind parameter"),
        (invoke("f", parameter("x", "1") + " "), "expected a parameter or the end of the call"),
        ("x" + NOW, "expected a tool call or the end of the block"),
        (NOW + "\n", "expected a tool call or the end of the block"),
        (NOW.replace('name="now"', "now"), "behind invoke"),
        (NOW.replace("</｜DSML｜invoke>", ""), "</｜DSML｜invoke is missing"),
        (NOW + NOW + NOW + "<｜DSML｜invoke", "</｜DSML｜invoke is missing"),
    ],
)
def test_malformed_calls_give_a_reason_and_no_calls(block, reason):
    reply = answer(block)
    assert reply.tool_calls == () and not reply.truncated_thought
    assert reason in reply.malformed
    assert reply.content == "Yes." + OPEN + block + CLOSE  # the text stays readable


@pytest.mark.parametrize(
    "text, thinking, reason",
    [
        ("a" + OPEN + NOW, False, "</｜DSML｜function_calls> is missing"),
        ("a" + OPEN + NOW + CLOSE + "more", False, "text after the tool calls"),
        ("a" + OPEN + NOW + CLOSE + EOS + "more", False, "text after the tool calls"),
        ("a" + EOS + "more", False, "text after the end of the sequence"),
        ("a ｜DSML｜ b", False, "｜DSML｜ inside the answer"),
        ("a</think>b", False, "</think> inside the answer"),
        ("a</think>b</think>c", True, "</think> inside the answer"),
        ("a" + OPEN + NOW + CLOSE + "</think>b", True, "｜DSML｜ inside the thought"),
        ("<think>a</think>b", True, "<think> inside the thought"),
    ],
)
def test_markers_out_of_place_are_malformed(text, thinking, reason):
    reply = parse_completion(text, thinking)
    assert reply.malformed == reason and reply.tool_calls == ()


def test_a_call_inside_an_unfinished_thought_is_not_made():
    reply = parse_completion("hm" + OPEN + NOW + CLOSE + EOS, thinking=True)
    assert reply.truncated_thought and reply.tool_calls == () and reply.content == ""


def test_the_end_of_sequence_token_may_be_missing():
    for tail in ("", EOS):
        assert parse_completion("Yes." + tail, False).content == "Yes."
        assert len(parse_completion("Yes." + OPEN + NOW + CLOSE + tail, False).tool_calls) == 1


def test_a_block_without_calls_is_well_formed():
    reply = answer("")
    assert (reply.content, reply.tool_calls, reply.malformed) == ("Yes.", (), None)


MARKUP = [
    "</think>",
    "<think>",
    EOS,
    "｜DSML｜",
    OPEN,
    CLOSE,
    NOW,
    '<｜DSML｜invoke name="',
    '">\n',
    "</｜DSML｜invoke>\n",
]
MARKUP += [parameter("a", "1"), '<｜DSML｜parameter name="b" string="true">', "</｜DSML｜parameter>\n", "<", ">\n", "1"]
SOUP = st.lists(st.sampled_from(MARKUP) | st.text(max_size=8), max_size=24).map("".join)


@settings(max_examples=400, deadline=None)
@given(SOUP | st.text(), st.booleans())
@example("", True)
@example("\n\n<｜DSML｜function_calls", False)
def test_any_text_parses_to_a_consistent_reply(text, thinking):
    reply = parse_completion(text, thinking)
    assert isinstance(reply.tool_calls, tuple)
    if reply.malformed is not None or reply.truncated_thought:
        assert reply.tool_calls == ()
    if thinking:
        assert reply.truncated_thought == ("</think>" not in text)
        assert reply.reasoning == text.split("</think>")[0].removesuffix(EOS if reply.truncated_thought else "")
    else:
        assert reply.reasoning == "" and text.startswith(reply.content)


PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="｜"), max_size=30).filter(
    lambda text: "</think>" not in text and "<think>" not in text
)
NAMES = st.from_regex(r"[A-Za-z_][\w.\-]{0,12}", fullmatch=True)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, JSON, max_size=4)), max_size=4)


def completion(reasoning: str, content: str, calls: list, thinking: bool) -> str:
    """What the model would have written: the rendered turn without the prompt before it."""
    user = {"role": "user", "content": "q"}
    functions = [{"function": {"name": name, "arguments": json.dumps(arguments)}} for name, arguments in calls]
    turn = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": functions}
    prompt = render_messages([user], thinking=thinking)
    return render_messages([user, turn], thinking=thinking).removeprefix(prompt)


@settings(max_examples=200, deadline=None)
@given(PLAIN.filter(bool), PLAIN, CALLS, st.booleans())
def test_what_is_rendered_is_parsed_back(reasoning, content, calls, thinking):
    reply = parse_completion(completion(reasoning, content, calls, thinking), thinking)
    assert reply.malformed is None and not reply.truncated_thought
    assert (reply.reasoning, reply.content) == (reasoning if thinking else "", content)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == calls


def test_a_completion_cut_at_any_character_gives_all_calls_or_none():
    calls = [("f", {"a": "x\n\ny", "b": [1, {"c": None}]}), ("g", {}), ("h", {"größe": "😀"})]
    text = completion("Let me think.", "I will call.", calls, thinking=True)
    whole = len(text) - len(EOS)
    for end in range(len(text) + 1):
        reply = parse_completion(text[:end], thinking=True)
        if end in (whole, len(text)):
            assert [(call.name, call.arguments) for call in reply.tool_calls] == calls and reply.malformed is None
        else:
            assert reply.tool_calls == ()
            assert reply.truncated_thought == (end < text.index("</think>") + len("</think>"))

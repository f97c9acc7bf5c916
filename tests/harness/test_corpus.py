import itertools
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from harness.corpus.config import CorpusConfig
from harness.corpus.corpus import Corpus
from harness.corpus.maker import BatchMaker
from harness.corpus.rows import dialogue_parts
from harness.errors import HarnessError
from model.chat.dsv32 import render_messages
from model.chat.dsv32_parse import BOS, EOS, USER, parse_completion
from model.training.batch import Share
from tasks.dialogues import mixture
from tasks.dialogues.held_out import held_out_tasks
from tasks.niah import sentences
from tasks.words import word_list

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "configs" / "train" / "dsa-tiny" / "tokenizer.json"
GENERATORS = {draw.__name__: draw for draw in (*mixture._LONG, *mixture._SHORT)}
PHASES = {"dense": [{"until": 3, "mix": {256: 1}}, {"mix": {512: 1, 1024: 1}}], "sparse": [{"mix": {512: 1}}]}


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for name in ("one", "two", "zzqx"):
        source = sentences.made_up(random.Random(name))
        marks = (f"“Yes,” said {name} -- it's No. {n}; {next(source)}" for n in range(400))
        (folder / f"{name}.txt").write_text("CHAPTER I.\n\n" + "\n".join(marks), encoding="utf-8")
    return folder


def config_of(folder, **changes):
    settings = {"books": folder, "held_out_books": ["zzqx"], "tokens": 1024, "lengths": PHASES}
    return CorpusConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def maker(books):
    return BatchMaker(config_of(books), TOKENIZER, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(TOKENIZER))


def dialogues(maker, name, num=6):
    for number, length in itertools.islice(itertools.product(range(num), (300, 900)), num):
        yield GENERATORS[name](random.Random(f"{name}/{number}"), length, maker._training)


def rendered(dialogue):
    """What the chat encoding renders for the last turn of each beginning of the dialogue, one behind the other."""
    if dialogue.text:
        return BOS + "".join(dialogue.text)
    messages, text = [], ""
    for turn in dialogue.turns:
        calls = [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in turn.calls]
        messages += [
            {"role": "user", "content": "".join(turn.user)},
            {
                "role": "assistant",
                "content": "".join(part for part, _ in turn.answer),
                "reasoning_content": "".join(part for part, _ in turn.thought or ()),
                "tool_calls": calls,
            },
        ]
        whole = render_messages(messages, dialogue.tools, thinking=turn.thought is not None)
        text = text + whole[whole.rindex(USER) :] if text else whole
    return text


@pytest.mark.parametrize("name", GENERATORS)
def test_ids_are_the_tokenizers_ids_of_what_the_chat_encoding_renders(maker, tokenizer, name):
    for dialogue in dialogues(maker, name):
        text = rendered(dialogue)
        assert "".join(part for part, _ in dialogue_parts(dialogue)) == text
        row = maker._encoder.row(dialogue)
        assert row.token_ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", GENERATORS)
def test_dialogues_without_thoughts_are_one_rendered_conversation(maker, name):
    for dialogue in dialogues(maker, name, num=2):
        if dialogue.text or any(turn.thought for turn in dialogue.turns):
            continue
        messages = []
        for turn in dialogue.turns:
            calls = [{"function": {"name": call.name, "arguments": dict(call.arguments)}} for call in turn.calls]
            messages.append({"role": "user", "content": "".join(turn.user)})
            content = "".join(part for part, _ in turn.answer)
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
        assert "".join(part for part, _ in dialogue_parts(dialogue)) == render_messages(messages, dialogue.tools)


@pytest.mark.parametrize("name", GENERATORS)
def test_answer_mask_covers_exactly_what_the_assistant_writes(maker, tokenizer, name):
    for dialogue in dialogues(maker, name):
        row = maker._encoder.row(dialogue)
        runs = []
        for is_answer, group in itertools.groupby(zip(row.is_answer, row.token_ids, strict=True), lambda pair: pair[0]):
            if is_answer:
                runs.append(tokenizer.decode([int(token) for _, token in group], skip_special_tokens=False))
        turns = rendered(dialogue).split(USER)[1:]
        written = [re.split("<｜Assistant｜>(?:</think>|<think>)", turn, maxsplit=1)[1] for turn in turns]  # noqa: RUF001
        assert runs == written
        for text, turn in zip(runs, dialogue.turns, strict=True):
            assert text.endswith(EOS)
            reply = parse_completion(text, thinking=turn.thought is not None)
            assert reply.malformed is None and len(reply.tool_calls) == len(turn.calls)
        assert not (row.is_critical & ~row.is_answer).any()


def test_values_are_critical_and_phrases_are_not(maker, tokenizer):
    dialogue = next(dialogues(maker, "_all_lines"))
    row = maker._encoder.row(dialogue)
    critical = tokenizer.decode(row.token_ids[row.is_critical].tolist())
    assert critical == "".join(part for turn in dialogue.turns for part, role in turn.answer if role == "value")


def test_every_question_can_be_answered_from_its_haystack(maker):
    for name in ("_one_of_many", "_all_lines", "_many_values", "_many_keys"):
        for dialogue in dialogues(maker, name):
            text = "".join(dialogue.turns[0].user)
            for turn in dialogue.turns:
                keys = re.search(r" for (.+) mentioned", turn.user[-1])[1]
                values = []
                for key in re.split(r", and |, ", keys):
                    values += re.findall(
                        rf"One of the special magic \w+ for {re.escape(key)} is: (.+?)\.(?= |\n|$)", text
                    )
                said = "".join(part for part, role in turn.answer if role == "value").strip()
                assert re.split(r", and |, ", said) == values


def test_held_out_words_and_books_never_are_keys_values_or_names(maker, tokenizer):
    held_out = {*word_list("adjective", "held_out"), *word_list("noun", "held_out")}
    seen = set()
    for name in GENERATORS:
        for dialogue in dialogues(maker, name, num=12):
            text = rendered(dialogue)
            keys = re.findall(r"magic words? for ([^:,]+?) is: (.+?)\.(?= |\n|$)", text)
            names = [(text,) for text in re.findall(r'(?:"name": ")(\w+)"', text)]
            options = [(word,) for word in re.findall(r"^[A-J]\. (\w+)$", text, re.MULTILINE)]
            for group in (*keys, *names, *options):
                seen.update(word for item in group for word in re.split(r"[-_ ]", item))
            assert "said zzqx" not in text
    known = {word for word in seen if word.isalpha()}
    assert len(known) > 100
    names_of_tools = {"get", "name"}
    assert {word for word in known & held_out if word not in names_of_tools and word not in _fixed_words()} == set()


def _fixed_words():
    """Verbs and parameters of functions, and halves of hyphenated list words."""
    from tasks.synthetic import tools

    listed = (*word_list("adjective", "training"), *word_list("noun", "training"))
    halves = {half for word in listed for half in re.split(r"[- ]", word) if half != word}
    return {*tools._VERBS, *tools._PARAMETERS, *halves}


def test_a_batch_depends_on_seed_stage_and_step_alone(books, maker):
    again = BatchMaker(config_of(books), TOKENIZER, seed=0)
    again.batch("sparse", 4)
    for stage, step in (("dense", 1), ("dense", 7), ("sparse", 1)):
        one, two = maker.batch(stage, step), again.batch(stage, step)
        assert np.array_equal(one.token_ids, two.token_ids)
        assert np.array_equal(one.weights, two.weights) and np.array_equal(one.is_answer, two.is_answer)
    others = [maker.batch("dense", 0), BatchMaker(config_of(books), TOKENIZER, seed=1).batch("dense", 0)]
    assert not np.array_equal(others[0].token_ids, others[1].token_ids)
    assert not np.array_equal(maker.batch("dense", 1).token_ids, others[0].token_ids)


def test_workers_give_the_same_stream_from_any_step(books):
    here = Corpus(config_of(books), TOKENIZER).stream("dense", 2)
    ahead = Corpus(config_of(books), TOKENIZER, num_workers=1).stream("dense", 2)
    for one, two in zip(itertools.islice(here, 3), ahead, strict=False):
        assert np.array_equal(one.token_ids, two.token_ids) and np.array_equal(one.weights, two.weights)
    ahead.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_processes_share_the_rows_of_a_batch(books, num_workers):
    corpus = Corpus(config_of(books), TOKENIZER, num_workers=num_workers)
    whole = next(Corpus(config_of(books), TOKENIZER).stream("dense", 2))
    half = len(whole.token_ids) // 2
    for rank in range(2):
        stream = corpus.stream("dense", 2, Share(rank=rank, size=2))
        mine = next(stream)
        stream.close()
        rows = slice(rank * half, (rank + 1) * half)
        assert mine.first_row == rank * half and np.array_equal(mine.token_ids, whole.token_ids[rows])
        assert np.array_equal(mine.weights, whole.weights[rows]) and np.array_equal(
            mine.is_answer, whole.is_answer[rows]
        )


def test_lengths_follow_the_phases_and_every_step_has_the_same_tokens(maker):
    lengths = [maker.length("dense", step) for step in range(40)]
    assert set(lengths[:3]) == {256} and set(lengths[3:]) == {512, 1024}
    for step in (0, 5, 6, 7, 8):
        batch = maker.batch("dense", step)
        assert (
            batch.token_ids.shape
            == batch.weights.shape
            == batch.is_answer.shape
            == (1024 // lengths[step], lengths[step])
        )
        assert batch.tokens == 1024
        assert batch.token_ids.max() < 4096 and batch.is_answer.any() and (batch.weights > 0).mean() > 0.9


@pytest.mark.parametrize("task", held_out_tasks())
def test_held_out_rows_ask_for_what_was_hidden(maker, task):
    (found,) = [maker.held_out(task, 1024, 2)]
    assert found.task == f"{task}@1024"
    assert found.batch.token_ids.shape == (2, 1024)
    assert found.batch.is_answer.any(axis=1).all()
    assert not (found.batch.is_answer & (found.batch.weights == 0)).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"books": "nowhere"}, "nowhere is no folder"),
        ({"held_out_books": ["three"]}, r"no three\.txt"),
        ({"held_out_books": ["one", "two", "zzqx"]}, "no .txt file to train on"),
    ],
)
def test_books_that_cannot_be_used_are_named(books, changes, message):
    with pytest.raises(HarnessError, match=message):
        Corpus(config_of(books, **changes), TOKENIZER)


def test_unknown_stage_names_the_known_ones(maker):
    with pytest.raises(HarnessError, match="no stage 'warmup'; the config has dense, sparse"):
        maker.batch("warmup", 0)


def test_phases_without_an_end_must_be_last(books):
    with pytest.raises(ValueError, match="rising `until`"):
        config_of(books, lengths={"dense": [{"mix": {512: 1}}, {"mix": {512: 1}}]})


def test_training_path_needs_neither_lm_eval_nor_its_friends(books):
    program = (
        "import sys; from harness.corpus import maker, corpus; "
        "print(*[m for m in ('lm_eval', 'datasets', 'evaluate', 'ray', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_print_speed(maker, capsys):
    maker.batch("dense", 3)
    start = time.process_time()
    tokens = sum(maker.batch("dense", step).tokens for step in range(4, 24))
    with capsys.disabled():
        print(f" {tokens / (time.process_time() - start) / 1e6:.2f} M tokens/s of one core")

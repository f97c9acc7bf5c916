import hashlib
import json
from pathlib import Path

import datasets
import pytest

from tasks.errors import TaskError
from tasks.mmlu_pro import questions
from tasks.mmlu_pro.prompts import chat_prompt, few_shot_prompt

TASKS = Path(__file__).resolve().parents[2] / "tasks"
GOLDEN_PROMPTS = json.loads((Path(__file__).parent / "cases" / "mmlu_pro_prompts.json").read_text())


def item(number, category="physics", **changes):
    return {
        "question_id": number,
        "question": f"Question number {number}?",
        "options": ["one ", "two", "three"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": f"A: Let's think step by step. It is {number}. The answer is (B).",
        "category": category,
        "src": "",
        **changes,
    }


def folder(path, test, validation=()):
    for name, rows in (("test.jsonl", test), ("validation.jsonl", validation)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PROMPT_BY_HAND = """\
The following are multiple choice questions (with answers) about physics. Think step by step and then finish your \
answer with "the answer is (X)" where X is the correct letter choice.



Question:
Question number 3?
Options:
A. one\x20
B. two
C. three
Answer: Let's think step by step. It is 3. The answer is (B).

Question:
Question number 1?
Options:
A. one\x20
B. two
C. three
Answer: Let's think step by step. It is 1. The answer is (B).

Question:
Why?
Options:
A. up
B. down
Answer: Let's think step by step."""

CHAT_PROMPT_BY_HAND = """\
Answer the following multiple choice question. The last line of your response should be of the following format: \
'Answer: $LETTER' (without quotes) where LETTER is one of ABCDEFGHIJ. Think step by step before answering.

Why?

A) up
B) down"""


def test_prompts_are_those_written_by_hand():
    doc = item(9, question="Why?", options=["up", "down"])
    assert few_shot_prompt(doc, [item(3), item(1)]) == PROMPT_BY_HAND
    assert chat_prompt(doc) == CHAT_PROMPT_BY_HAND


def test_examples_are_the_first_of_the_category_in_file_order(tmp_path):
    validation = [item(5, "law"), item(3), item(6, "law"), item(1), item(2)]
    data = folder(tmp_path, [item(9, question="Why?", options=["up", "down"])], validation)
    (doc,) = questions.build(data=data, shots=2)["test"]
    assert doc["prompt"] == PROMPT_BY_HAND
    assert doc["question_id"] == "9"


def test_options_that_are_not_available_are_dropped(tmp_path):
    data = folder(tmp_path, [item(1, options=["one", "two", "N/A", "N/A"])])
    (doc,) = questions.build(data=data, shots=0)["test"]
    assert doc["options"] == ["one", "two"]
    assert "N/A" not in doc["prompt"]


def test_test_file_may_be_named_and_validation_lies_beside_it(tmp_path):
    folder(tmp_path, [item(1)], [item(number) for number in range(5)])
    (tmp_path / "test.jsonl").rename(tmp_path / "my_items.jsonl")
    assert len(questions.build(data=str(tmp_path / "my_items.jsonl"))["test"]) == 1


@pytest.mark.parametrize("shots", [-1, 6, "5", True])
def test_impossible_number_of_shots_is_refused(shots):
    with pytest.raises(TaskError, match="shots: expected 0 to 5"):
        questions.build(data="unread", shots=shots)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer": "K"}, "expected a letter from A to J, got 'K'"),
        ({"options": ["one"]}, "expected 2 to 10 texts"),
        ({"options": ["one", 2]}, "expected 2 to 10 texts"),
        ({"category": None}, "field 'category' is missing"),
    ],
)
def test_item_that_cannot_be_asked_is_named_by_file_and_line(tmp_path, changes, message):
    data = folder(tmp_path, [item(1), item(2, **changes)])
    with pytest.raises(TaskError, match=f"test.jsonl, line 2: .*{message}"):
        questions.build_chat(data=data)


def test_category_without_enough_examples_is_named(tmp_path):
    data = folder(tmp_path, [item(1)], [item(2)])
    with pytest.raises(TaskError, match="category 'physics': expected 5 validation items, got 1"):
        questions.build(data=data)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(TaskError, match="nowhere does not exist"):
        questions.build(data=str(tmp_path / "nowhere"))


def test_question_id_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(TaskError, match="id '1' comes twice"):
        questions.build_chat(data=folder(tmp_path, [item(1), item(1)]))


def test_hub_is_read_when_no_data_is_given(monkeypatch):
    splits = {"test": [item(9)], "validation": [item(number) for number in range(5)]}

    def load_dataset(name, split):
        assert name == "TIGER-Lab/MMLU-Pro"
        return datasets.Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (doc,) = questions.build()["test"]
    assert doc["prompt"].count("Question:\n") == 6


def test_unparsed_response_is_wrong_and_guessed_only_in_the_official_number():
    docs = [item(str(number)) for number in range(300)]
    scores = [questions.process_results(doc, ["no idea"]) for doc in docs]
    assert {score["exact_match"] for score in scores} == {0.0}
    assert {score["answer"] for score in scores} == {None}
    assert sum(score["official"] for score in scores) / 300 == pytest.approx(1 / 3, abs=0.1)


def test_parsed_response_is_never_guessed():
    docs = [item(str(number)) for number in range(50)]
    assert {questions.process_results(doc, ["The answer is (B)."])["official"] for doc in docs} == {1.0}
    assert {questions.process_results(doc, ["The answer is (A)."])["official"] for doc in docs} == {0.0}


def test_letter_beyond_the_options_is_parsed_and_wrong():
    scores = questions.process_results(item("1"), ["The answer is (J)."])
    assert scores == {"exact_match": 0.0, "official": 0.0, "answer": "J"}


def test_items_whose_letter_and_index_disagree_are_listed():
    assert questions.mismatched_ids([item(1), item(2, answer_index=2), item(3, answer_index=11)]) == ["2", "3"]


@pytest.mark.parametrize("name", ["mmlu_pro", "mmlu_pro_chat"])
def test_lm_eval_builds_and_scores_the_task_from_its_file(tmp_path, name):
    from lm_eval.tasks import TaskManager

    data = folder(tmp_path, [item(9)], [item(number) for number in range(5)])
    metadata = {"data": data, "seed": 0, "samples": 1, "max_tokens": 8, "count_tokens": len}
    manager = TaskManager(include_path=str(TASKS / "mmlu_pro"), include_defaults=False, metadata=metadata)
    task = manager.load([name])["tasks"][name]
    (doc,) = task.test_docs()
    assert task.doc_to_text(doc) == doc["prompt"]
    gold = task.process_results(doc, [task.doc_to_target(doc)])
    wrong = task.process_results(doc, [task.config.metadata["wrong"](doc)])
    assert (gold["exact_match"], wrong["exact_match"]) == (1.0, 0.0)
    assert set(gold) == set(task.aggregation())
    assert task.aggregation()["answer"]([gold["answer"], None]) == 0.5


@pytest.fixture(scope="module")
def official_docs(shared):
    return questions.build(data=str(shared / "data" / "mmlu_pro"))["test"].to_list()


def test_all_prompts_are_those_of_the_official_script(official_docs):
    digests = {doc["question_id"]: hashlib.sha256(doc["prompt"].encode()).hexdigest() for doc in official_docs}
    for name, expected in GOLDEN_PROMPTS["prompts"].items():
        assert digests[name] == expected["sha256"], f"{expected['category']}, question {name}"
    everything = hashlib.sha256(b"".join(doc["prompt"].encode() + b"\0" for doc in official_docs))
    assert everything.hexdigest() == GOLDEN_PROMPTS["all_prompts_sha256"]


@pytest.mark.parametrize(
    "gold, wrong, score",
    [
        (questions.target, questions.wrong, questions.process_results),
        (questions.chat_target, questions.chat_wrong, questions.process_chat_results),
    ],
)
def test_gold_is_right_and_empty_and_wrong_are_wrong_on_every_item(official_docs, gold, wrong, score):
    assert len(official_docs) == 12032
    assert all(score(doc, [gold(doc)])["exact_match"] == 1 for doc in official_docs)
    assert all(score(doc, [gold(doc)])["official"] == 1 for doc in official_docs)
    assert all(score(doc, [wrong(doc)])["exact_match"] == 0 for doc in official_docs)
    assert all(score(doc, [wrong(doc)])["official"] == 0 for doc in official_docs)
    assert all(score(doc, [wrong(doc)])["answer"] in "ABCDEFGHIJ" for doc in official_docs)
    assert all(
        score(doc, [""]) | {"official": 0} == {"exact_match": 0, "official": 0, "answer": None} for doc in official_docs
    )


def test_the_one_damaged_item_is_found(official_docs):
    assert questions.mismatched_ids(official_docs) == ["3983"]

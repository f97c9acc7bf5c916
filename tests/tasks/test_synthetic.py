import json
import random
import re
from pathlib import Path

import pytest

from tasks.errors import TaskError
from tasks.niah.build import build as build_needles
from tasks.synthetic import build
from tasks.synthetic.choice import draw_passage
from tasks.synthetic.sums import draw_sum
from tasks.synthetic.tools import as_tools, draw_functions, draw_request
from tasks.words import Vocabulary, is_held_out, made_up_word, word_list

TASKS = Path(__file__).resolve().parents[2] / "tasks"
NAMES = ("synthetic_sums", "synthetic_choice", "synthetic_tools")


def count_words(text: str, prefix: str) -> int:
    return len(text.split()) + len(prefix.split()) + 10


def task_of(name, **options):
    from lm_eval.tasks import TaskManager

    metadata = {"seed": 0, "samples": 3, "max_tokens": 32, "count_tokens": count_words, "data": None, **options}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


@pytest.mark.parametrize(
    "name, options",
    [
        ("synthetic_sums", {}),
        ("synthetic_choice", {"lengths": [300, 600]}),
        ("synthetic_tools", {"functions": [1, 5, 40]}),
        ("synthetic_tools", {"functions": [5], "mode": "prompting"}),
    ],
)
def test_gold_scores_one_wrong_and_empty_score_zero(name, options):
    task = task_of(name, **options)
    docs = list(task.test_docs())
    assert len({doc["id"] for doc in docs}) == len(docs) >= 3
    metadata = task.config.metadata
    for doc in docs:
        for text, expected in ((task.doc_to_target(doc), 1.0), (metadata["wrong"](doc), 0.0), ("", 0.0)):
            scores = task.process_results(doc, [text])
            assert scores[metadata["headline"]] == expected
            assert (scores["answer"] is None) == (text == "")
        assert task.doc_to_text(doc)


def docs(build_task, **options):
    return build_task(samples=4, **options)["test"].to_list()


@pytest.mark.parametrize("build_task", [build.build_sums, build.build_tools])
def test_samples_do_not_depend_on_how_many_there_are(build_task):
    few = build_task(samples=2)["test"].to_list()
    many = {doc["id"]: doc for doc in build_task(samples=5)["test"].to_list()}
    assert all(many[doc["id"]] == doc for doc in few)
    assert build_task(samples=2, seed=1)["test"].to_list() != few


def test_sums_are_what_python_computes_step_by_step():
    rng, words = random.Random(0), Vocabulary("all")
    for num_terms in (2, 3, 4, 5) * 50:
        drawn = draw_sum(num_terms, rng, words)
        assert len(drawn.chain) == num_terms - 1
        last = None
        for step in drawn.chain:
            first, sign, second, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)\.", step).groups()
            assert last in (None, first)
            assert int(result) == int(first) + int(sign + second)
            last = result
        assert drawn.value == int(last)
        if bare := re.search(r"(?:is|Compute) ([\d +-]+)[?.]", drawn.question):
            assert sum(int(term) for term in re.sub(r"([+-]) ", r"\1", bare[1]).split()) == drawn.value


def test_choice_prompt_holds_the_fact_once_and_fits_its_length():
    for doc in docs(build.build_choice, lengths=[300], count_tokens=count_words, max_tokens=32, facts=6, choices=5):
        (fact,) = doc["needles"]
        assert doc["prompt"].count(fact) == 1
        assert 260 < count_words(doc["prompt"], "") + 32 <= 300
        listed = re.findall(r"^([A-J])\. (\w+)$", doc["prompt"], re.MULTILINE)
        assert [option for _, option in listed] == doc["options"] and len(set(doc["options"])) == 5
        assert fact.endswith(f" {dict(listed)[doc['letter']]}.")
        about = fact.rpartition(" is ")[0].removeprefix("The ")
        assert f"Question: What is the {about}?" in doc["prompt"]


def test_walk_ends_at_the_right_option():
    passage = draw_passage(8, 10, 8, random.Random(0), Vocabulary("all"))
    for question in passage.questions:
        *others, last = question.walk
        assert last == (f"\n{question.letter}. {question.value}", True)
        assert not any(right for _, right in others)


def test_tool_requests_name_every_argument_of_one_offered_function():
    rng, words = random.Random(0), Vocabulary("held_out")
    for _ in range(50):
        functions = draw_functions(12, rng, words)
        assert len({function["name"] for function in functions}) == 12
        function = rng.choice(functions)
        request = draw_request(function, rng, words)
        assert list(request.arguments) == function["parameters"]["required"]
        for name, value in request.arguments.items():
            assert name in request.text and str(value) in request.text
            types = {"integer": int, "string": str}
            assert type(value) is types[function["parameters"]["properties"][name]["type"]]
    assert as_tools(functions)[0]["function"]["parameters"]["type"] == "object"
    assert functions[0]["parameters"]["type"] == "dict"


def test_evaluation_uses_held_out_words_only():
    named = [json.loads(doc["functions"]) for doc in docs(build.build_tools)]
    nouns = {function["name"].split("_")[1] for functions in named for function in functions}
    choices = docs(build.build_choice, lengths=[400], count_tokens=count_words, max_tokens=32)
    options = {option for doc in choices for option in doc["options"]}
    assert len(nouns) > 50 and all(map(is_held_out, nouns | options))


def test_words_split_into_nine_and_one_tenth():
    for category in ("adjective", "noun"):
        whole, training, held_out = (word_list(category, split) for split in ("all", "training", "held_out"))
        assert sorted({*training, *held_out}) == list(whole) and not {*training} & {*held_out}
        assert 0.08 < len(held_out) / len(whole) < 0.12


def test_made_up_words_of_training_never_are_held_out_by_chance():
    rng, words = random.Random(0), Vocabulary("training", made_up=1.0)
    assert not any(is_held_out(words.name(rng)) for _ in range(500))
    assert any(is_held_out(made_up_word(rng)) for _ in range(500))


def test_needle_tasks_can_use_held_out_words():
    options = {"lengths": [300], "depths": 1, "count_tokens": count_words, "samples": 4}
    for doc in build_needles(task="niah_multikey_1", options={}, words="held_out", **options)["test"].to_list():
        for key in re.findall(r"magic numbers for (.+?) is", doc["prompt"]):
            adjectives, nouns = word_list("adjective", "held_out"), word_list("noun", "held_out")
            assert any(key == f"{adjective}-{noun}" for adjective in adjectives for noun in nouns)
    with pytest.raises(TaskError, match="words: expected all or held_out, got 'new'"):
        build_needles(task="niah_multikey_1", options={}, words="new", **options)


@pytest.mark.parametrize(
    "build_task, options, message",
    [
        (build.build_sums, {"terms": [1]}, "terms: expected different numbers from 2 to 5"),
        (build.build_sums, {"terms": []}, "terms"),
        (build.build_sums, {"samples": 0}, "samples: expected a positive number"),
        (build.build_tools, {"functions": [41]}, "functions: expected different numbers from 1 to 40"),
        (build.build_tools, {"mode": "xml"}, "mode: expected native or prompting, got 'xml'"),
        (build.build_choice, {"choices": 11, "count_tokens": count_words}, "choices"),
        (build.build_choice, {"lengths": [40], "max_tokens": 9, "count_tokens": count_words}, "40 is too short"),
        (build.build_choice, {}, "lengths are counted in the model's tokens"),
    ],
)
def test_options_that_cannot_be_used_are_named(build_task, options, message):
    with pytest.raises(TaskError, match=message):
        build_task(**options)

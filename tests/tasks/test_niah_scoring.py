from pathlib import Path

import pytest

from tasks.metrics.needle_match import all_found, match_all, whole_words
from tasks.niah.build import build
from tasks.niah.needles import NEEDLE_TASKS

TASKS = [*NEEDLE_TASKS, "niah_vt"]
FOLDER = Path(__file__).resolve().parents[2] / "tasks"
CASES = [  # prediction, references, RULER's string_match_all / 100, all found, whole words
    ("The number is 1234567.", ["1234567"], 1.0, 1.0, 1.0),
    ("1234567, 7654321", ["1234567", "7654321"], 1.0, 1.0, 1.0),
    ("1234567 only", ["1234567", "7654321"], 0.5, 0.0, 0.5),
    ("912345678", ["1234567"], 1.0, 1.0, 0.0),
    ("vwxyz ABCDE", ["VWXYZ", "abcde"], 1.0, 1.0, 1.0),
    ("ABCDEF", ["ABCDE"], 1.0, 1.0, 0.0),
    ("123\x004567", ["1234567"], 0.0, 0.0, 0.0),
    ("a\x01b", ["a\nb"], 1.0, 1.0, 1.0),
    ("\x1f 1.5 \x00", ["1.5"], 1.0, 1.0, 1.0),
    ("1x5", ["1.5"], 0.0, 0.0, 0.0),
    ("", ["1234567"], 0.0, 0.0, 0.0),
]


def count_words(text: str, prefix: str) -> int:
    """White space separates tokens; ten more stand for a chat template."""
    return len(text.split()) + len(prefix.split()) + 10


@pytest.fixture(scope="module")
def loaded():
    from lm_eval.tasks import TaskManager

    metadata = {
        "seed": 3, "data": None, "samples": 2, "lengths": [600], "depths": [0, 100],
        "count_tokens": count_words, "max_tokens": 64,
    }  # fmt: skip
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    return manager, manager.load(TASKS)["tasks"]


@pytest.mark.parametrize("prediction, references, share, strict, whole", CASES)
def test_needle_match_scores_as_ruler_does(prediction, references, share, strict, whole):
    assert match_all(prediction, references) == share
    assert all_found(prediction, references) == strict
    assert whole_words(prediction, references) == whole


def test_needle_match_loads_alone_as_a_metric():
    import evaluate

    metric = evaluate.load(str(FOLDER / "metrics" / "needle_match_metric.py"))
    found = metric.compute(predictions=[case[0] for case in CASES], references=[case[1] for case in CASES])
    assert found == {
        name: pytest.approx(sum(case[i] for case in CASES) / len(CASES))
        for i, name in ((2, "match_all"), (3, "all_found"), (4, "whole_words"))
    }


def test_needle_match_refuses_a_sample_without_references():
    with pytest.raises(ValueError, match="at least one reference"):
        match_all("text", [])


def test_lm_eval_lists_the_nine_tasks_and_not_their_base(loaded):
    manager, _ = loaded
    assert [name for name in manager.all_tasks if "niah" in name] == sorted(TASKS)
    assert not any("base" in name for name in manager.all_tasks)


@pytest.mark.parametrize("task", TASKS)
def test_gold_is_right_and_wrong_and_empty_are_not(task, loaded):
    task = loaded[1][task]
    wrong = task.config.metadata["wrong"]
    docs = list(task.eval_docs)
    assert len(docs) == 4
    for doc in docs:
        gold = task.process_results(doc, [task.doc_to_target(doc)])
        assert (gold["match_all"], gold["all_found"], gold["whole_words"]) == (1, 1, 1)
        assert gold["answer"] == ", ".join(doc["answers"])
        scores = task.process_results(doc, [wrong(doc)])
        assert (scores["match_all"], scores["all_found"], scores["whole_words"]) == (0, 0, 0)
        assert scores["answer"] is not None and len(wrong(doc).split(", ")) == len(doc["answers"])
        assert not any(value in doc["prompt"] for value in wrong(doc).split(", "))
        assert wrong({key: doc[key] for key in ("id", "answers")}) == wrong(doc)
        for empty in ("", " \n\x00 "):
            scores = task.process_results(doc, [empty])
            assert (scores["match_all"], scores["all_found"], scores["answer"]) == (0, 0, None)
    assert task.aggregation()["answer"](["1", None, "2", None]) == 0.5


@pytest.mark.parametrize("task", TASKS)
def test_the_task_carries_rulers_budget_and_the_keys_the_harness_reads(task, loaded):
    config = loaded[1][task].config
    assert config.generation_kwargs == {
        "until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 30 if task == "niah_vt" else 128,
    }  # fmt: skip
    metadata = config.metadata
    doc = loaded[1][task].eval_docs[0]
    assert metadata["headline"] == "match_all" and metadata["generated"] is True
    assert {metadata["id"], metadata["cluster"], metadata["needles"], *metadata["group"], *metadata["unscored"]} <= set(
        doc
    )
    assert loaded[1][task].doc_to_text(doc) == doc["prompt"]
    assert loaded[1][task].doc_to_prefix(doc) == doc["gen_prefix"] != ""


@pytest.mark.parametrize("task, budget", [("niah_single_1", 128), ("niah_vt", 30)])
def test_without_a_budget_rulers_is_kept_free(task, budget):
    def prompt(**metadata):
        metadata |= {"lengths": [900], "depths": 1, "samples": 1, "count_tokens": count_words}
        return build(task=task, options={}, **metadata)["test"][0]["prompt"]

    assert prompt() == prompt(max_tokens=budget) != prompt(max_tokens=budget + 60)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("They are 1234567 and 7654321.", "1234567, 7654321"),
        ("I do not know.\n", "I do not know."),
    ],
)
def test_the_parsed_answer_is_the_values_or_else_the_words(text, answer):
    from tasks.niah.scoring import process_results

    assert process_results({"answers": ["1111111"]}, [text])["answer"] == answer

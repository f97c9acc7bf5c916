import json
from pathlib import Path

import datasets
import pytest

from tasks.errors import TaskError
from tasks.math import problems

TASKS = Path(__file__).resolve().parents[2] / "tasks"


def problem(name, answer="33", **changes):
    return {"id": name, "problem": "What is {{x}}?", "answer": answer, **changes}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompt_is_deepseeks_and_braces_stay_as_they_are():
    assert problems.prompt(problem("a")) == (
        "What is {{x}}?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


def test_local_file_is_found_in_a_folder_or_named(tmp_path):
    path = write(tmp_path / "aime_2025.jsonl", problem("a", 70), problem("b", "033"))
    expected = [problem("a", "70"), problem("b", "033")]
    for data in (tmp_path, path):
        assert problems.build(competition="aime25", data=str(data))["test"].to_list() == expected


@pytest.mark.parametrize("competition, name", [("aime24", "aime_2024"), ("hmmt25", "hmmt_feb_2025")])
def test_folder_without_the_competition_says_which_file_it_needs(tmp_path, competition, name):
    with pytest.raises(TaskError, match=rf"has none of {name}\.jsonl"):
        problems.build(competition=competition, data=str(tmp_path))


def test_problem_without_an_answer_is_named_by_file_and_line(tmp_path):
    path = write(tmp_path / "aime_2025.jsonl", problem("a"), {"id": "b", "problem": "?"})
    with pytest.raises(TaskError, match=r"aime_2025\.jsonl, line 2: field 'answer' is missing"):
        problems.build(competition="aime25", data=str(path))


def fake_hub(monkeypatch, sizes):
    def load_dataset(name, split):
        assert split == "train"
        rows = [{"problem_idx": n, "problem": f"{name} {n}", "answer": n} for n in range(sizes[name], 0, -1)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_problems_get_the_ids_of_the_local_files(monkeypatch):
    fake_hub(monkeypatch, {"MathArena/aime_2024_I": 15, "MathArena/aime_2024_II": 15})
    docs = problems.build(competition="aime24")["test"].to_list()
    assert docs[0] == {"id": "aime-2024-I-01", "problem": "MathArena/aime_2024_I 1", "answer": "1"}
    assert docs[15] == {"id": "aime-2024-II-01", "problem": "MathArena/aime_2024_II 1", "answer": "1"}
    assert docs[29]["id"] == "aime-2024-II-15"


def test_hub_data_set_of_another_size_is_refused(monkeypatch):
    fake_hub(monkeypatch, {"MathArena/aime_2026": 15})
    with pytest.raises(TaskError, match="aime26: expected 30 problems in MathArena/aime_2026, got 15"):
        problems.build(competition="aime26")


@pytest.mark.parametrize("name", sorted(problems.COMPETITIONS))
def test_lm_eval_builds_the_task_from_its_file(tmp_path, name):
    from lm_eval.tasks import TaskManager

    write(tmp_path / f"{problems.COMPETITIONS[name].file}.jsonl", problem("a"))
    metadata = {"data": str(tmp_path), "seed": 0, "samples": 1, "max_tokens": 8, "count_tokens": len}
    manager = TaskManager(include_path=str(TASKS / "math"), include_defaults=False, metadata=metadata)
    task = manager.load([name])["tasks"][name]
    (doc,) = task.test_docs()
    assert task.doc_to_text(doc) == problems.prompt(doc)
    scores = task.process_results(doc, [task.doc_to_target(doc)])
    assert scores == {"exact_match": 1.0, "math_verify_only": 0.0, "answer": "33"}
    assert set(scores) == set(task.aggregation())
    assert task.config.generation_kwargs["until"] == []


@pytest.mark.parametrize("name", sorted(problems.COMPETITIONS))
def test_gold_is_right_and_empty_and_wrong_are_wrong_on_every_item(shared, name):
    docs = problems.build(competition=name, data=str(shared / "data" / "math"))["test"].to_list()
    assert len(docs) == problems.NUM_PROBLEMS
    for doc in docs:
        gold, wrong, empty = (
            problems.process_results(doc, [text]) for text in (problems.target(doc), problems.wrong(doc), "")
        )
        assert (gold["exact_match"], gold["math_verify_only"]) == (1, 0), doc["id"]
        assert wrong["exact_match"] == 0 and wrong["answer"] is not None, doc["id"]
        assert empty == {"exact_match": 0, "math_verify_only": 0, "answer": None}

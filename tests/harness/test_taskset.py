"""The suite's entries become tasks with options, protocol, samples and scorer; lm-eval's own tasks do as well."""

import json
from pathlib import Path

import pytest

from harness import taskset
from harness.config import Config, Generation, TaskEntry
from harness.errors import HarnessError
from harness.plan import make_plan, record_of
from harness.records import Response
from harness.scores import score
from harness.scripted import ScriptedEngine
from harness.selection import spread_order
from harness.taskset import find_tasks, list_tasks
from tests.harness.made_up import write_tasks


@pytest.fixture(autouse=True)
def made_up(tmp_path, monkeypatch):
    monkeypatch.setattr(taskset, "TASKS", write_tasks(tmp_path))


def entry(task: str, **fields) -> TaskEntry:
    return TaskEntry.model_validate({"task": task, **fields})


def only(task: str, **fields):
    (found,) = find_tasks([entry(task, **fields)])
    return found


def docs_of(task, *, seed=0, limit=None):
    return task.docs(seed=seed, count_tokens=lambda text, prefix="": len(text + prefix), has_template=True, limit=limit)


def answered(text: str) -> Response:
    return Response(text=text, answer=text, finish_reason="stop", completion_tokens=1)


def chosen(*logprobs: float) -> list[Response]:
    return [
        Response(text="", answer="", finish_reason="scored", completion_tokens=0, logprob=value, is_greedy=False)
        for value in logprobs
    ]


def complaint(task: str, **fields) -> str:
    with pytest.raises(HarnessError) as caught:
        docs_of(only(task, **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_protocol_is_the_tasks_own():
    protocol = only("colours").protocol
    assert (protocol.sampling.temperature, protocol.sampling.top_p, protocol.max_tokens) == (0.7, 0.9, 16)
    assert (protocol.repeats, protocol.stop, protocol.thinking, protocol.limit_lowered) == (1, (), True, False)


def test_the_entry_overrides_the_protocol_and_a_lower_limit_is_marked():
    generation = {"temperature": 1.0, "max_tokens": 4, "stop": ["!"], "top_k": 5}
    protocol = only("colours", repeats=3, generation=generation).protocol
    assert (protocol.sampling.temperature, protocol.sampling.top_p, protocol.sampling.top_k) == (1.0, 0.9, 5)
    assert (protocol.max_tokens, protocol.stop, protocol.repeats, protocol.limit_lowered) == (4, ("!",), 3, True)


def test_do_sample_false_is_greedy_and_until_is_the_stop():
    protocol = only("words").protocol
    assert protocol.sampling.temperature == 0 and protocol.stop == (".",)


def test_repeats_of_a_greedy_protocol_are_refused():
    assert complaint("words", repeats=2).startswith("tasks.0.repeats: 2 greedy answers would all be the same")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"brigth": False}, "tasks.0.brigth: unknown key; the nearest is 'bright'"),
        ({"sampels": 3}, "tasks.0.sampels: unknown key; the nearest is 'samples'"),
        ({"bright": 1}, "tasks.0.bright: expected true or false, got 1"),
        ({"shade": 3}, "tasks.0.shade: expected a text, got 3"),
        ({"shade": ["dark"]}, "tasks.0.shade: expected a text, got ['dark']"),
        ({"weight": "0.5"}, "tasks.0.weight: expected a number, got '0.5'"),
    ],
)
def test_a_wrong_option_is_refused_with_what_was_expected(fields, message):
    assert complaint("colours", **fields) == message


def test_options_of_a_list_take_a_list_or_one_value():
    assert only("words", lengths=[100, 150]).options == {"lengths": [100, 150]}
    assert only("words", lengths=100).options == {"lengths": 100}
    assert complaint("words", lengths=["long"]).startswith("tasks.0.lengths: expected a list of a whole number")


def test_an_unknown_task_is_answered_with_the_nearest_name():
    assert complaint("color") == "tasks.0.task: unknown task 'color'; the nearest is 'colours'"


def test_groups_and_tags_expand_to_their_tasks():
    assert [task.label for task in find_tasks([entry("everything", samples=1)])] == ["words", "colours"]
    labels = [task.label for task in find_tasks([entry("paint", name="p")])]
    assert labels == ["p.colours", "p.colours_chat", "p.colours_native"]


def test_a_task_named_by_itself_and_by_its_group_is_refused():
    with pytest.raises(HarnessError, match=r"tasks.1: colours is in tasks.0 already"):
        find_tasks([entry("colours"), entry("paint")])


def test_samples_are_spread_over_the_strata_and_only_added_to():
    few, many = (docs_of(only("colours", samples=number)) for number in (4, 7))
    assert [doc.id for doc in many][:4] == [doc.id for doc in few]
    hues = [doc.row["hue"] for doc in docs_of(only("colours", samples=6))]
    assert sorted(hues) == ["blue", "blue", "green", "green", "red", "red"]


def test_another_seed_chooses_other_samples():
    choices = {tuple(doc.id for doc in docs_of(only("colours", samples=4), seed=seed)) for seed in range(5)}
    assert len(choices) > 1


def test_no_number_of_samples_takes_all():
    assert len(docs_of(only("colours"))) == 12


def test_generated_samples_are_made_per_cell_and_a_limit_visits_every_cell_first():
    docs = docs_of(only("words", lengths=[100, 150], samples=2))
    assert [doc.id for doc in docs] == ["100/0", "150/0", "100/1", "150/1"]
    assert [doc.id for doc in docs_of(only("words", lengths=[100, 150], samples=2), limit=2)] == ["100/0", "150/0"]


def test_spread_order_takes_one_of_each_stratum_per_round():
    order = spread_order(list("abcdef"), ["x", "x", "x", "x", "y", "z"], seed=0, task="t", shuffle=True)
    assert {"xxxxyz"[i] for i in order[:3]} == {"x", "y", "z"}
    assert sorted(order) == list(range(6))


def test_a_doc_has_messages_start_of_the_answer_needle_group_and_cluster():
    doc = docs_of(only("words", samples=1))[0]
    (ask,) = doc.asks
    assert ask.prefix == "The word is" and ask.continuation is None
    assert [message["role"] for message in ask.messages] == ["user"]
    assert doc.needles[0] in ask.messages[0]["content"]
    assert (doc.group, doc.cluster, doc.gold, doc.wrong) == ({"length": 200}, "200/0", "w0", "w999")
    assert "prompt" not in doc.row and doc.row["haystack"] == "none"


def test_messages_and_tools_of_a_task_replace_the_plain_prompt():
    chat = docs_of(only("colours_chat"))[0].asks[0]
    assert [message["role"] for message in chat.messages] == ["system", "user"]
    native = docs_of(only("colours_native"))[0].asks[0]
    assert native.tools is not None and native.tools[0]["function"]["name"] == "paint"


def test_samples_that_share_a_field_share_a_cluster():
    assert {doc.cluster for doc in docs_of(only("colours"))} == {"a", "b"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing", "tasks.0: missing: no such file; expected colours.jsonl"),
        ("empty", "tasks.0: colours found no samples in empty"),
        ("twice", "tasks.0: colours has two samples with the id '0'; expected unique ids"),
    ],
)
def test_bad_data_is_one_line(data, message):
    assert complaint("colours", data=data) == message


def test_the_scorer_needs_the_stored_doc_only():
    task = only("colours")
    doc = json.loads(json.dumps(docs_of(task)[0].row))
    right = task.scorer.score(doc, [answered(doc["hue"])])
    assert right.metrics == {"right": 1.0, "long": float(len(doc["hue"]))} and right.answer == doc["hue"]
    unparsed = task.scorer.score(doc, [answered("mauve")])
    assert unparsed.metrics["right"] == 0.0 and unparsed.answer is None


def test_a_scorer_that_fails_is_an_error_and_not_a_wrong_answer():
    task = only("colours")
    with pytest.raises(HarnessError, match="its scorer failed: KeyError: 'crash'"):
        task.scorer.score(docs_of(task)[0].row, [answered("crash")])


def test_the_list_of_tasks_names_options_and_protocol():
    listed = {task["task"]: task for task in list_tasks()}
    assert listed["words"] == {
        "task": "words",
        "about": "Made-up tasks",
        "options": {"lengths": [200]},
        "readme": "tasks/made_up/README.md",
    }
    assert "everything" not in listed and "paint" not in listed


GSM8K = [{"question": f"What is {i} and {i}?", "answer": f"Twice {i} is {2 * i}.\n#### {2 * i}"} for i in range(1, 9)]
ARC = [
    {
        "id": f"q{i}",
        "question": f"Is it {i}?",
        "choices": {"text": ["yes", "no", "perhaps so"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i in range(4)
]


def write_splits(folder: Path, rows, *splits: str) -> str:
    folder.mkdir()
    for split in splits:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def installed_index():
    """Reading lm-eval's 14,000 names takes seconds: once for all tests."""
    return taskset._installed_manager()


def test_an_unknown_task_of_lm_eval_is_answered_with_the_nearest_name(installed_index):
    assert complaint("lm_eval/gsm8l").startswith("tasks.0.task: lm-eval has no task 'gsm8l'; the nearest is 'gsm8k")


def test_a_generation_task_of_lm_eval_runs_on_local_data(installed_index, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write_splits(tmp_path / "gsm8k", GSM8K, "train", "test")
    task = only("lm_eval/gsm8k", data=data, num_fewshot=2, samples=3)
    docs = docs_of(task)
    assert task.label == "lm_eval/gsm8k" and len(docs) == 3
    (message,) = docs[0].asks[0].messages
    assert message["role"] == "user" and message["content"].count("Question:") == 3
    assert task.protocol.sampling.temperature == 0 and "Question:" in task.protocol.stop
    scored = task.scorer.score(docs[0].row, [answered(docs[0].gold)])
    assert task.scorer.headline == "exact_match,strict-match"
    assert scored.metrics == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}
    assert scored.answer == docs[0].gold.rpartition(" ")[2]
    assert task.scorer.score(docs[0].row, [answered("no idea")]).answer is None


def test_few_shot_examples_do_not_depend_on_which_samples_are_run(installed_index, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write_splits(tmp_path / "gsm8k", GSM8K, "train", "test")
    prompts = [
        {doc.id: doc.asks for doc in docs_of(only("lm_eval/gsm8k", data=data, num_fewshot=2, samples=number))}
        for number in (2, 8)
    ]
    assert all(prompts[1][name] == asks for name, asks in prompts[0].items())


def test_a_choice_task_of_lm_eval_asks_once_per_choice(installed_index, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write_splits(tmp_path / "arc", ARC, "train", "validation", "test")
    task = only("lm_eval/arc_easy", data=data)
    docs = {doc.id: doc for doc in docs_of(task)}
    doc = docs["1"]
    assert [ask.continuation for ask in doc.asks] == ["yes", "no", "perhaps so"]
    assert (doc.gold, doc.gold_ask, doc.wrong_ask) == ("no", 1, 0)
    right = task.scorer.score(doc.row, chosen(-3.0, -1.0, -2.0))
    assert right.metrics == {"acc": 1.0, "acc_norm": 0.0} and right.answer == "1"  # -0.2 a letter beats -0.5
    assert task.scorer.score(doc.row, chosen(-1.0, -3.0, -9.0)).metrics["acc"] == 0.0


@pytest.mark.parametrize(("script", "mean"), [("gold", 1.0), ("wrong", 0.0), ("empty", 0.0)])
def test_scripts_score_what_they_should_in_tasks_of_lm_eval(installed_index, tmp_path, monkeypatch, script, mean):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = [
        {"task": "lm_eval/gsm8k", "data": write_splits(tmp_path / "gsm8k", GSM8K, "train", "test"), "num_fewshot": 1},
        {"task": "lm_eval/arc_easy", "data": write_splits(tmp_path / "arc", ARC[1:], "train", "validation", "test")},
    ]
    raw = {"name": "t", "model": {"scripted": script}, "variants": {"a": {}}, "tasks": tasks}
    plan = make_plan(Config.model_validate(raw))
    encoding = plan.encodings["a"]
    records = [record_of(item, list(ScriptedEngine().run(item.requests)), encoding) for item in plan.items]
    scores = score(records, json.loads(json.dumps(plan.docs)), plan.scorers)
    assert len(scores) == 8 + 3
    # a script that holds no choice for true gives all the same log-likelihood, and the first one wins
    judged = [sample for sample in scores if script != "empty" or sample.task == "lm_eval/gsm8k"]
    assert {sample.metrics[sample.headline] for sample in judged} == {mean}


def test_tasks_of_lm_eval_that_cannot_be_run_are_refused(installed_index, tmp_path):
    assert "expected a folder with one file a split" in complaint("lm_eval/gsm8k", data=str(tmp_path / "nothing"))
    assert "num_fewshot: expected a number of examples" in complaint("lm_eval/gsm8k", num_fewshot=-1)
    assert "num_fewshots: unknown key; the nearest is 'num_fewshot'" in complaint("lm_eval/gsm8k", num_fewshots=1)


def test_rolling_likelihood_is_refused(installed_index, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write_splits(tmp_path / "wiki", [{"page": "A page."}], "train", "validation", "test")
    assert "wikitext is loglikelihood_rolling; expected one of generate_until" in complaint(
        "lm_eval/wikitext", data=data
    )


def test_generation_settings_have_one_type():
    assert entry("words", generation={"temperature": 1}).generation == Generation(temperature=1.0)

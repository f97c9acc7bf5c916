"""Journal lines and stored docs are enough to score; errors, cut thoughts and old settings are told apart."""

import dataclasses
import json
from typing import Any

import pytest

from harness import taskset
from harness.config import Config
from harness.errors import HarnessError
from harness.plan import Plan, make_plan, record_of
from harness.records import Record, Response
from harness.scores import score
from harness.scripted import ScriptedEngine
from tests.harness.made_up import write_tasks

TASKS = [{"task": "words", "samples": 2}, {"task": "colours", "repeats": 2}]


@pytest.fixture(autouse=True)
def made_up(tmp_path, monkeypatch):
    monkeypatch.setattr(taskset, "TASKS", write_tasks(tmp_path))


def planned(script: str = "gold", tasks: Any = TASKS) -> Plan:
    raw = {"name": "t", "model": {"scripted": script}, "variants": {"a": {}, "b": {}}, "tasks": tasks}
    return make_plan(Config.model_validate(raw))


def run(plan: Plan) -> list[Record]:
    return [
        record_of(item, list(ScriptedEngine().run(item.requests)), plan.encodings[item.variant]) for item in plan.items
    ]


def scored(plan: Plan, records: list[Record]):
    stored = json.loads(json.dumps(plan.docs))  # as the run folder keeps them
    return score(records, stored, plan.scorers)


def answered(record: Record, **changes: Any) -> Record:
    return dataclasses.replace(record, responses=(dataclasses.replace(record.responses[0], **changes),))


@pytest.mark.parametrize(("script", "mean"), [("gold", 1.0), ("wrong", 0.0), ("empty", 0.0)])
def test_scripts_score_what_they_should(script, mean):
    plan = planned(script)
    scores = scored(plan, run(plan))
    assert len(scores) == len(plan.items) == 2 * (2 + 12 * 2)
    assert {sample.metrics["right"] for sample in scores} == {mean}
    assert {sample.unparsed for sample in scores} == {script == "empty"}


def test_scores_come_in_the_order_of_the_docs_whatever_the_order_of_the_journal():
    plan = planned()
    records = run(plan)
    assert scored(plan, records) == scored(plan, records[::-1])


def test_each_repeat_is_scored_alone():
    plan = planned(tasks=[{"task": "colours", "samples": 1, "repeats": 2}])
    records = run(plan)
    records[0] = answered(records[0], answer="mauve")
    first, second = [sample for sample in scored(plan, records) if sample.variant == "a"]
    assert (first.metrics["right"], first.answer, first.unparsed) == (0.0, None, True)
    assert (second.metrics["right"], second.repeat) == (1.0, 1)


def test_a_failed_sample_is_an_error_and_has_no_metrics():
    plan = planned()
    records = run(plan)
    records[0] = dataclasses.replace(records[0], responses=(), error="out of memory")
    sample = scored(plan, records)[0]
    assert (sample.error, sample.metrics, sample.unparsed, sample.finish_reason) == (
        "out of memory",
        {},
        False,
        "error",
    )
    assert sample.headline == "right" and sample.answer_tokens is None


def test_a_cut_thought_is_unparsed_and_wrong_whatever_it_says():
    plan = planned(tasks=[{"task": "words", "samples": 1}])
    records = run(plan)
    cut = {"answer": "", "truncated_thought": True, "finish_reason": "length", "text": "w0", "reasoning_tokens": 2}
    sample = scored(plan, [answered(records[0], **cut)])[0]
    assert (sample.metrics["right"], sample.answer, sample.unparsed, sample.truncated) == (0.0, None, True, True)


def test_reasoning_and_answer_tokens_add_up_and_unknown_stays_unknown():
    plan = planned(tasks=[{"task": "words", "samples": 1}])
    record = run(plan)[0]
    known = scored(plan, [answered(record, completion_tokens=10, reasoning_tokens=7)])[0]
    unknown = scored(plan, [answered(record, completion_tokens=10, reasoning_tokens=None)])[0]
    assert (known.reasoning_tokens, known.answer_tokens) == (7, 3)
    assert (unknown.reasoning_tokens, unknown.answer_tokens) == (None, 10)


def test_records_of_older_settings_are_left_out():
    plan = planned()
    records = run(plan)
    old = dataclasses.replace(records[0], key="0" * 32)
    assert scored(plan, [*records, old]) == scored(plan, records)


def test_a_missing_record_is_simply_not_there_yet():
    plan = planned()
    records = run(plan)
    assert len(scored(plan, records[:5])) == 5


def test_a_record_of_other_data_is_refused():
    plan = planned()
    records = run(plan)
    records[0] = dataclasses.replace(records[0], doc_hash="f" * 32)
    with pytest.raises(HarnessError, match=r"words, doc 200/0: the journal's sample is f{32}, the stored one"):
        scored(plan, records)


def test_a_scorer_that_fails_names_task_and_doc():
    plan = planned(tasks=[{"task": "colours", "samples": 1}])
    records = run(plan)
    with pytest.raises(HarnessError, match=r"colours, doc \d+: its scorer failed: KeyError"):
        scored(plan, [answered(records[0], answer="crash")])


def test_group_cluster_and_hashes_come_from_the_record():
    plan = planned(tasks=[{"task": "colours", "samples": 1}])
    sample, item = scored(plan, run(plan))[0], plan.items[0]
    assert (sample.group, sample.cluster) == (item.group, item.cluster)
    assert (sample.doc_hash, sample.prompt_hash, sample.prompt_tokens) == (
        item.doc_hash,
        item.prompt_hash,
        item.prompt_tokens,
    )


def test_a_response_without_text_is_wrong_but_counted():
    plan = planned(tasks=[{"task": "words", "samples": 1}])
    empty = Response(text="", answer="", finish_reason="stop", completion_tokens=0)
    sample = scored(plan, [dataclasses.replace(run(plan)[0], responses=(empty,))])[0]
    assert (sample.metrics, sample.unparsed, sample.error) == ({"right": 0.0}, True, None)

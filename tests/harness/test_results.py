"""The results table against numbers worked out by hand, lm-eval style plain means and scipy."""

import json
import random

import pytest
from scipy import stats

from harness.errors import HarnessError
from harness.records import SampleScore
from harness.results import results

HEADER = {"name": "quick", "digest": "3f9c", "commit": "abc", "device": "cpu", "created": "2026-01-01T00:00:00Z"}
RECALL_ROW = {"phase": "prompt", "layer": 0, "selector": "indexer", "k": 4, "n": 3, "oracle_mass": 0.8}
RECALL_ROW |= {"mass": 0.4, "mass_share": 0.5, "topk_recall": 0.5, "output_error": 0.1, "needle_coverage": None}


def score(doc_id, right, *, repeat=0, variant="dense", task="mmlu", answer="A", error=None, **fields):
    metrics = right if isinstance(right, dict) else {"exact": right}
    return SampleScore(
        **{
            "variant": variant,
            "task": task,
            "doc_id": str(doc_id),
            "repeat": repeat,
            "group": {},
            "cluster": str(doc_id),
            "doc_hash": "d",
            "prompt_hash": "p",
            "headline": "exact",
            "metrics": {} if error else metrics,
            "answer": answer,
            "unparsed": answer is None,
            "truncated": False,
            "error": error,
            "finish_reason": "error" if error else "stop",
            "prompt_tokens": 100,
            "completion_tokens": 10,
            "reasoning_tokens": None,
            "answer_tokens": 10,
            "text": "",
            **fields,
        }
    )


def table(scores, variants=("dense",), tasks=("mmlu",), **options):
    return results(scores, header=HEADER, variants=variants, tasks=tasks, **options)


def cell(found, metric="exact", group=None, **where):
    (line,) = [
        line
        for line in found["cells"]
        if line["metric"] == metric
        and line["group"] == (group or {})
        and all(line[key] == value for key, value in where.items())
    ]
    return line


def test_header_and_order_are_kept_and_the_whole_is_json():
    found = table([score(1, 1.0)])
    assert {key: found[key] for key in HEADER} == HEADER
    assert (found["schema"], found["variants"], found["tasks"]) == (1, ["dense"], ["mmlu"])
    assert json.loads(json.dumps(found)) == found


def test_mean_error_and_interval_of_a_task():
    values = [0.0, 0.25, 0.5, 1.0, 1.0, 0.75]
    found = cell(table([score(i, value) for i, value in enumerate(values)]))
    expected = stats.t.interval(0.95, 5, sum(values) / 6, stats.sem(values))
    assert found["mean"] == pytest.approx(3.5 / 6)
    assert found["stderr"] == pytest.approx(stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((expected[0], min(1, expected[1])))
    assert (found["interval"], found["n"], found["clusters"], found["repeats"]) == ("t", 6, 6, 1)
    assert found["headline"] is True


def test_failed_samples_are_counted_and_are_no_wrong_answers():
    found = cell(table([score(1, 1.0), score(2, 1.0), score(3, 0.0, error="out of memory")]))
    assert (found["mean"], found["n"], found["errors"], found["responses"]) == (1.0, 2, 1, 2)
    assert found["prompt_tokens_mean"] == 100


def test_nothing_is_invented_where_nothing_was_answered():
    scores = [score(1, 1.0), score(1, 0.0, variant="sparse", error="boom")]
    found = table(scores, variants=("dense", "sparse", "random"), tasks=("mmlu", "aime"))
    for variant, errors in (("sparse", 1), ("random", 0)):
        line = cell(found, variant=variant)
        assert (line["n"], line["errors"]) == (0, errors)
        names = ("mean", "stderr", "low", "high", "interval", "completion_tokens_mean", "reasoning_tokens_mean")
        assert [line[name] for name in names] == [None] * len(names)
    assert {line["task"] for line in found["cells"]} == {"mmlu"}


def test_responses_are_counted_by_how_they_ended():
    found = cell(
        table(
            [
                score(1, 1.0),
                score(2, 0.0, answer=None),
                score(3, 0.0, answer=None, truncated=True, finish_reason="length"),
            ]
        )
    )
    counts = {name: found[name] for name in ("unparsed", "truncated", "errors", "stopped", "length")}
    assert counts == {"unparsed": 2, "truncated": 1, "errors": 0, "stopped": 2, "length": 1}


def test_reasoning_tokens_are_null_where_the_model_has_no_thinking_marker():
    without = cell(table([score(1, 1.0, reasoning_tokens=None)]))
    some = cell(table([score(1, 1.0, reasoning_tokens=0), score(2, 1.0, reasoning_tokens=30)]))
    assert without["reasoning_tokens_mean"] is None
    assert some["reasoning_tokens_mean"] == 15


def test_every_metric_has_a_cell_and_the_headline_comes_first():
    found = table([score(1, {"exact": 1.0, "strict": 0.0, "guess": 0.5})])
    assert [(line["metric"], line["headline"]) for line in found["cells"]] == [
        ("exact", True),
        ("guess", False),
        ("strict", False),
    ]


def test_groups_come_by_value_in_number_order_and_pairs_last():
    scores = [
        score(f"{length}-{depth}-{i}", float(i > 0), group={"length": length, "depth": depth})
        for length in (8192, 1024, 16384)
        for depth in (50.0, 0.0)
        for i in range(3)
    ]
    random.Random(2).shuffle(scores)
    found = table(scores)
    assert [line["group"] for line in found["cells"]] == [
        {},
        {"depth": 0.0},
        {"depth": 50.0},
        {"length": 1024},
        {"length": 8192},
        {"length": 16384},
        *({"length": length, "depth": depth} for length in (1024, 8192, 16384) for depth in (0.0, 50.0)),
    ]
    pair = cell(found, group={"length": 1024, "depth": 50.0})
    expected = stats.binomtest(2, 3).proportion_ci(method="wilson")
    assert (pair["low"], pair["high"], pair["interval"]) == (
        pytest.approx(expected.low),
        pytest.approx(expected.high),
        "wilson",
    )
    assert cell(found, group={"length": 1024})["n"] == 6


def test_a_needle_cell_of_a_hundred_0_1_scores_still_gets_wilson():
    group = {"length": 1024, "depth": 50.0}
    found = table([score(i, float(i % 4 > 0), group=group) for i in range(120)])
    assert cell(found, group=group)["interval"] == "wilson"
    assert cell(found)["interval"] == "t"


def test_samples_of_one_context_are_one_cluster():
    scores = [score(i, float(i % 3 > 0), cluster=f"book {i // 40}") for i in range(120)]
    found = cell(table(scores))
    assert (found["n"], found["clusters"], found["interval"]) == (120, 3, "clustered t")


def test_repeats_are_averaged_per_question_before_the_error_is_taken():
    tries = {"a": [1, 1, 0, 0], "b": [0, 0, 0, 1], "c": [1, 1, 1, 1]}
    scores = [score(doc, float(r), repeat=i, task="aime") for doc, right in tries.items() for i, r in enumerate(right)]
    found = table(scores, tasks=("aime",))
    line = cell(found)
    assert line["mean"] == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert line["stderr"] == pytest.approx(stats.sem([0.5, 0.25, 1.0]))
    assert (line["n"], line["repeats"], line["responses"]) == (3, 4, 12)
    # subsets of 2 of 4 with a right one: 5 of 6, 3 of 6, all
    assert cell(found, "pass@2")["mean"] == pytest.approx((5 / 6 + 1 / 2 + 1) / 3)
    assert cell(found, "pass@4")["mean"] == 1.0
    assert [line["metric"] for line in found["cells"]] == ["exact", "pass@1", "pass@2", "pass@4", "maj@4"]


def test_majority_goes_by_answers():
    votes = {"a": [("5", 1), ("7", 0), ("5", 1), ("9", 0)], "b": [("1", 0), ("2", 1), ("1", 0), ("2", 1)]}
    scores = [
        score(doc, float(right), repeat=i, answer=answer)
        for doc, tries in votes.items()
        for i, (answer, right) in enumerate(tries)
    ]
    assert cell(table(scores), "maj@4")["mean"] == pytest.approx((1 + 0.5) / 2)


def test_a_lost_repeat_leaves_its_question_out_of_what_needs_it_all():
    scores = [score("a", 1.0, repeat=0), score("a", 0.0, repeat=1, error="boom")]
    scores += [score("b", 0.0, repeat=0), score("b", 0.0, repeat=1)]
    found = table(scores)
    assert (cell(found)["n"], cell(found)["mean"], cell(found)["repeats"]) == (2, 0.5, 2)
    assert (cell(found, "pass@2")["n"], cell(found, "pass@2")["mean"]) == (1, 0.0)
    assert cell(found, "maj@2")["n"] == 1


def test_partial_credit_has_no_pass_at_k():
    found = table([score("a", 0.5, repeat=i) for i in range(2)])
    assert [line["metric"] for line in found["cells"]] == ["exact", "maj@2"]


def test_order_of_samples_changes_nothing():
    draw = random.Random(4)
    scores = [
        score(i, draw.random(), repeat=r, cluster=str(i // 3), group={"category": "xyz"[i % 3]}, completion_tokens=i)
        for i in range(30)
        for r in range(3)
    ]
    first = json.dumps(table(scores))
    draw.shuffle(scores)
    assert json.dumps(table(scores)) == first


def test_a_sample_that_is_there_twice_is_refused():
    with pytest.raises(HarnessError, match="dense, mmlu, doc 1: repeat 0 is there twice"):
        table([score(1, 1.0), score(1, 1.0)])


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(HarnessError, match="metric exact is nan"):
        table([score(1, float("nan"))])
    with pytest.raises(HarnessError, match=r"no exact among the metrics \['other'\]"):
        table([score(1, {"other": 1.0})])


def test_repeats_over_other_prompts_are_refused():
    with pytest.raises(HarnessError, match="doc 1: its repeats saw different documents or prompts"):
        table([score(1, 1.0), score(1, 1.0, repeat=1, prompt_hash="q")])


def test_two_headlines_for_one_task_are_refused():
    other = score(2, {"other": 1.0}, headline="other")
    with pytest.raises(HarnessError, match="mmlu: headline metric exact in one place and other in another"):
        table([score(1, 1.0), other])


def test_lowered_limits_are_marked_by_task():
    scores = [score(1, 1.0), score(1, 1.0, task="aime")]
    found = table(scores, tasks=("mmlu", "aime"), lowered={"aime"})
    assert [line["limit_lowered"] for line in found["cells"]] == [False, True]


def test_recall_of_every_variant_is_tabled_and_missing_probes_stop_the_table():
    summary = {"trajectory": "sparse", "active_share": 0.5, "trivial": 2, "rows": [RECALL_ROW]}
    scores = [score(i, 1.0, recall=summary) for i in range(2)]
    found = table(scores)
    assert [(line["layer"], line["mass"], line["n"], line["mass_stderr"]) for line in found["recall"]] == [
        (None, pytest.approx(0.4), 2, 0.0),
        (0, pytest.approx(0.4), 2, 0.0),
    ]
    assert found["recall_coverage"][0]["trivial"] == 4
    assert found["active_share"] == [{"variant": "dense", "task": "mmlu", "mean": 0.5, "n": 2}]
    with pytest.raises(HarnessError, match="1 of 3 samples carry no probes"):
        table([*scores, score(9, 1.0)])
    with pytest.raises(HarnessError, match="1 of 1 samples carry no probes"):
        table([score(9, 1.0)], probed={"dense"})

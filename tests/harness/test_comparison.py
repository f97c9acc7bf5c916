"""comparison.json from scored samples: pairing, refusals, families of tests, and the tables beside the verdicts."""

import dataclasses
import json
import math
import random

import pytest
from scipy import stats

from harness.comparison import compare
from harness.errors import HarnessError
from harness.records import SampleScore

MARGINS = {"default": 0.02}


def score(variant, doc_id, right, *, task="niah", repeat=0, error=None, **fields):
    return SampleScore(
        **{
            "variant": variant,
            "task": task,
            "doc_id": str(doc_id),
            "repeat": repeat,
            "group": {},
            "cluster": str(doc_id),
            "doc_hash": f"doc {doc_id}",
            "prompt_hash": f"prompt {doc_id}",
            "headline": "exact",
            "metrics": {} if error else {"exact": float(right)},
            "answer": "x",
            "unparsed": False,
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


def both(ours, theirs, task="niah", **fields):
    """Sparse and dense samples with these scores, one document a place."""
    return [
        score(variant, doc, right, task=task, **fields)
        for variant, rights in (("sparse", ours), ("dense", theirs))
        for doc, right in enumerate(rights)
    ]


def compared(scores, variants=("sparse", "dense"), tasks=("niah",), baseline="dense", margins=MARGINS):
    return compare(scores, baseline=baseline, margins=margins, variants=variants, tasks=tasks)


def row(found, task="niah", variant="sparse"):
    (line,) = [line for line in found["rows"] if (line["task"], line["variant"]) == (task, variant)]
    return line


def random_pair(n, seed, task="niah", loss=0.1):
    draw = random.Random(seed)
    theirs = [float(draw.random() < 0.6) for _ in range(n)]
    return both([right * (draw.random() > loss) for right in theirs], theirs, task)


def test_a_row_holds_the_contracts_fields_and_is_json():
    found = compared(random_pair(80, 1))
    names = "variant baseline task group metric n clusters mean_variant mean_baseline difference stderr low high "
    names += "variant_only baseline_only mcnemar_p margin tost_p verdict sentence n_needed tokens"
    assert set(names.split()) <= row(found).keys()
    assert (found["schema"], found["baseline"], found["alpha"]) == (1, "dense", 0.05)
    assert json.loads(json.dumps(found)) == found


def test_difference_is_paired_by_document_and_not_by_place():
    scores = both([1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 1])
    expected = stats.ttest_rel([1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 1])
    interval = expected.confidence_interval(0.95)
    random.Random(3).shuffle(scores)
    line = row(compared(scores))
    assert (line["mean_variant"], line["mean_baseline"]) == (0.5, pytest.approx(4 / 6))
    assert (line["low"], line["high"]) == pytest.approx((interval.low, interval.high))
    assert (line["variant_only"], line["baseline_only"], line["mcnemar_p"]) == (1, 2, 1.0)


def test_swapping_variant_and_baseline_negates_the_difference():
    scores = random_pair(90, 2)
    there, back = row(compared(scores)), row(compared(scores, baseline="sparse"), variant="dense")
    assert there["difference"] < 0
    assert back["difference"] == -there["difference"]
    assert (back["low"], back["high"]) == pytest.approx((-there["high"], -there["low"]))
    assert (back["mcnemar_p"], back["tost_p"]) == (there["mcnemar_p"], there["tost_p"])


def test_repeats_are_averaged_per_question_and_have_no_mcnemar():
    tries = {"sparse": [[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]], "dense": [[1, 1], [0, 1], [1, 1]]}
    scores = [
        score(variant, doc, right, repeat=repeat)
        for variant, docs in tries.items()
        for doc, rights in enumerate(docs)
        for repeat, right in enumerate(rights)
    ]
    line = row(compared(scores))
    assert line["difference"] == pytest.approx((-0.25 - 0.25 + 0) / 3)
    assert line["stderr"] == pytest.approx(stats.sem([-0.25, -0.25, 0]))
    assert (line["n"], line["mcnemar_p"]) == (3, None)


def test_documents_of_one_context_are_one_cluster():
    scores = [dataclasses.replace(s, cluster=f"book {int(s.doc_id) // 5}") for s in random_pair(60, 3)]
    line = row(compared(scores))
    assert (line["n"], line["clusters"], line["interval"]) == (60, 12, "clustered t")


def test_documents_without_a_partner_are_left_out_counted_and_named():
    scores = [
        *both([1, 0, 1], [1, 1, 1]),
        score("sparse", 7, 1),
        score("dense", 7, 0, error="boom"),
        score("dense", 8, 0),
    ]
    line = row(compared(scores))
    assert line["n"] == 3
    assert line["unpaired"] == [
        {"doc_id": "7", "variant": "dense", "reason": "error"},
        {"doc_id": "8", "variant": "sparse", "reason": "missing"},
    ]
    assert (line["errors_baseline"], line["errors_variant"]) == (1, 0)
    assert "Left out: 2 samples failed or missing on one side." in line["sentence"]


def test_a_failed_repeat_leaves_its_document_paired_by_the_others():
    scores = [score("sparse", 0, 1), score("sparse", 0, 0, repeat=1, error="boom"), score("sparse", 1, 0)]
    scores += [score("dense", doc, 1, repeat=repeat) for doc in (0, 1) for repeat in (0, 1)]
    line = row(compared(scores))
    assert (line["n"], line["mean_variant"], line["errors_variant"], line["unpaired"]) == (2, 0.5, 1, [])


def test_a_task_that_one_side_lacks_has_an_empty_row():
    scores = [score("sparse", 0, 1), score("dense", 0, 1), score("sparse", 0, 1, task="aime")]
    line = row(compared(scores, tasks=("niah", "aime", "mmlu")), task="aime")
    assert (line["n"], line["difference"], line["tost_p"], line["verdict"]) == (0, None, None, "INCONCLUSIVE")
    assert "nothing can be compared" in line["sentence"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"doc_hash": "other"}, "its document hash other against doc 2)"),
        ({"prompt_hash": "other"}, "its prompt hash other against prompt 2)"),
        (
            {"doc_hash": "a", "prompt_hash": "b"},
            "its document hash a against doc 2 and prompt hash b against prompt 2)",
        ),
    ],
)
def test_other_documents_or_prompts_are_refused_by_name(change, what):
    scores = [
        dataclasses.replace(s, **change) if s.variant == "sparse" and s.doc_id in "23" else s
        for s in both([1] * 5, [1] * 5, task="aime")
    ]
    with pytest.raises(HarnessError) as caught:
        compared([*scores, *both([1, 0], [1, 1])], tasks=("niah", "aime"))
    message = str(caught.value)
    assert "aime: 2 of 5 documents differ between sparse and dense (first: doc 2, " + what in message
    assert "\n" not in message


def test_a_failed_sample_cannot_make_data_differ():
    scores = [*both([1, 0], [1, 1]), score("sparse", 5, 0, error="boom", prompt_hash=""), score("dense", 5, 1)]
    assert row(compared(scores))["n"] == 2


def test_unknown_baseline_and_missing_or_impossible_margins_are_refused():
    scores = both([1, 0], [1, 1])
    with pytest.raises(HarnessError, match="baseline full is not among the variants sparse, dense"):
        compared(scores, baseline="full")
    with pytest.raises(HarnessError, match="no margin for niah and no default"):
        compared(scores, margins={"aime": 0.03})
    with pytest.raises(HarnessError, match=r"expected a share between 0 and 1 .*, got 2"):
        compared(scores, margins={"default": 2})


def test_margins_are_by_task_with_a_default():
    scores = [*random_pair(80, 4), *random_pair(80, 5, "aime")]
    found = compared(scores, tasks=("niah", "aime"), margins={"default": 0.02, "aime": 0.3, "pooled": 0.01})
    assert [row(found, task)["margin"] for task in ("niah", "aime", "pooled")] == [0.02, 0.3, 0.01]
    assert row(found, "aime")["verdict"] in ("EQUIVALENT", "DIFFERENT, WITHIN MARGIN")
    assert row(found)["tost_p"] > row(found, "aime")["tost_p"]


def test_pool_names_its_tasks_and_leaves_saturated_ones_out():
    scores = [*random_pair(80, 4), *random_pair(60, 5, "mmlu"), *both([0] * 30, [0] * 30, "aime")]
    found = compared(scores, tasks=("niah", "mmlu", "aime"))
    pool = row(found, "pooled")
    assert row(found, "aime")["verdict"] == "SATURATED"
    assert (pool["pooled_tasks"], pool["left_out_tasks"], pool["n"]) == (["niah", "mmlu"], ["aime"], 140)
    assert pool["difference"] == pytest.approx((row(found)["difference"] + row(found, "mmlu")["difference"]) / 2)
    assert "the mean of 2 tasks" in pool["sentence"]


def test_one_task_is_not_pooled():
    assert [line["task"] for line in compared(random_pair(80, 4))["rows"]] == ["niah"]


def test_holm_takes_all_whole_tasks_of_all_variants_as_one_family():
    scores = [*random_pair(80, 4), *random_pair(80, 5, "aime", loss=0.4)]
    scores += [dataclasses.replace(s, variant="recency") for s in random_pair(80, 4, loss=0.3) if s.variant == "sparse"]
    found = compared(scores, variants=("dense", "sparse", "recency"), tasks=("niah", "aime"))
    family = [line for line in found["rows"] if line["task"] != "pooled" and line["p"] is not None]
    assert len(family) == 3
    smallest = min(family, key=lambda line: line["p"])
    assert smallest["holm_p"] == pytest.approx(3 * smallest["p"])
    assert row(found, "aime", "recency")["holm_p"] is None
    assert row(found, "pooled")["holm_p"] is None


def test_a_difference_that_many_comparisons_explain_says_so():
    scores = both([0.0] * 10 + [1.0] * 90, [0.0] * 2 + [1.0] * 98)
    assert row(compared(scores))["verdict"] == "DIFFERENT"
    assert "it may be chance" not in row(compared(scores))["sentence"]
    others = [f"task {index}" for index in range(9)]
    scores += [s for task in others for s in both([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0], task)]
    line = row(compared(scores, tasks=("niah", *others)))
    assert line["holm_p"] == pytest.approx(10 * line["p"])
    assert "it may be chance (adjusted p = 0.078)" in line["sentence"]


def test_rows_by_field_value_are_kept_apart_with_their_q():
    scores = [
        dataclasses.replace(s, group={"length": 1024 if int(s.doc_id) < 40 else 4096, "depth": 0.0})
        for s in random_pair(80, 6)
    ]
    found = compared(scores)
    assert [line["group"] for line in found["rows"]] == [{}]
    assert [line["group"] for line in found["by_group"]] == [{"depth": 0.0}, {"length": 1024}, {"length": 4096}]
    short = found["by_group"][1]
    assert short["n"] == 40
    assert "on niah (length 1024)" in short["sentence"]
    expected = stats.false_discovery_control([line["p"] for line in found["by_group"]])
    assert [line["q"] for line in found["by_group"]] == pytest.approx(expected.tolist())


def test_token_ratio_is_geometric_over_questions():
    scores = []
    for doc, (ours, theirs) in enumerate([(200, 100), (50, 100), (400, 100)]):
        scores += [score("sparse", doc, 1, completion_tokens=ours), score("dense", doc, 1, completion_tokens=theirs)]
    tokens = row(compared(scores))["tokens"]
    logs = [math.log(2), math.log(0.5), math.log(4)]
    interval = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert tokens["ratio"] == pytest.approx(4 ** (1 / 3))
    assert (tokens["low"], tokens["high"]) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert tokens["n"] == 3


def test_scored_choices_and_empty_answers_have_no_token_ratio():
    assert row(compared(both([1, 0], [1, 1], finish_reason="scored")))["tokens"] is None
    assert row(compared(both([1, 0], [1, 1], completion_tokens=0)))["tokens"] is None


def test_cut_off_responses_are_counted_on_both_sides():
    scores = both([1, 0], [1, 1])
    scores[0] = dataclasses.replace(scores[0], truncated=True)
    line = row(compared(scores))
    assert (line["truncated_variant"], line["truncated_baseline"]) == (1, 0)


def test_disagreements_list_every_sample_on_which_scores_differ():
    scores = [*both([1, 0, 1], [1, 1, 1]), score("recency", 2, 0), score("recency", 1, 0, error="boom")]
    found = compared(scores, variants=("sparse", "recency", "dense"))
    assert found["disagreements"] == [
        {
            "task": "niah",
            "doc_id": "1",
            "repeat": 0,
            "scores": {"sparse": 0.0, "dense": 1.0},
            "answers": {"sparse": "x", "dense": "x"},
        },
        {
            "task": "niah",
            "doc_id": "2",
            "repeat": 0,
            "scores": {"sparse": 1.0, "recency": 0.0, "dense": 1.0},
            "answers": {"sparse": "x", "recency": "x", "dense": "x"},
        },
    ]


def test_recall_is_linked_to_right_answers_of_the_same_variant():
    masses = [0.2, 0.3, 0.5, 0.7, 0.8, 0.4]
    base = {"phase": "answer", "layer": 0, "selector": "indexer", "k": 4, "n": 2, "oracle_mass": 0.9}
    base |= {"mass_share": 0.5, "topk_recall": 0.5, "output_error": 0.1, "needle_coverage": None}
    rights = [0, 0, 1, 1, 1, 0]
    scores = both(rights, [1] * 6)
    scores = [
        dataclasses.replace(
            s,
            recall={
                "trajectory": "sparse",
                "active_share": 0.5,
                "trivial": 0,
                "rows": [base | {"mass": masses[int(s.doc_id)]}],
            },
        )
        for s in scores
    ]
    sparse, dense = compared(scores)["recall_link"]
    assert (sparse["variant"], sparse["measure"], sparse["n"]) == ("sparse", "mass", 6)
    assert sparse["point_biserial"] == pytest.approx(stats.pointbiserialr(rights, masses).statistic)
    assert (dense["variant"], dense["point_biserial"]) == ("dense", None)


def test_the_order_of_samples_changes_nothing():
    scores = [*random_pair(60, 7), *random_pair(60, 8, "aime")]
    first = json.dumps(compared(scores, tasks=("niah", "aime")))
    random.Random(9).shuffle(scores)
    assert json.dumps(compared(scores, tasks=("niah", "aime"))) == first

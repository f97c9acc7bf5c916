"""Recall summaries against means worked out by hand and by a plain second implementation."""

import itertools
import json
import random

import pytest
from scipy import stats

from harness.errors import HarnessError
from harness.recall import active_share, aggregate, coverage, over_layers, summarise
from harness.recall_link import correlation, recall_link
from harness.records import SampleScore
from model.request import ProbeResult

COLUMNS = (
    "position",
    "phase",
    "layer",
    "selector",
    "k",
    "visible",
    "mass",
    "oracle_mass",
    "topk_recall",
    "output_error",
    "needle_coverage",
)


def probe(*rows, trajectory="dense", share=None):
    columns = {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}
    return ProbeResult(trajectory=trajectory, columns=columns, active_share=share)


def row(position=9, phase="prompt", layer=0, selector="indexer", k=4, mass=0.5, oracle=0.8, needle=None, visible=None):
    return (position, phase, layer, selector, k, visible or position + 1, mass, oracle, 0.5, 0.1, needle)


def random_probe(seed, layers=3, queries=7):
    draw = random.Random(seed)
    rows = []
    for (position, phase), layer, selector, k in itertools.product(
        [(p, "prompt" if p < 12 else "answer") for p in draw.sample(range(2, 20), queries)],
        range(layers),
        ("indexer", "oracle"),
        (4, 8),
    ):
        oracle = draw.uniform(0.5, 1)
        mass = oracle if selector == "oracle" else oracle * draw.uniform(0.3, 1)
        rows.append(
            (
                position,
                phase,
                layer,
                selector,
                k,
                position + 1,
                mass,
                oracle,
                draw.random(),
                draw.random(),
                draw.random(),
            )
        )
    draw.shuffle(rows)
    return probe(*rows, share=0.75)


def sample(doc_id, recall, *, cluster=None, right=1.0, error=None, variant="sparse", task="niah"):
    return SampleScore(
        variant=variant,
        task=task,
        doc_id=doc_id,
        repeat=0,
        group={},
        cluster=cluster or doc_id,
        doc_hash="d",
        prompt_hash="p",
        headline="exact",
        metrics={} if error else {"exact": right},
        answer="x",
        unparsed=False,
        truncated=False,
        error=error,
        finish_reason="error" if error else "stop",
        prompt_tokens=10,
        completion_tokens=5,
        reasoning_tokens=None,
        answer_tokens=5,
        text="x",
        recall=recall,
    )


def test_trivial_rows_are_counted_and_not_averaged():
    found = summarise(
        probe(row(position=3, mass=1.0, oracle=1.0), row(position=2, mass=1.0, oracle=1.0), row(mass=0.4))
    )
    assert found["trivial"] == 2
    (line,) = found["rows"]
    assert (line["n"], line["mass"], line["mass_share"]) == (1, 0.4, pytest.approx(0.5))


def test_a_query_that_sees_one_key_more_than_k_is_not_trivial():
    assert summarise(probe(row(visible=5)))["trivial"] == 0
    assert summarise(probe(row(visible=4)))["trivial"] == 1


def test_share_of_the_oracle_is_averaged_over_queries_not_a_ratio_of_means():
    found = summarise(probe(row(position=9, mass=0.1, oracle=0.2), row(position=10, mass=0.9, oracle=0.9)))
    assert found["rows"][0]["mass_share"] == pytest.approx((0.5 + 1.0) / 2)


def test_summary_equals_a_plain_loop_over_rows():
    measured = random_probe(5)
    found = summarise(measured)
    rows = list(zip(*(measured.columns[name] for name in COLUMNS), strict=True))
    expected = {}
    for _, phase, layer, selector, k, visible, *values in rows:
        if visible > k:
            expected.setdefault((phase, layer, selector, k), []).append(values)
    assert [(r["phase"], r["layer"], r["selector"], r["k"]) for r in found["rows"]] == sorted(expected)
    for line in found["rows"]:
        members = expected[line["phase"], line["layer"], line["selector"], line["k"]]
        assert line["n"] == len(members)
        for place, name in enumerate(("mass", "oracle_mass", "topk_recall", "output_error", "needle_coverage")):
            assert line[name] == pytest.approx(sum(values[place] for values in members) / len(members))
    assert found["trivial"] == sum(visible <= k for _, _, _, _, k, visible, *_ in rows)


def test_summary_does_not_depend_on_the_order_of_rows_and_survives_json():
    measured = random_probe(6)
    order = list(range(len(measured.columns["k"])))
    random.Random(1).shuffle(order)
    turned = {name: [column[place] for place in order] for name, column in measured.columns.items()}
    found = summarise(measured)
    assert summarise(ProbeResult(trajectory="dense", columns=turned, active_share=0.75)) == found
    assert json.loads(json.dumps(found)) == found


def test_no_needle_gives_no_coverage_instead_of_zero():
    assert summarise(probe(row(), row(position=10)))["rows"][0]["needle_coverage"] is None
    assert summarise(probe(row(needle=0.5), row(position=10, needle=1.0)))["rows"][0]["needle_coverage"] == 0.75


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "saw no query"),
        ((row(mass=float("nan")),), "mass is nan"),
        ((row(mass=1.2, oracle=1.0),), "mass is 1.2"),
        ((row(mass=-0.1),), "mass is -0.1"),
        ((row(mass=0.9, oracle=0.8),), "more mass than the k heaviest"),
        ((row(mass=0.0, oracle=0.0),), "more mass than the k heaviest"),
        ((row(layer=0), row(layer=1), row(layer=1, position=10)), r"layers saw \[1, 2\] queries for indexer, k=4"),
    ],
)
def test_broken_probes_fail_loudly(rows, message):
    with pytest.raises(HarnessError, match=message):
        summarise(probe(*rows))


def test_columns_of_unequal_length_or_missing_are_named():
    columns = dict(probe(row(), row(position=10)).columns)
    with pytest.raises(HarnessError, match="lack the columns topk_recall"):
        summarise(ProbeResult(trajectory="dense", columns={k: v for k, v in columns.items() if k != "topk_recall"}))
    with pytest.raises(HarnessError, match="columns of one length"):
        summarise(ProbeResult(trajectory="dense", columns={**columns, "mass": [0.5]}))


def test_layers_are_averaged_per_query_and_layer():
    found = summarise(probe(row(layer=0, mass=0.2), row(layer=1, mass=0.6)))
    (whole,) = over_layers(found["rows"])
    assert (whole["layer"], whole["n"]) == (None, 1)
    assert whole["mass"] == pytest.approx(0.4)


def test_samples_count_alike_however_many_queries_they_have():
    long = summarise(probe(*(row(position=p, mass=0.2) for p in range(10, 40))))
    short = summarise(probe(row(mass=0.6)))
    whole = aggregate([sample("1", long), sample("2", short)])[0]
    assert (whole["layer"], whole["n"], whole["queries"]) == (None, 2, 31)
    assert whole["mass"] == pytest.approx(0.4)
    assert whole["mass_stderr"] == pytest.approx(stats.sem([0.2, 0.6]))


def test_recall_errors_are_clustered_like_the_scores():
    masses = [0.1, 0.2, 0.4, 0.5, 0.3, 0.6]
    scores = [sample(str(i), summarise(probe(row(mass=m))), cluster="aabbcc"[i]) for i, m in enumerate(masses)]
    # cluster sums of deviations from 0.35: -0.4, 0.2, 0.2
    assert aggregate(scores)[0]["mass_stderr"] == pytest.approx((1.5 * 0.24) ** 0.5 / 6)


def test_table_has_all_layers_first_and_then_each_layer_in_number_order():
    found = summarise(probe(*(row(layer=layer) for layer in (10, 2, 0))))
    assert [line["layer"] for line in aggregate([sample("1", found)])] == [None, 0, 2, 10]


def test_a_sample_without_probes_is_an_error_and_not_left_out_silently():
    good = summarise(probe(row()))
    with pytest.raises(HarnessError, match=r"sparse, niah: 1 of 2 samples carry no probes \(first: doc 2\)"):
        aggregate([sample("1", good), sample("2", None)])
    with pytest.raises(HarnessError, match="2 of 2 samples"):
        aggregate([sample("1", None), sample("2", None)], expected=True)
    assert aggregate([sample("1", None)]) == []


def test_failed_samples_need_no_probes():
    rows = aggregate([sample("1", summarise(probe(row()))), sample("2", None, error="out of memory")], expected=True)
    assert rows[0]["n"] == 1


def test_a_sample_that_lacks_a_layer_is_an_error():
    both = summarise(probe(row(layer=0), row(layer=1)))
    one = summarise(probe(row(layer=0)))
    with pytest.raises(HarnessError, match="docs 1 and 2 were probed in 2 and 1 layers"):
        aggregate([sample("1", both), sample("2", one)])


def test_trajectories_are_never_mixed():
    dense, sparse = summarise(probe(row())), summarise(probe(row(), trajectory="sparse", share=0.5))
    with pytest.raises(HarnessError, match="mix trajectories"):
        aggregate([sample("1", dense), sample("2", sparse)])


def test_samples_whose_rows_are_all_trivial_are_counted_apart():
    active = summarise(probe(row(), row(position=2, mass=1.0, oracle=1.0)))
    trivial = summarise(probe(row(position=2, mass=1.0, oracle=1.0)))
    scores = [sample("1", active), sample("2", trivial)]
    assert aggregate(scores)[0]["n"] == 1
    counted = coverage(scores)
    assert (counted["n"], counted["trivial"], counted["only_trivial"]) == (2, 2, 1)


def test_active_share_is_averaged_and_absent_for_dense():
    shares = [summarise(probe(row(), trajectory="sparse", share=share)) for share in (0.25, 0.75)]
    assert active_share([sample(str(i), s) for i, s in enumerate(shares)]) == {
        "variant": "sparse",
        "task": "niah",
        "mean": 0.5,
        "n": 2,
    }
    assert active_share([sample("1", summarise(probe(row())))]) is None


def test_recall_link_is_scipys_point_biserial():
    draw = random.Random(11)
    masses = [draw.uniform(0.2, 0.8) for _ in range(12)]
    rights = [float(draw.random() < mass) for mass in masses]
    scores = [
        sample(str(i), summarise(probe(row(mass=m, needle=1 - m))), right=r)
        for i, (m, r) in enumerate(zip(masses, rights, strict=True))
    ]
    links = {line["measure"]: line for line in recall_link(scores)}
    expected = stats.pointbiserialr(rights, masses).statistic
    assert links["mass"]["point_biserial"] == pytest.approx(expected)
    assert links["needle_coverage"]["point_biserial"] == pytest.approx(-expected)
    assert links["mass"]["n"] == 12


def test_recall_link_is_undefined_without_spread():
    scores = [sample(str(i), summarise(probe(row(mass=0.1 * (i + 1))))) for i in range(4)]
    assert recall_link(scores)[0]["point_biserial"] is None
    assert correlation([0.1, 0.2], [0.0, 1.0]) is None

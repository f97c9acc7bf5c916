"""Estimates against scipy, published worked examples, enumeration and simulation."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.estimates import (
    clustered_standard_error,
    estimate,
    geometric_ratio,
    majority,
    mean,
    pass_at_k,
    powers_of_two,
    t_interval,
    wilson_interval,
)

scores = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=30)


def test_mean_of_nothing_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="no values"):
        mean([])


def test_standard_error_without_clusters_is_that_of_scipy():
    values = [0.0, 1.0, 1.0, 0.25, 0.5, 1.0, 0.0]
    assert clustered_standard_error(values) == pytest.approx(stats.sem(values), rel=1e-12)


def test_clustered_error_equals_the_hand_computed_one():
    # mean 2/3; cluster sums of deviations -1/3, 2/3, -1/3; sqrt(3/2 * 6/9) / 6 = 1/6
    assert clustered_standard_error([1, 0, 1, 1, 0, 1], list("aabbcc")) == pytest.approx(1 / 6, rel=1e-12)


@given(st.lists(st.tuples(st.floats(0, 1, allow_subnormal=False), st.integers(0, 4)), min_size=2, max_size=25))
def test_clustered_error_equals_millers_sum_over_pairs_in_a_cluster(samples):
    values, clusters = [value for value, _ in samples], [cluster for _, cluster in samples]
    count, n, center = len(set(clusters)), len(values), sum(values) / len(values)
    pairs = sum(
        (values[i] - center) * (values[j] - center)
        for i, j in itertools.product(range(n), repeat=2)
        if clusters[i] == clusters[j]
    )
    found = clustered_standard_error(values, clusters)
    if count < 2:
        assert found is None
    else:
        assert found == pytest.approx(math.sqrt(max(0, count / (count - 1) * pairs)) / n, abs=1e-7)


@given(st.lists(st.tuples(st.floats(0, 1, allow_subnormal=False), st.integers(0, 4)), min_size=2, max_size=25))
def test_copies_inside_their_cluster_add_nothing_and_copies_as_new_clusters_do(samples):
    values, clusters = [value for value, _ in samples], [cluster for _, cluster in samples]
    once = clustered_standard_error(values, clusters)
    if once is None:
        return
    count = len(set(clusters))
    assert clustered_standard_error(values * 2, clusters * 2) == pytest.approx(once, rel=1e-9, abs=1e-12)
    apart = clustered_standard_error(values * 2, clusters + [cluster + 100 for cluster in clusters])
    assert apart == pytest.approx(once * math.sqrt((count - 1) / (2 * count - 1)), rel=1e-9, abs=1e-12)


@given(scores, st.randoms(use_true_random=False))
def test_the_order_of_samples_changes_no_bit(values, shuffler):
    clusters = [index % 3 for index in range(len(values))]
    mixed = list(zip(values, clusters, strict=True))
    shuffler.shuffle(mixed)
    assert estimate(values, clusters) == estimate([value for value, _ in mixed], [cluster for _, cluster in mixed])


def test_one_cluster_has_no_standard_error():
    assert clustered_standard_error([0.0, 1.0, 1.0], ["a", "a", "a"]) is None


def test_spread_by_rounding_counts_as_none():
    values = [0.1 + 0.2, 0.3, 0.1 + 0.2, 0.3, 0.3]
    assert len(set(values)) == 2
    assert clustered_standard_error(values) == 0.0


def test_t_interval_is_that_of_scipy():
    assert t_interval(0.4, 0.05, 9) == pytest.approx(stats.t.interval(0.95, 9, 0.4, 0.05), rel=1e-12)


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_gives_newcombes_published_values(right, trials, low, high):
    assert wilson_interval(right / trials, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_that_of_scipy(case):
    right, trials = case
    expected = stats.binomtest(right, trials).proportion_ci(method="wilson")
    assert wilson_interval(right / trials, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_all_right_gets_wilson_instead_of_certainty():
    found = estimate([1.0] * 400)
    assert (found.mean, found.stderr, found.high, found.interval) == (1.0, 0.0, 1.0, "wilson")
    assert found.low == pytest.approx(stats.binomtest(400, 400).proportion_ci(method="wilson").low)


def test_all_right_in_few_clusters_is_as_unsure_as_that_many_trials():
    found = estimate([1.0] * 400, [index % 4 for index in range(400)])
    assert found.low == pytest.approx(stats.binomtest(4, 4).proportion_ci(method="wilson").low)


def test_interval_kind_follows_scores_and_clusters():
    few, many = [0.0, 1.0] * 20, [0.0, 1.0] * 60
    pairs = [index // 3 for index in range(120)]
    assert estimate(few).interval == "wilson"
    assert estimate(many).interval == "t"
    assert estimate(many, needle_cell=True).interval == "wilson"
    assert estimate(many, pairs).interval == "clustered t"
    assert estimate([0.25, 0.5, 1.0]).interval == "t"
    assert estimate([3.5]).interval is None


def test_clustered_interval_uses_clusters_minus_one_degrees_of_freedom():
    values, clusters = [0.1, 0.2, 0.4, 0.5, 0.3, 0.6], list("aabbcc")
    found = estimate(values, clusters)
    expected = stats.t.interval(0.95, 2, np.mean(values), found.stderr)
    assert (found.low, found.high) == pytest.approx((max(0, expected[0]), min(1, expected[1])))
    assert (found.n, found.clusters) == (6, 3)


def test_scores_in_0_1_have_intervals_in_0_1_and_others_are_not_cut():
    assert estimate([0.0, 0.0, 0.5]).low == 0.0
    assert estimate([0.0, 0.0, 5.0]).low < 0


def test_clustered_interval_covers_at_95_percent_where_the_naive_one_does_not():
    draw, trials, hits, naive_hits = np.random.default_rng(7), 800, 0, 0
    clusters = [index // 5 for index in range(150)]
    for _ in range(trials):
        values = (np.repeat(draw.normal(2, 1, 30), 5) + draw.normal(0, 0.5, 150)).tolist()
        found, naive = estimate(values, clusters), estimate(values)
        hits += found.low <= 2 <= found.high
        naive_hits += naive.low <= 2 <= naive.high
    assert stats.binomtest(hits, trials, 0.95).pvalue > 0.001
    assert stats.binomtest(naive_hits, trials, 0.95).pvalue < 1e-6


@pytest.mark.parametrize("tries", range(1, 8))
def test_pass_at_k_equals_the_share_of_lucky_subsets(tries):
    for right, k in itertools.product(range(tries + 1), range(1, tries + 1)):
        outcomes = [index < right for index in range(tries)]
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(tries, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_1_is_the_mean_even_for_huge_counts():
    assert pass_at_k(100_000, 12_345, 1) == pytest.approx(0.12345, rel=1e-12)


def test_pass_at_k_refuses_more_tries_than_there_were():
    with pytest.raises(ValueError, match="n=3, c=1, k=4"):
        pass_at_k(3, 1, 4)


def test_powers_of_two_stop_at_the_limit():
    assert [powers_of_two(limit) for limit in (1, 2, 3, 4, 64)] == [
        [1],
        [1, 2],
        [1, 2],
        [1, 2, 4],
        [1, 2, 4, 8, 16, 32, 64],
    ]


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9), st.sampled_from(["a", "b", "c"]))
def test_majority_is_the_chance_of_the_right_answer_under_random_tie_breaks(answers, gold):
    counts = {answer: answers.count(answer) for answer in "abc" if answer in answers}
    winners = [answer for answer in counts if counts[answer] == max(counts.values())]
    expected = sum(winner == gold for winner in winners) / len(winners) if winners else 0.0
    assert majority(answers, [float(answer == gold) for answer in answers]) == pytest.approx(expected)


def test_unparsed_tries_do_not_vote():
    assert majority([None, None, None, "7"], [0.0, 0.0, 0.0, 1.0]) == 1.0
    assert majority([None, None], [0.0, 0.0]) == 0.0


def test_geometric_ratio_is_a_t_interval_on_logs():
    draw = random.Random(3)
    base = [draw.randint(20, 4000) for _ in range(25)]
    ours = [max(1, round(count * draw.lognormvariate(0.2, 0.5))) for count in base]
    found = geometric_ratio(ours, base)
    logs = np.log(np.array(ours) / np.array(base))
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(stats.gmean(np.array(ours) / np.array(base)))
    assert (found.low, found.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))


def test_geometric_ratio_of_one_pair_has_no_interval():
    found = geometric_ratio([200], [100])
    assert found.mean == pytest.approx(2.0)
    assert (found.stderr, found.low, found.high, found.interval) == (None, None, None, None)

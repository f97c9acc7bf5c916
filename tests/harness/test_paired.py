"""The paired tests against scipy, enumeration of all outcomes, numerical likelihoods and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from harness.adjust import benjamini_hochberg, holm
from harness.exact import constant_interval, constant_tests, exact_mcnemar, loss_bound, sign_bound, tango_upper
from harness.paired import paired, poolable, pooled
from harness.verdict import sentence

outcomes = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 6)),
    min_size=2,
    max_size=30,
)


def counted(variant_only, baseline_only, n, margin=0.02, right=None):
    """Independent 0/1 answers with these discordant counts; the others are right on both sides, or `right` of them."""
    both = n - variant_only - baseline_only
    shared = [1.0] * (both if right is None else right) + [0.0] * (0 if right is None else both - right)
    ours = [1.0] * variant_only + [0.0] * baseline_only + shared
    theirs = [0.0] * variant_only + [1.0] * baseline_only + shared
    return paired(ours, theirs, range(n), margin=margin)


def said(result, **options):
    return sentence(result, variant="sparse", baseline="dense", where="niah", **options)


@pytest.mark.parametrize("total", range(9))
def test_mcnemar_is_the_share_of_sign_patterns_at_least_as_lopsided(total):
    for wins in range(total + 1):
        patterns = list(itertools.product((-1, 1), repeat=total))
        extreme = sum(abs(sum(pattern)) >= abs(2 * wins - total) for pattern in patterns)
        assert exact_mcnemar(wins, total - wins) == pytest.approx(extreme / len(patterns), abs=1e-15)


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (59, 6), (121, 59), (400, 460), (3000, 2900)])
def test_mcnemar_is_scipys_binomial_test(wins, losses):
    assert exact_mcnemar(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)


@pytest.mark.parametrize(("wins", "losses", "n"), [(0, 0, 50), (3, 1, 60), (0, 4, 80), (9, 12, 200), (20, 0, 40)])
@pytest.mark.parametrize("shift", [-0.3, -0.05, -0.02])
def test_tango_uses_the_most_likely_chances_under_the_shift(wins, losses, n, shift):
    def loss(chance):  # chance that only the baseline is right; only the variant: chance + shift
        cells = (wins, chance + shift), (losses, chance), (n - wins - losses, 1 - 2 * chance - shift)
        return -sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

    chance = optimize.minimize_scalar(
        loss, bounds=(-shift, (1 - shift) / 2), method="bounded", options={"xatol": 1e-12}
    ).x
    z = (wins - losses - n * shift) / math.sqrt(n * (2 * chance + shift - shift * shift))
    assert tango_upper(wins, losses, n, shift) == pytest.approx(stats.norm.sf(z), abs=1e-4)


def test_difference_error_and_interval_are_scipys_paired_t():
    draw = np.random.default_rng(1)
    ours, theirs = draw.random(40), draw.random(40)
    found = paired(ours.tolist(), theirs.tolist(), range(40), margin=0.1, single=False)
    reference = stats.ttest_rel(ours, theirs)
    interval = reference.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, reference.pvalue))
    one_sided = [
        stats.ttest_1samp(ours - theirs, -0.1, alternative="greater").pvalue,
        stats.ttest_1samp(ours - theirs, 0.1, alternative="less").pvalue,
    ]
    assert found.tost_p == pytest.approx(max(one_sided))
    assert found.noninferior_p == pytest.approx(one_sided[0])
    assert found.mcnemar_p is None


def test_discordant_error_is_the_closed_form_of_mcnemars_table():
    found = counted(30, 50, 1000)
    # sqrt(b + c - (c - b)^2 / n) / n, times sqrt(n / (n - 1)) for the sample variance
    expected = math.sqrt(80 - 400 / 1000) / 1000 * math.sqrt(1000 / 999)
    assert (found.difference, found.stderr) == (pytest.approx(-0.02), pytest.approx(expected))
    assert (found.variant_only, found.baseline_only, found.mcnemar_p) == (30, 50, exact_mcnemar(30, 50))


def test_clusters_widen_the_error_of_the_difference():
    ours, theirs, clusters = [0.0] * 6 + [1.0] * 54, [1.0] * 60, [index // 6 for index in range(60)]
    together, apart = (paired(ours, theirs, ids, margin=0.02) for ids in (clusters, range(60)))
    # deviations from -0.1 summed by cluster: -5.4 once, 0.6 nine times
    assert together.stderr == pytest.approx(math.sqrt(10 / 9 * (5.4**2 + 9 * 0.6**2)) / 60)
    assert together.stderr > 2 * apart.stderr
    assert (together.clusters, together.interval) == (10, "clustered t")


@given(outcomes, st.sampled_from([0.02, 0.1, 0.3]))
def test_swapping_the_variants_mirrors_every_number(samples, margin):
    ours, theirs, clusters = map(list, zip(*samples, strict=True))
    found, mirror = paired(ours, theirs, clusters, margin=margin), paired(theirs, ours, clusters, margin=margin)
    assert mirror.difference == -found.difference
    assert mirror.stderr == found.stderr
    assert (mirror.variant_only, mirror.baseline_only) == (found.baseline_only, found.variant_only)
    assert (mirror.p, mirror.mcnemar_p) == (found.p, found.mcnemar_p)
    assert mirror.tost_p == found.tost_p
    if found.low is None:
        assert mirror.low is None
    else:
        assert (mirror.low, mirror.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


@given(outcomes, st.sampled_from([0.02, 0.1, 0.3]))
def test_verdicts_never_contradict_the_numbers_beside_them(samples, margin):
    found = paired(*map(list, zip(*samples, strict=True)), margin=margin)
    if "EQUIVALENT" in found.verdict or found.verdict == "DIFFERENT, WITHIN MARGIN":
        assert abs(found.difference) < margin and found.tost_p <= 0.05
    if found.verdict.startswith("DIFFERENT"):
        assert found.low > 0 or found.high < 0
        assert found.p <= 0.05
    if found.verdict == "INCONCLUSIVE" and found.n_needed is not None:
        assert found.n_needed > found.n
    assert (found.n_needed is not None) <= (found.verdict == "INCONCLUSIVE")


def test_identical_answers_are_not_proof_of_equivalence_by_themselves():
    few = counted(0, 0, 60, right=30)
    assert (few.stderr, few.verdict, few.mcnemar_p, few.interval) == (0.0, "INCONCLUSIVE", 1.0, "exact bound")
    # the bound is where no discordant pair in 60 has a chance of 5 %
    assert stats.binom.pmf(0, 60, few.high) == pytest.approx(0.05)
    assert few.low == -few.high
    assert few.tost_p == pytest.approx(0.98**60)
    assert few.n_needed == 149
    assert counted(0, 0, 148, right=60).verdict == "INCONCLUSIVE"
    assert counted(0, 0, 149, right=60).verdict == "EQUIVALENT"
    assert "exact bound" in said(few) and "149 samples" in said(few)


def test_identical_answers_in_few_contexts_count_as_few():
    ours = [float(index % 2) for index in range(400)]
    found = paired(ours, ours, [index // 40 for index in range(400)], margin=0.02)
    assert (found.clusters, found.verdict, found.n_needed) == (10, "INCONCLUSIVE", math.ceil(148.28 * 40))
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 10))


@pytest.mark.parametrize("difference", [-1.0, -0.25, 0.0, 0.01, 0.5])
@pytest.mark.parametrize("clusters", [5, 40])
def test_bounds_and_tests_of_a_constant_difference_agree(difference, clusters):
    low, high = constant_interval(difference, clusters, 0.05)
    assert -1 <= low <= difference <= high <= 1
    if 0 < high < 1:
        assert constant_tests(difference, clusters, high)[1] == pytest.approx(0.05)
    if -1 < low < 0:
        assert constant_tests(difference, clusters, -low)[0] == pytest.approx(0.05)


def test_sign_bound_is_a_binomial_tail():
    assert sign_bound(3, 70, 0.1) == pytest.approx(stats.binom.cdf(3, 70, 0.1))


@pytest.mark.parametrize("loss", [0.05, 0.2, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("clusters", [40, 200])
def test_no_two_point_loss_of_the_margin_passes_the_loss_bound_more_often_than_it_may(clusters, loss):
    # losses of one size, just so many that the mean is the margin: the chance that the bound says otherwise, exactly
    margin, counts = 0.03, range(clusters + 1)
    chances = stats.binom.pmf(counts, clusters, margin / loss)
    found = [loss_bound([loss] * count + [0.0] * (clusters - count), margin) for count in counts]
    for level in (0.01, 0.05, 0.3):
        assert sum(chance for chance, p in zip(chances, found, strict=True) if p <= level) <= level


def test_loss_bound_is_hoeffdings_and_without_losses_the_sign_bound():
    near, far = stats.bernoulli(0.005), stats.bernoulli(0.03)
    distance = stats.entropy(near.pmf([0, 1]), far.pmf([0, 1]))
    assert loss_bound([0.5, 0.5, *[0.0] * 198], 0.03) == pytest.approx(math.exp(-200 * distance))
    assert loss_bound([0.0] * 70, 0.1) == pytest.approx(sign_bound(0, 70, 0.1))
    assert loss_bound([0.1, 0.5], 0.3) == 1.0


def test_a_few_losses_of_a_part_of_the_answer_do_not_count_as_whole_answers():
    part, whole = [0.75] * 4 + [1.0] * 196, [0.0] * 4 + [1.0] * 196
    graded = paired(part, [1.0] * 200, range(200), margin=0.03)
    clustered = paired(whole, [1.0] * 200, [f"book {i}" for i in range(200)], margin=0.03, single=False)
    assert graded.tost_p == pytest.approx(loss_bound([0.25] * 4 + [0.0] * 196, 0.03))
    assert graded.tost_p < 0.05 < clustered.tost_p
    assert clustered.tost_p == pytest.approx(sign_bound(4, 200, 0.03))


def test_one_discordant_sample_proves_nothing_that_none_would_not():
    # t alone calls this equivalent: (0.02 - 1/140) * 140 = 1.8
    one = counted(0, 1, 140, right=70)
    assert stats.t.sf((one.difference + 0.02) / one.stderr, 139) < 0.05
    assert (one.verdict, one.tost_p > counted(0, 0, 140, right=70).tost_p) == ("INCONCLUSIVE", True)
    assert "exact tests do not agree" in said(one)


def test_four_discordant_samples_are_not_called_a_difference():
    found = counted(0, 4, 50, right=30)
    assert found.high < 0
    assert (found.p, found.verdict) == (0.125, "INCONCLUSIVE")
    assert "leaves out zero" in said(found)
    clustered = paired([0.0] * 4 + [1.0] * 46, [1.0] * 50, [i // 2 if i > 3 else i for i in range(50)], margin=0.02)
    assert (clustered.high < 0, clustered.p, clustered.verdict) == (True, 0.125, "INCONCLUSIVE")


@pytest.mark.parametrize(
    ("n", "margin", "gain"),
    [(140, 0.02, 0.0), (150, 0.02, 0.0), (140, 0.02, 0.01), (100, 0.05, 0.0), (80, 0.05, 0.02), (60, 0.1, 0.05)],
)
def test_equivalence_is_wrongly_claimed_in_about_5_percent_at_the_margin(n, margin, gain):
    """All outcomes enumerated where the true loss is just the margin; t alone would reach 10 to 23 % for some."""
    loss, claimed = gain + margin, 0.0
    for wins in range(int(stats.binom.ppf(1 - 1e-5, n, gain)) + 1):
        for losses in range(int(stats.binom.ppf(1 - 1e-5, n, loss)) + 1):
            chance = stats.multinomial.pmf([wins, losses, n - wins - losses], n, [gain, loss, 1 - gain - loss])
            claimed += chance * (counted(wins, losses, n, margin).noninferior_p <= 0.05)
    assert claimed < 0.06


def test_equivalence_of_clustered_repeats_is_wrongly_claimed_in_5_percent_at_the_margin():
    draw, trials, claimed = np.random.default_rng(5), 1000, 0
    clusters = [index // 4 for index in range(120)]
    for _ in range(trials):
        shift = np.repeat(draw.normal(0, 0.05, 30), 4) + draw.normal(0, 0.05, 120)
        baseline = np.full(120, 0.5)
        found = paired((baseline - 0.05 + shift).tolist(), baseline.tolist(), clusters, margin=0.05, single=False)
        claimed += found.tost_p <= 0.05
    assert stats.binomtest(claimed, trials, 0.05).pvalue > 0.001


def test_interval_of_the_difference_covers_at_95_percent():
    draw, trials, hits = np.random.default_rng(6), 1000, 0
    for _ in range(trials):
        kind = draw.choice(3, size=150, p=[0.12, 0.2, 0.68])
        found = counted(int((kind == 0).sum()), int((kind == 1).sum()), 150)
        hits += found.low <= -0.08 <= found.high
    assert stats.binomtest(hits, trials, 0.95).pvalue > 0.001


def power_at(n, discordance, margin, trials=500):
    draw, shown = np.random.default_rng(8), 0
    for _ in range(trials):
        kind = draw.choice(3, size=n, p=[discordance / 2, discordance / 2, 1 - discordance])
        shown += counted(int((kind == 0).sum()), int((kind == 1).sum()), n, margin).tost_p <= 0.05
    return shown / trials


def test_an_interval_of_shares_ends_where_shares_do():
    few = counted(0, 8, 10)
    assert few.low == -1.0 and few.high is not None and -0.8 < few.high < 0
    scores = paired([0.0, 5.0, 9.0], [9.0, 6.0, 9.0], range(3), margin=0.1)
    assert scores.low is not None and scores.low < -1
    assert pooled([few, few], margin=0.1).low == pytest.approx(-1.0, abs=0.1)


def test_the_n_needed_gives_80_percent_power():
    many, few = counted(5, 5, 40, margin=0.1, right=15), counted(1, 1, 60, margin=0.05, right=30)
    assert (many.verdict, few.verdict) == ("INCONCLUSIVE", "INCONCLUSIVE")
    assert power_at(many.n_needed, 0.25, 0.1) == pytest.approx(0.8, abs=0.08)
    assert 0.75 < power_at(few.n_needed, 1 / 30, 0.05) < 0.9


def test_the_n_needed_of_fractional_scores_is_the_textbook_formula():
    ours = [0.5 + (0.1 if index % 2 else -0.1) for index in range(40)]
    found = paired(ours, [0.5] * 40, range(40), margin=0.02, single=False)
    # 8.56 * Var(d) / margin^2 with alpha 0.05 and power 0.8
    assert found.n_needed == pytest.approx(8.564 * 0.01 * 40 / 39 / 0.0004, abs=1)


def test_the_n_needed_near_the_margin_takes_the_observed_difference_as_true():
    found = paired([0.5 + step - 0.04 for step in (0.1, -0.1) * 8], [0.5] * 16, range(16), margin=0.08, single=False)
    variance, z = 0.01 * 16 / 15, stats.norm.ppf
    assert 8.564 * variance / 0.08**2 < 16  # a true difference of zero would have been shown
    to_differ = (z(0.975) + z(0.8)) ** 2 * variance / 0.04**2
    to_be_close = (z(0.95) + z(0.8)) ** 2 * variance / (0.08 - 0.04) ** 2
    assert (found.verdict, found.n_needed) == ("INCONCLUSIVE", math.ceil(min(to_differ, to_be_close)))
    assert "If the true difference is this one, about 42 samples would be conclusive." in said(found)


def test_the_n_needed_brings_enough_clusters_that_differ():
    crowded = paired([0.0, 1.0] * 20, [0.0, 1.0] * 19 + [0.0, 0.98], [i // 2 for i in range(40)], margin=0.02)
    assert (crowded.verdict, crowded.n_needed) == ("INCONCLUSIVE", 400)
    assert "If there is no true difference, about 400 samples would show equivalence." in said(crowded)


def test_every_verdict_has_its_case():
    cases = {
        "EQUIVALENT": counted(40, 40, 10_000, right=5000),
        "DIFFERENT": counted(10, 60, 500, right=300),
        "DIFFERENT, WITHIN MARGIN": counted(20, 60, 10_000, right=5000),
        "NON-INFERIOR": counted(14, 6, 200, margin=0.02, right=100),
        "SATURATED": counted(1, 2, 1000, margin=0.02),
        "INCONCLUSIVE": counted(3, 5, 60, right=30),
    }
    assert {name: result.verdict for name, result in cases.items()} == {name: name for name in cases}


def test_floor_is_saturated_as_well_as_ceiling_but_a_shown_difference_is_not():
    assert counted(0, 0, 30, right=0).verdict == "SATURATED"
    assert "at most 1 % right" in said(counted(0, 0, 30, right=0))
    assert "at least 99 % right" in said(counted(0, 0, 300))
    # 99.90 % against 99.05 %
    assert counted(95, 10, 10_000).verdict == "DIFFERENT, WITHIN MARGIN"


def test_one_cluster_and_no_question_leave_nothing_to_test():
    alone = paired([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], ["a"] * 3, margin=0.02)
    assert (alone.verdict, alone.stderr, alone.low, alone.tost_p, alone.n_needed) == (
        "INCONCLUSIVE",
        None,
        None,
        None,
        None,
    )
    assert "share one cluster" in said(alone)
    empty = paired([], [], [], margin=0.02)
    assert (empty.n, empty.difference, empty.mean_variant, empty.mcnemar_p) == (0, None, None, None)
    assert said(empty, num_unpaired=2) == (
        "niah: no sample was answered by both sparse and dense; nothing can be compared. "
        "Left out: 2 samples failed or missing on one side."
    )


def test_constant_scores_outside_0_1_get_no_bound():
    found = paired([5.0, 5.0], [5.0, 5.0], range(2), margin=0.02)
    assert (found.stderr, found.low, found.tost_p, found.verdict) == (0.0, None, None, "INCONCLUSIVE")


def test_a_sentence_gives_its_numbers_in_points():
    assert said(counted(10, 60, 500, right=300)) == (
        "sparse is worse than dense on niah: difference -10.0 points, 95 % interval -13.2 to -6.8, 500 samples, "
        "10 better and 60 worse, McNemar p = 8e-10."
    )


def test_a_sentence_warns_where_the_number_of_comparisons_could_explain_it():
    found = counted(10, 24, 500, right=300)
    assert found.verdict == "DIFFERENT"
    assert "adjusted p = 0.12" in said(found, adjusted_p=0.12)
    assert "adjusted" not in said(found, adjusted_p=0.04)


def test_pool_weighs_tasks_alike_and_adds_their_errors():
    parts = [counted(10, 30, 400, right=200), counted(6, 4, 100, right=50)]
    found = pooled(parts, margin=0.02)
    assert found.difference == pytest.approx((-0.05 + 0.02) / 2)
    assert found.stderr == pytest.approx(math.hypot(parts[0].stderr, parts[1].stderr) / 2)
    # two tasks of equal weight are Welch's case, up to a factor of two and the sign of one
    spreads = [part.stderr * math.sqrt(part.n) for part in parts]
    welch = stats.ttest_ind_from_stats(-0.05, spreads[0], 400, -0.02, spreads[1], 100, equal_var=False)
    assert found.p == pytest.approx(welch.pvalue)
    assert (found.n, found.variant_only, found.baseline_only) == (500, 16, 34)


def test_tasks_without_a_difference_do_not_shrink_the_error_to_nothing():
    parts = [counted(0, 0, 50, right=20), counted(0, 0, 50, right=20)]
    found = pooled(parts, margin=0.02)
    assert found.stderr == pytest.approx(math.sqrt(2) / 50 / 2)
    assert found.verdict == "INCONCLUSIVE"
    assert [poolable(part) for part in (parts[0], counted(0, 0, 50), paired([1.0], [0.0], ["a"], margin=0.02))] == [
        True,
        False,
        False,
    ]


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=7))
def test_holm_rejects_what_closed_testing_with_bonferroni_rejects(p_values):
    adjusted = holm(p_values)
    places = range(len(p_values))
    for place in places:
        families = [family for size in places for family in itertools.combinations(places, size + 1) if place in family]
        closed = max(min(1.0, len(family) * min(p_values[i] for i in family)) for family in families)
        assert adjusted[place] == pytest.approx(closed)


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=12))
def test_benjamini_hochberg_is_scipys(p_values):
    assert benjamini_hochberg(p_values) == pytest.approx(stats.false_discovery_control(p_values).tolist())

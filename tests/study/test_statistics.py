"""The comparison's statistics against scipy, closed forms and symmetries."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from alp.measures.tail import hill
from alp.study.statistics import (
    area,
    bootstrap_interval,
    effect_size,
    has_collapsed,
    holm,
    mean_sd,
    paired,
    sign_flip_test,
    spikes,
    t_interval,
    t_test,
)

DIFFERENCES = np.array([0.021, -0.004, 0.033, 0.012, 0.008])
numbers = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
samples = st.lists(numbers, min_size=2, max_size=9)


def test_mean_and_sd_are_the_sample_ones() -> None:
    assert mean_sd([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7.0)))
    assert mean_sd([4.0])[0] == 4.0 and math.isnan(mean_sd([4.0])[1])
    assert all(map(math.isnan, mean_sd([])))


def test_the_t_test_and_its_interval_are_scipys() -> None:
    expected = stats.ttest_1samp(DIFFERENCES, 0.0)
    assert t_test(DIFFERENCES) == pytest.approx(expected.pvalue, rel=1e-10)
    assert t_interval(DIFFERENCES) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-10)
    a, b = np.random.default_rng(0).normal(size=(2, 12))
    assert t_test(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-10)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_the_exact_sign_flip_test_is_scipys(n: int) -> None:
    d = np.random.default_rng(n).normal(0.3, 1, n)
    expected = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(d) == pytest.approx(expected.pvalue)


def test_many_pairs_are_flipped_at_random_near_the_t_test() -> None:
    d = np.random.default_rng(1).normal(0.35, 1, 40)
    assert sign_flip_test(d) == pytest.approx(stats.ttest_1samp(d, 0.0).pvalue, abs=0.015)


def test_five_seeds_cannot_go_below_one_in_sixteen() -> None:
    assert sign_flip_test([5.0, 4.0, 3.0, 2.0, 1.0]) == 1 / 16
    assert sign_flip_test([1.0] * 8) == 2 / 256


def test_the_bootstrap_interval_is_scipys_at_the_expanded_level() -> None:
    n = 12
    d = np.random.default_rng(2).exponential(size=n)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    expected = stats.bootstrap(
        (d,), np.mean, confidence_level=1 - 2 * tail, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    # so far in the tail, a quantile of 10000 resamples has an error of about 0.05 standard deviations of the mean
    assert bootstrap_interval(d) == pytest.approx(tuple(expected), abs=0.12 * d.std() / math.sqrt(n))


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = {5: 0, 10: 0}
    for n in covered:
        for _ in range(600):
            low, high = bootstrap_interval(rng.normal(1.0, 1.0, n))
            covered[n] += low <= 1.0 <= high
    # with five pairs, the interval cannot pass the extremes: it covers at most 1 - 2 / 2^5 = 0.9375; binomial sd 0.01
    assert 0.90 < covered[5] / 600 < 0.965
    assert 0.92 < covered[10] / 600 < 0.98


def test_the_effect_is_hedges_corrected_d_z() -> None:
    n = len(DIFFERENCES)
    d_z = DIFFERENCES.mean() / DIFFERENCES.std(ddof=1)
    exact = math.gamma((n - 1) / 2) / (math.sqrt((n - 1) / 2) * math.gamma((n - 2) / 2))
    assert effect_size(DIFFERENCES) == pytest.approx(exact * d_z)
    assert exact == pytest.approx(1 - 3 / (4 * (n - 1) - 1), abs=0.01)
    assert effect_size([0.2] * 4) == math.inf and effect_size([-0.2] * 4) == -math.inf
    assert effect_size([0.0] * 4) == 0.0


def test_equal_differences_have_no_t_test() -> None:
    assert math.isnan(t_test([0.1, 0.1, 0.1])) and t_test([0.0, 0.0]) == 1.0


def test_one_pair_or_none_has_no_test() -> None:
    one = paired([0.3])
    assert one.n == 1 and one.mean == 0.3
    assert all(math.isnan(v) for v in (one.low, one.high, one.t_low, one.p_t, one.p_flip, one.effect))
    assert paired([]).n == 0 and math.isnan(paired([]).mean)


@given(samples)
def test_swapping_the_arms_flips_every_sign_and_no_p(d: list[float]) -> None:
    here, there = paired(d), paired([-x for x in d])
    assert (there.mean, there.low, there.high) == pytest.approx((-here.mean, -here.high, -here.low), abs=1e-12)
    assert (there.t_low, there.t_high) == pytest.approx((-here.t_high, -here.t_low), abs=1e-9, nan_ok=True)
    assert there.effect == pytest.approx(-here.effect, nan_ok=True)
    assert there.p_flip == here.p_flip and there.p_t == pytest.approx(here.p_t, nan_ok=True)


@given(samples)
def test_intervals_hold_the_mean_and_p_values_are_probabilities(d: list[float]) -> None:
    p = paired(d)
    slack = 1e-9 * max(map(abs, d), default=0.0)
    assert min(d) - slack <= p.low <= p.mean + slack and p.mean - slack <= p.high <= max(d) + slack
    assert 2 / 2 ** len(d) <= p.p_flip <= 1
    assert math.isnan(p.p_t) or 0 <= p.p_t <= 1


# ------------------------------------------------------------------ Holm


def test_holm_on_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.02, math.nan, 0.03])
    assert corrected[0] == corrected[2] == pytest.approx(0.04) and math.isnan(corrected[1])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_lies_between_no_correction_and_bonferroni(p: list[float]) -> None:
    corrected = holm(p)
    for raw, value in zip(p, corrected, strict=True):
        assert raw <= value <= min(1.0, raw * len(p)) + 1e-12
    order = sorted(range(len(p)), key=p.__getitem__)
    assert all(corrected[a] <= corrected[b] for a, b in pairwise(order))
    assert sorted(holm(p[::-1])) == sorted(corrected)


# ------------------------------------------------------------------ series and tails


def test_area_is_an_average_over_uneven_steps() -> None:
    assert area([0, 1, 4], [2.0, 2.0, 2.0]) == 2.0
    assert area([0, 2, 4], [0.0, 1.0, 2.0]) == 1.0
    assert area([1, 2, 10], [0.0, 1.0, 1.0]) == pytest.approx(8.5 / 9)
    assert area([7], [0.3]) == 0.3 and math.isnan(area([], []))


@pytest.mark.parametrize("index", [1.5, 3.0])
def test_hill_finds_the_index_of_a_pareto_tail(index: float) -> None:
    x = stats.pareto.rvs(index, size=20_000, random_state=4)
    k = 2000
    assert hill(x, k) == pytest.approx(index, rel=4 / math.sqrt(k))  # its sd is index / sqrt(k)
    assert hill(7 * x, k) == pytest.approx(hill(x, k))


def test_hill_by_hand_and_where_it_has_no_answer() -> None:
    assert hill([math.e, 1.0, math.e**3], 2) == pytest.approx(1 / 2)
    for values, k in (([1.0, 2.0], 2), ([1.0, 1.0, 1.0], 2), ([-1.0, 0.0, 3.0], 2), ([1.0, 2.0], 0)):
        assert math.isnan(hill(values, k))


def test_a_jump_is_one_spike_and_says_how_high() -> None:
    flat = [0.02] * 10
    assert spikes(flat) == []
    assert spikes([*flat, 0.3, *flat]) == pytest.approx([0.28])
    assert spikes([*flat, 0.3, 0.5, *flat]) == pytest.approx([0.48])
    assert spikes([*flat, 0.3, *flat, 0.1, *flat]) == pytest.approx([0.28, 0.08])


def test_small_slow_or_early_rises_are_no_spikes() -> None:
    assert spikes([1e-4] * 8 + [5e-3]) == [], "fifty times, but below the floor"
    assert spikes([0.1] * 8 + [0.19]) == [], "above the floor, but not twice"
    assert spikes([0.01 * 1.1**t for t in range(60)]) == [], "a steady rise"
    assert spikes([0.0, 0.0, 0.0, 0.9]) == [], "fewer than five steps before it"
    ramp = [0.02 * t * t for t in range(12)] + [2.4] * 10
    assert spikes(ramp) != [] and spikes(ramp, start=12) == []


def test_a_jump_to_a_new_level_counts_once() -> None:
    assert spikes([0.02] * 10 + [0.3] * 10) == pytest.approx([0.28])


def test_collapse_is_below_half_of_a_best_worth_the_name() -> None:
    assert has_collapsed([0.1, 0.8, 0.39])
    assert not has_collapsed([0.1, 0.8, 0.41])
    assert not has_collapsed([0.04, 0.0]), "nothing to lose"
    assert not has_collapsed([0.3]) and not has_collapsed([])

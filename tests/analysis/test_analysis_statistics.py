import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from lorax.analysis.statistics import anova, has_spread, summarize, welch_interval

scores = st.floats(0.0, 1.0, allow_nan=False, width=32)
samples = st.lists(scores, min_size=2, max_size=12)


@given(samples)
def test_summary_agrees_with_scipy(values):
    summary = summarize(values)
    assert summary.n == len(values)
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.median == pytest.approx(np.median(values))
    if np.ptp(values) > 1e-3:
        low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert summary.std == pytest.approx(stats.tstd(values))
        assert (summary.low, summary.high) == pytest.approx((low, high))


@pytest.mark.filterwarnings("ignore:Precision loss")
@given(samples, samples)
def test_welch_agrees_with_scipy(a, b):
    low, high = welch_interval(a, b)
    if max(np.ptp(a), np.ptp(b)) > 1e-3:
        expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)


@given(samples, samples)
def test_welch_is_antisymmetric_and_holds_the_difference(a, b):
    assume(has_spread(a) or has_spread(b))
    low, high = welch_interval(a, b)
    assert low - 1e-12 <= np.mean(a) - np.mean(b) <= high + 1e-12
    assert welch_interval(b, a) == pytest.approx((-high, -low))


@given(samples, st.floats(-5, 5))
def test_interval_moves_with_the_sample(values, shift):
    shifted = [value + shift for value in values]
    assume(has_spread(values) and has_spread(shifted))
    a, b = summarize(values), summarize(shifted)
    assert b.low - a.low == pytest.approx(shift, abs=1e-6)
    assert b.high - b.low == pytest.approx(a.high - a.low, abs=1e-6)


def test_coverage():
    rng = np.random.default_rng(0)
    summaries = [summarize(rng.normal(0.8, 0.02, 5)) for _ in range(2000)]
    assert np.mean([s.low <= 0.8 <= s.high for s in summaries]) == pytest.approx(0.95, abs=0.015)


def test_one_value_has_no_interval():
    summary = summarize([0.5])
    assert (summary.n, summary.mean, summary.median) == (1, 0.5, 0.5)
    assert math.isnan(summary.std) and math.isnan(summary.low) and math.isnan(summary.high)
    assert all(map(math.isnan, welch_interval([0.5], [0.1, 0.2])))


def test_empty_sample():
    assert summarize([]).n == 0
    assert math.isnan(summarize([]).mean)


@given(scores, st.integers(2, 12), scores, st.integers(2, 12))
def test_without_spread_there_is_no_interval_and_no_test(x, n, y, m):
    """Also where rounding makes the variance of equal values a little more than 0."""
    a, b = [x] * n, [y / 3] * m
    summary = summarize(a)
    assert summary.std == 0.0 and summary.mean == pytest.approx(x)
    assert math.isnan(summary.low) and math.isnan(summary.high)
    assert all(map(math.isnan, welch_interval(a, b)))
    assert anova([a, b]) is None


def test_a_small_spread_is_one():
    assert welch_interval([1e-150, 2e-150], [0.0, 0.0])[0] < 0
    low, high = welch_interval([0.1, 0.1, 0.1], [0.2, 0.3])  # one side varies: Student's interval
    expected = stats.ttest_1samp([0.2, 0.3], 0.1).confidence_interval(0.95)
    assert (0.1 - low, 0.1 - high) == pytest.approx((expected.high, expected.low))


def test_anova_with_two_groups_is_the_t_test():
    a, b = [0.80, 0.82, 0.81], [0.84, 0.85, 0.83, 0.86]
    test = anova([a, b, [0.9]])
    assert test is not None
    t = stats.ttest_ind(a, b)
    assert test.statistic == pytest.approx(t.statistic**2)
    assert test.p == pytest.approx(t.pvalue)
    assert (test.between, test.within) == (1, 5)


def test_anova_needs_spread_and_groups():
    assert anova([[0.5, 0.5], [0.6, 0.6]]) is None
    assert anova([[0.5, 0.6]]) is None

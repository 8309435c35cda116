"""What a few seeds say about a ratio or a difference."""

import math

import numpy as np
import pytest

from glai_lightning.comparison.statistics import mean_interval, signed_rank_p, speedup, student_interval


def test_an_interval_holds_the_mean_and_lies_within_the_values():
    values = [0.1, 0.4, 0.2, 0.9, 0.3]
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(np.mean(values))
    assert min(values) < interval.low < interval.mean < interval.high < max(values)


def test_an_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    interval = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_an_interval_of_five_values_misses_the_mean_about_as_often_as_documented():
    draws = np.random.default_rng(1).normal(size=(200, 5))
    misses = sum(not i.low <= 0 <= i.high for i in (mean_interval(d) for d in draws))
    assert 0.10 < misses / len(draws) < 0.24


def test_a_students_interval_of_five_values_misses_the_mean_once_in_twenty():
    draws = np.random.default_rng(1).normal(size=(2000, 5))
    misses = sum(not i.low <= 0 <= i.high for i in map(student_interval, draws))
    assert 0.035 < misses / len(draws) < 0.065


def test_equal_differences_have_an_interval_of_no_width():
    assert student_interval([0.0] * 5) == student_interval([0.0] * 2)
    assert student_interval([0.0] * 5).low == 0.0


def test_the_same_values_have_the_same_interval():
    assert mean_interval([1.0, 2.0, 4.0]) == mean_interval([1.0, 2.0, 4.0])


def test_a_single_value_has_no_interval_and_no_p():
    assert (mean_interval([2.0]).low, mean_interval([2.0]).high) == (None, None)
    assert not mean_interval([2.0]).lies_above(1.0)
    assert not mean_interval([2.0]).lies_below(3.0)
    assert signed_rank_p([2.0]) is None


def test_swapping_the_sides_of_ratios_inverts_their_interval():
    ratios = [1.5, 2.0, 3.0, 2.5]
    one, other = speedup(ratios), speedup([1 / ratio for ratio in ratios])
    assert other.mean == pytest.approx(1 / one.mean)
    assert other.low == pytest.approx(1 / one.high, rel=0.02)


def test_an_interval_above_a_value_lies_above_it():
    interval = speedup([1.5, 2.0, 3.0, 2.5])
    assert interval.lies_above(1.0)
    assert not interval.lies_below(1.0)
    assert interval.lies_below(3.0)


def test_p_is_the_least_possible_where_all_seeds_agree_and_one_where_nothing_differs():
    assert signed_rank_p([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == pytest.approx(2 / 2**6)
    assert signed_rank_p([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]) == pytest.approx(2 / 2**6)
    assert signed_rank_p([0.0, 0.0, 0.0]) == 1.0


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_numbers_that_have_no_mean_are_refused(values):
    with pytest.raises(ValueError, match="Expected `values` to hold finite numbers"):
        mean_interval(values)


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="Expected `ratios` to hold finite numbers above 0"):
        speedup([1.0, ratio])

import math
import random

import pytest
from tasks import stats


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)],
)
def test_wilson_known_values(successes, trials, low, high):
    interval = stats.wilson(successes, trials)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_without_trials_knows_nothing():
    assert stats.wilson(0, 0) == stats.Interval(0.0, 1.0)
    with pytest.raises(ValueError, match="successes \\(3\\)"):
        stats.wilson(3, 2)


@pytest.mark.parametrize(
    "b, c, p", [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (5, 0, 0.0625), (1, 9, 22 / 1024), (4, 4, 1.0), (10, 20, 0.09873715)]
)
def test_mcnemar_exact_known_values(b, c, p):
    assert stats.mcnemar_exact(b, c) == pytest.approx(p, rel=1e-6)


@pytest.mark.parametrize(
    "cells, low, high",
    [
        # Two rows of the paper's table for method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((0, 0, 0, 54), -0.0664, 0.0664),
    ],
)
def test_paired_rates_known_values(cells, low, high):
    interval = stats.paired_rates(*cells)
    assert interval.low == pytest.approx(low, abs=6e-5)
    assert interval.high == pytest.approx(high, abs=6e-5)


def test_paired_rates_is_antisymmetric_and_covers():
    a, b = stats.paired_rates(30, 9, 4, 57), stats.paired_rates(30, 4, 9, 57)
    assert (a.low, a.high) == pytest.approx((-b.high, -b.low))
    rng = random.Random(5)
    covered = 0
    for _ in range(400):
        cells = [0, 0, 0, 0]
        for _ in range(80):
            cells[rng.choices(range(4), weights=[0.5, 0.1, 0.05, 0.35])[0]] += 1
        covered += stats.paired_rates(*cells).contains(0.05)
    assert covered >= 370


@pytest.mark.parametrize(
    "degrees, t", [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (7, 2.36462), (10, 2.22814), (39, 2.02269), (1000, 1.96234)]
)
def test_student_quantile_known_values(degrees, t):
    assert stats.student_quantile(0.975, degrees) == pytest.approx(t, rel=1e-5)
    assert stats.student_quantile(0.025, degrees) == pytest.approx(-t, rel=1e-5)


def test_t_interval():
    # mean 3, sd 1.5811, n 5: half width 2.77645 * 1.5811 / sqrt(5) = 1.9632
    interval = stats.t_interval([1, 2, 3, 4, 5])
    assert (interval.low, interval.high) == pytest.approx((3 - 1.96324, 3 + 1.96324), rel=1e-5)
    assert stats.t_interval([1.0]).contains(1e300)
    assert stats.t_interval([0.25] * 9) == stats.Interval(0.25, 0.25)
    assert math.isnan(stats.mean([]))


def test_copies_in_a_group_are_one_value():
    values = [0.3, -0.1, 0.4, 0.0, 0.25]
    copies, groups = [v for v in values for _ in range(3)], [n for n in range(5) for _ in range(3)]
    assert stats.design_effect(copies, groups) == pytest.approx(3)
    alone, grouped = stats.t_interval(values), stats.t_interval(copies, groups=groups)
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    assert stats.design_effect(values, range(5)) == 1
    assert stats.design_effect([1, -1, 1, -1], ["a", "a", "b", "b"]) == 1, "what cancels makes no interval narrower"
    assert stats.design_effect([0.5] * 6, [0, 0, 0, 1, 1, 1]) == 3
    assert stats.t_interval([1.0, 2.0], groups=["a", "a"]).contains(1e300)


def test_intervals_cover_where_values_of_a_group_vary_together():
    # A value is its group's part plus its own, both of variance 1: independent values have 5/2 less variance of the mean.
    rng, held, naive = random.Random(3), 0, 0
    for _ in range(600):
        values, groups = [], []
        for group in range(25):
            shared = rng.gauss(0, 1)
            values += [shared + rng.gauss(0, 1) for _ in range(4)]
            groups += [group] * 4
        held += stats.t_interval(values, groups=groups).contains(0)
        naive += stats.t_interval(values).contains(0)
    deviation = math.sqrt(600 * 0.05 * 0.95)  # of a count whose rate is 95%
    assert abs(held - 570) < 4 * deviation
    # 1.98 standard errors that are sqrt(2 / 5) of the right one: P(|z| < 1.255) = 0.79.
    assert naive < 600 * 0.79 + 4 * math.sqrt(600 * 0.79 * 0.21) < 570 - 4 * deviation

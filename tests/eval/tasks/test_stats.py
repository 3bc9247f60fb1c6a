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

"""Intervals and paired tests. All intervals are 95% unless `z` or `level` says otherwise."""

import math
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def contains(self, value):
        return self.low <= value <= self.high


def wilson(successes, trials, z=Z95):
    """Interval of a rate by Wilson's score. No trials: [0, 1]. `successes` may be fractional (a mean of scores in [0, 1])."""
    if not 0 <= successes <= trials:
        raise ValueError(f"successes ({successes}) must lie between 0 and trials ({trials})")
    if trials == 0:
        return Interval(0.0, 1.0)
    rate = successes / trials
    scale = 1 + z * z / trials
    middle = (rate + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def mcnemar_exact(only_first, only_second):
    """Two-sided exact p-value of McNemar's test: of the items only one side has right, is each side as likely?"""
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts must not be negative: {only_first}, {only_second}")
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_rates(both, only_first, only_second, neither):
    """Interval of rate(first) - rate(second) on the same items: Newcombe's square-and-add of the two Wilson intervals,
    with the correlation of the 2 x 2 table (Statistics in Medicine 17, 1998, 2635-2650, method 10)."""
    n = both + only_first + only_second + neither
    if n == 0:
        return Interval(-1.0, 1.0)
    first, second = both + only_first, both + only_second
    a, b = wilson(first, n), wilson(second, n)
    p, q = first / n, second / n
    product = first * (n - first) * second * (n - second)
    phi = 0.0
    if product > 0:
        determinant = both * neither - only_first * only_second
        if determinant > 0:
            determinant = max(determinant - n / 2, 0)  # the method's continuity correction
        phi = determinant / math.sqrt(product)

    def add(x, y):
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    difference = p - q
    return Interval(difference - add(p - a.low, b.high - q), difference + add(a.high - p, q - b.low))


def student_cdf(t, degrees):
    """P(T <= t) for an integer number of degrees of freedom, by the finite series in the angle atan(t / sqrt(degrees))."""
    angle = math.atan2(t, math.sqrt(degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    if degrees % 2:
        term = total = cos if degrees > 1 else 0.0
        for k in range(3, degrees - 1, 2):
            term *= cos * cos * (k - 1) / k
            total += term
        inside = 2 / math.pi * (angle + sin * total)
    else:
        term = total = 1.0
        for k in range(2, degrees - 1, 2):
            term *= cos * cos * (k - 1) / k
            total += term
        inside = sin * total
    return (1 + inside) / 2


def student_quantile(p, degrees):
    """Inverse of `student_cdf`."""
    if degrees < 1 or not 0 < p < 1:
        raise ValueError(f"no quantile {p} of Student's t with {degrees} degrees of freedom")
    if p < 0.5:
        return -student_quantile(1 - p, degrees)
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def mean(values):
    return math.fsum(values) / len(values) if values else math.nan


def _group_sums(values, groups):
    """Sums of the deviations from the mean, by group."""
    middle, sums = mean(values), {}
    for value, group in zip(values, groups):
        sums[group] = sums.get(group, 0.0) + value - middle
    return sums


def design_effect(values, groups):
    """By how much the variance of the mean of `values` exceeds that of independent ones, because values of one group
    (`groups`, as long) vary together: squares of the group's sums of deviations over squares of the deviations. k for
    groups of k copies, 1 for groups of one; never below 1. Where nothing varies, values count as copies."""
    middle = mean(values)
    squares = math.fsum((v - middle) ** 2 for v in values)
    if squares == 0:
        return len(values) / len(set(groups)) if values else 1.0
    return max(1.0, math.fsum(s * s for s in _group_sums(values, groups).values()) / squares)


def t_interval(values, level=0.95, groups=None):
    """Interval of a mean by Student's t. With `groups` (as long as `values`) it holds where values of one group vary
    together: the variance is that of the groups' sums, with one degree of freedom less than there are groups. Fewer than
    two values or groups: everything."""
    groups = range(len(values)) if groups is None else groups
    count = len(set(groups))
    if count < 2:
        return Interval(-math.inf, math.inf)
    middle = mean(values)
    variance = math.fsum(s * s for s in _group_sums(values, groups).values()) * count / (count - 1) / len(values) ** 2
    half = student_quantile((1 + level) / 2, count - 1) * math.sqrt(variance)
    return Interval(middle - half, middle + half)

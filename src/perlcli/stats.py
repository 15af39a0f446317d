"""The figures that say how good a reward model or a policy is, with their 95 % intervals.

Rows of one prompt or dialog are not independent. Where a function takes `groups`, a group's rows count as one draw: the
variance is that of the groups' sums ("linearisation", as for cluster samples). `groups` has one hashable value per row;
None: every row is its own group. A share with variance v has an effective number of rows, n = p (1 - p) / v, for which
Wilson's interval is taken, with Student's t for few groups (Korn and Graubard, Survey Methodology 24, 1998).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise
from statistics import fmean

Z95 = 1.959964  # the normal distribution's 97.5th percentile
# Student's, where the expansion in `t95` is too coarse
T95: dict[float, float] = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}
Groups = Sequence[Hashable] | None
Interval = tuple[float, float]


# Intervals


def wilson(successes: int, total: int) -> Interval:
    """The 95 % interval of a share (Wilson, 1927), which also holds at 0 %, at 100 % and for few rows."""
    return wilson_of(successes / total, total)


def wilson_of(share: float, total: float, width: float = Z95) -> Interval:
    """Wilson's interval of a share of an effective number of rows; `width` is in standard errors."""
    centre = share + width**2 / (2 * total)
    spread = width * math.sqrt(share * (1 - share) / total + width**2 / (4 * total**2))
    scale = 1 + width**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def t95(freedom: float) -> float:
    """The 97.5th percentile of Student's t (Abramowitz and Stegun, 26.7.5, and 26.10 for few degrees of freedom)."""
    if freedom in T95:
        return T95[freedom]
    z, f = Z95, max(1.0, freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / f**power for power, term in enumerate(terms, 1))


def share(is_right: Sequence[bool], groups: Groups = None) -> Interval:
    """The 95 % interval of the share of rows that are right: Wilson's, with the design effect of the groups."""
    part, count = fmean(is_right), len(set(groups)) if groups is not None else len(is_right)
    if groups is None or count == len(is_right):
        return wilson(sum(is_right), len(is_right))
    variance = _variance([float(right) - part for right in is_right], groups) / len(is_right) ** 2
    # never more rows than there are; without any variance, no more than there are groups
    effective = min(part * (1 - part) / variance, len(is_right)) if variance > 0 else count
    return wilson_of(part, effective, t95(count - 1))


def mean(values: Sequence[float], groups: Groups = None) -> Interval:
    """The 95 % interval of a mean, by Student's t; infinite with fewer than two groups."""
    centre, count = fmean(values), len(set(groups)) if groups is not None else len(values)
    if count < 2:
        return -math.inf, math.inf
    spread = t95(count - 1) * math.sqrt(_variance([value - centre for value in values], groups)) / len(values)
    return centre - spread, centre + spread


def difference(one: float, its: Interval, other: float, others: Interval) -> Interval:
    """The 95 % interval of one - other, from the intervals of both, which are independent (Zou and Donner, Statistics
    in Medicine 27, 2008: MOVER; for shares it is Newcombe's hybrid score interval)."""
    gap = one - other
    low = gap - math.hypot(one - its[0], others[1] - other)
    return low, gap + math.hypot(its[1] - one, other - others[0])


def balanced(one: Sequence[bool], other: Sequence[bool], groups: tuple[Groups, Groups] = (None, None)) -> Interval:
    """The 95 % interval of the mean of two shares, from the interval of each (Zou and Donner, as `difference`). Where
    groups have rows on both sides, the correlation of the groups' sums enters."""
    parts, centre = (fmean(one), fmean(other)), (fmean(one) + fmean(other)) / 2
    first, second = share(one, groups[0]), share(other, groups[1])
    together = _correlated(one, other, groups)
    spreads = []
    for side in (0, 1):
        a, b = parts[0] - first[side], parts[1] - second[side]
        spreads.append(math.sqrt(max(0.0, a * a + b * b + 2 * together * a * b)) / 2)
    return max(0.0, centre - spreads[0]), min(1.0, centre + spreads[1])


def _correlated(one: Sequence[bool], other: Sequence[bool], groups: tuple[Groups, Groups]) -> float:
    """The correlation of two shares that comes from groups with rows of both."""
    if groups[0] is None or groups[1] is None:
        return 0.0
    sums = [
        _sums([float(value) - fmean(values) for value in values], own)
        for values, own in zip((one, other), groups, strict=True)
    ]
    keys = {**sums[0], **sums[1]}
    cross = sum(sums[0].get(key, 0.0) * sums[1].get(key, 0.0) for key in keys)
    spread = math.sqrt(math.prod(sum(value**2 for value in side.values()) for side in sums))
    return cross / spread if spread else 0.0


def correlation_interval(value: float, count: int) -> Interval:
    """The 95 % interval of a correlation of `count` independent rows, by Fisher's z."""
    if count < 4:
        return -1.0, 1.0
    centre, spread = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, value))), Z95 / math.sqrt(count - 3)
    return math.tanh(centre - spread), math.tanh(centre + spread)


def _variance(residuals: Sequence[float], groups: Groups) -> float:
    """The variance of the sum of residuals (values less their mean), from the sums of the groups."""
    sums = _sums(residuals, groups)
    return sum(value**2 for value in sums.values()) * len(sums) / (len(sums) - 1) if len(sums) > 1 else 0.0


def _sums(values: Sequence[float], groups: Groups) -> dict[Hashable, float]:
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for place, value in enumerate(values):
        sums[place if groups is None else groups[place]] += value
    return sums


# Figures


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The probability that a positive scores above a negative; ties count half."""
    return fmean(_placements(positive, negative))


def _placements(positive: Sequence[float], negative: Sequence[float]) -> list[float]:
    """For each positive, the share of negatives below it; ties count half."""
    ordered = sorted(negative)
    return [(bisect_left(ordered, p) + bisect_right(ordered, p)) / (2 * len(ordered)) for p in positive]


def auc_interval(
    positive: Sequence[float], negative: Sequence[float], groups: tuple[Sequence[Hashable], Sequence[Hashable]] | None
) -> Interval:
    """The 95 % interval of the AUC: Wilson's, with the variance of DeLong et al. (Biometrics 44, 1988), for groups that
    of Obuchowski (Biometrics 53, 1997), and Student's t with Satterthwaite's degrees of freedom. `groups` are those of
    the positives and of the negatives. The effective number of rows is at most what Newcombe (Statistics in Medicine
    25, 2006, method 5) finds for scores that overlap little, so that perfect scores have an interval too."""
    ups, downs = groups or (range(len(positive)), range(-1, -1 - len(negative), -1))
    value = auc(positive, negative)
    of_ups = _sums([part - value for part in _placements(positive, negative)], ups)
    of_downs = _sums([1 - part - value for part in _placements(negative, positive)], downs)
    shares = {key: of_ups.get(key, 0.0) / len(positive) for key in {**of_ups, **of_downs}}
    both = [(part, of_downs.get(key, 0.0) / len(negative)) for key, part in shares.items()]
    m, n = len(of_ups), len(of_downs)  # groups
    first, second = _sum_of_squares([a for a, _ in both], m), _sum_of_squares([b for _, b in both], n)
    mixed = 2 * sum(a * b for a, b in both) * len(both) / max(1, len(both) - 1)
    variance = first + second + mixed
    if variance <= 0 or min(m, n) < 2:
        return wilson_of(value, _most_rows(m, n), t95(min(m, n) - 1))
    freedom = (first + second) ** 2 / (first**2 / (m - 1) + second**2 / (n - 1)) if first + second > 0 else 1.0
    effective = min(value * (1 - value) / variance, _most_rows(len(positive), len(negative)))
    return wilson_of(value, effective, t95(freedom))


def _most_rows(positive: int, negative: int) -> float:
    """The effective number of rows of an AUC near 0 or 1 by Newcombe's formula, whose bracket is 0.5 to 0.67."""
    return positive * negative / (1 + ((positive + negative) / 2 - 1) * 0.6)


def _sum_of_squares(sums: Sequence[float], count: int) -> float:
    return sum(value**2 for value in sums) * count / max(1, count - 1)


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's correlation; 0 if either side is constant."""
    mean_one, mean_other = fmean(one), fmean(other)
    cross = sum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    spread = math.sqrt(sum((a - mean_one) ** 2 for a in one) * sum((b - mean_other) ** 2 for b in other))
    return cross / spread if spread else 0.0


def correlation_within(one: Sequence[float], other: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Pearson's correlation of the deviations from the means of the groups; over all rows if no group has two."""
    if len(set(groups)) == len(groups):
        return correlation(one, other)
    sides = []
    for values in (one, other):
        own = defaultdict(list)
        for value, group in zip(values, groups, strict=True):
            own[group].append(value)
        sides.append([value - fmean(own[group]) for value, group in zip(values, groups, strict=True)])
    return correlation(*sides)


def shift(series: Sequence[float], size: int) -> Interval:
    """The 95 % interval of the mean of the last `size` values of a series minus that of the first, at least 5 each.
    Neighbours may be correlated: the noise around the line of each stretch of `size` values counts as a first-order
    autoregression, whose correlation is corrected for short stretches (Kendall, Biometrika 41, 1954)."""
    stretches = [series[start : start + size] for start in range(0, len(series) - size + 1, size)]
    residuals = [_around_line(part) for part in (*stretches[:-1], series[-size:])]
    square = sum(value**2 for part in residuals for value in part)
    rho = sum(a * b for part in residuals for a, b in pairwise(part)) / square if square else 0.0
    rho = min(0.9, max(0.0, rho + (2 + 4 * rho) / size))
    inflation = (1 + rho) / (1 - rho)
    variances = [sum(v**2 for v in part) / (size - 2) * inflation / size for part in (residuals[0], residuals[-1])]
    spread = t95(2 * size / inflation - 4) * math.sqrt(sum(variances))
    gap = fmean(series[-size:]) - fmean(series[:size])
    return gap - spread, gap + spread


def _around_line(values: Sequence[float]) -> list[float]:
    """The residuals of values from the line that fits them best."""
    places = [place - (len(values) - 1) / 2 for place in range(len(values))]
    centre = fmean(values)
    slope = sum(p * v for p, v in zip(places, values, strict=True)) / sum(p * p for p in places)
    return [value - centre - slope * place for place, value in zip(places, values, strict=True)]


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """The share of different n-grams among all n-grams of the rows; 1 if nothing repeats."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0

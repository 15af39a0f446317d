"""The figures, against values worked out by hand."""

import math
import random
from statistics import NormalDist
from typing import Any

import pytest

from perlcli import stats
from perlcli.stats import auc, auc_interval, correlation, distinct, wilson


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (0, 1, 0.0, 0.79345),
        (1, 1, 0.20655, 1.0),
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        (81, 263, 0.25529, 0.36621),  # Newcombe (1998), table I
        (15, 148, 0.06239, 0.16049),
    ],
)
def test_wilson_interval(successes: int, total: int, low: float, high: float) -> None:
    assert wilson(successes, total) == pytest.approx((low, high), abs=2e-5)


def test_an_interval_of_a_share_stays_between_0_and_1() -> None:
    for total in range(1, 80):
        assert 0.0 <= wilson(0, total)[0] < 1e-9
        assert 1.0 - 1e-9 < wilson(total, total)[1] <= 1.0


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        ([2, 3], [0, 1], 1.0),
        ([0, 1], [2, 3], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([1, 3], [2], 0.5),
        ([1, 2], [1, 0], 0.875),  # wins 0 + 1 + 1 + 1, one tie of two
        ([5], [5], 0.5),
    ],
)
def test_auc_counts_a_tie_half(positive: list[float], negative: list[float], expected: float) -> None:
    assert auc(positive, negative) == expected


def test_auc_is_the_share_of_pairs_won() -> None:
    draw = random.Random(0)
    up, down = [draw.randint(0, 5) for _ in range(30)], [draw.randint(0, 4) for _ in range(20)]
    pairs = [(u > d) + (u == d) / 2 for u in up for d in down]
    assert auc(up, down) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [2, 4, 6], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([1, 1, 1], [1, 2, 3], 0.0),
        ([1, 2, 3], [5, 5, 5], 0.0),
        ([0.1, 0.1, 0.1], [4, 4, 4], 0.0),
        ([1], [2], 0.0),
    ],
)
def test_correlation_is_pearsons_and_0_where_nothing_varies(
    one: list[float], other: list[float], expected: float
) -> None:
    assert correlation(one, other) == pytest.approx(expected)


def test_a_score_that_never_varies_correlates_with_nothing_up_to_rounding() -> None:
    assert abs(correlation([0.1] * 7, [1, 2, 3, 4, 5, 6, 8])) < 1e-6


@pytest.mark.parametrize(
    ("rows", "n", "expected"),
    [
        ([[1, 2, 3]], 1, 1.0),
        ([[1, 1, 1, 1]], 1, 0.25),
        ([[1, 2], [1, 2]], 2, 0.5),
        ([[1, 2, 1, 2]], 2, 2 / 3),
        ([[1], [2]], 2, 0.0),
        ([[]], 1, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_is_the_share_of_different_n_grams(rows: list[list[int]], n: int, expected: float) -> None:
    assert distinct(rows, n) == pytest.approx(expected)


# Intervals, against known values and simulated rows

Phi = NormalDist().cdf


def coverage(interval: Any, truth: float, times: int = 400) -> float:
    """How often an interval of random rows contains the true value; 95 % is right."""
    draw, hits = random.Random(3), 0
    for _ in range(times):
        low, high = interval(draw)
        hits += low <= truth <= high
    return hits / times


@pytest.mark.parametrize(("freedom", "expected"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042)])
def test_students_t(freedom: int, expected: float) -> None:
    assert stats.t95(freedom) == pytest.approx(expected, rel=2e-3)


def test_newcombes_interval_of_a_difference_of_shares() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), method 10: 56/70 - 48/80."""
    found = stats.difference(56 / 70, wilson(56, 70), 48 / 80, wilson(48, 80))
    assert found == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_groups_of_one_row_change_nothing() -> None:
    right = [True, True, False, True, False]
    assert stats.share(right, range(5)) == stats.share(right) == wilson(3, 5)
    up, down = [0.3, 2.0, 1.0], [0.0, 0.5]
    assert auc_interval(up, down, None) == auc_interval(up, down, (["a", "b", "c"], ["d", "e"]))


def test_rows_that_repeat_a_group_add_nothing() -> None:
    """Ten copies of each row are as much evidence as one."""
    right = [True] * 14 + [False] * 6
    once, often = stats.share(right), stats.share(right * 10, list(range(20)) * 10)
    assert often == pytest.approx(once, abs=0.03)
    assert stats.share(right * 10)[0] > once[0] + 0.1


def test_variance_of_the_auc_is_delongs() -> None:
    """By hand: of positives 1, 3, 5 and negatives 0, 2 the placements are 1/2, 1, 1 and 1, 2/3; the variances of these,
    1/12 and 1/18, give 1/36 + 1/36."""
    found = auc_interval([1, 3, 5], [0, 2], None)
    value, variance = 5 / 6, 1 / 18
    freedom = variance**2 / ((1 / 36) ** 2 / 2 + (1 / 36) ** 2 / 1)
    assert found == pytest.approx(stats.wilson_of(value, value * (1 - value) / variance, stats.t95(freedom)))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_perfect_scores_have_an_interval_too(value: float) -> None:
    low, high = auc_interval([value] * 10, [0.5] * 10, None)
    assert (low == 0 and 0.15 < high < 0.35) if value == 0 else (high == 1 and 0.65 < low < 0.85)


def test_equal_scores_are_at_chance_and_uncertain() -> None:
    low, high = auc_interval([1.0] * 20, [1.0] * 20, None)
    assert low < 0.4 and high > 0.6


@pytest.mark.parametrize(("ups", "downs", "shift"), [(40, 40, 0.0), (120, 15, 0.8), (30, 30, 1.5)])
def test_auc_interval_covers_the_true_value(ups: int, downs: int, shift: float) -> None:
    def interval(draw: random.Random) -> stats.Interval:
        up, down = [draw.gauss(shift, 1) for _ in range(ups)], [draw.gauss(0, 1) for _ in range(downs)]
        return auc_interval(up, down, None)

    assert 0.92 <= coverage(interval, Phi(shift / math.sqrt(2))) <= 0.995


def test_auc_interval_covers_the_true_value_of_rows_in_groups() -> None:
    def interval(draw: random.Random) -> stats.Interval:
        scores: dict[bool, list[float]] = {True: [], False: []}
        groups: dict[bool, list[int]] = {True: [], False: []}
        for group in range(40):
            common = draw.gauss(0, 1)
            for _ in range(4):
                label = draw.random() < 0.5
                scores[label].append(draw.gauss(float(label), 1) + common)
                groups[label].append(group)
        return auc_interval(scores[True], scores[False], (groups[True], groups[False]))

    assert 0.92 <= coverage(interval, Phi(0.5), 300) <= 0.99


def test_share_covers_the_true_value_of_rows_in_groups() -> None:
    def both(draw: random.Random) -> tuple[list[bool], list[int]]:
        right, groups = [], []
        for group in range(30):
            chance = Phi(draw.gauss(0.5, 1))
            right += [draw.random() < chance for _ in range(5)]
            groups += [group] * 5
        return right, groups

    truth = Phi(0.5 / math.sqrt(2))
    assert 0.92 <= coverage(lambda draw: stats.share(*both(draw)), truth) <= 0.99
    assert coverage(lambda draw: stats.share(both(draw)[0]), truth) < 0.9  # as if they were independent


def test_balanced_accuracy_covers_the_true_value() -> None:
    def interval(draw: random.Random) -> stats.Interval:
        return stats.balanced([draw.random() < 0.9 for _ in range(100)], [draw.random() < 0.6 for _ in range(15)])

    assert 0.92 <= coverage(interval, 0.75) <= 0.99


def test_a_constant_answer_has_a_balanced_accuracy_of_chance_with_an_interval() -> None:
    low, high = stats.balanced([True] * 30, [False] * 10)
    assert low < 0.5 < high


def test_a_shift_of_a_series_is_covered_also_if_neighbours_are_correlated() -> None:
    def interval(draw: random.Random, rho: float) -> stats.Interval:
        value, series = 0.0, []
        for _ in range(160):
            value = rho * value + draw.gauss(0, 1)
            series.append(value)
        return stats.shift(series, 40)

    for rho in (0.0, 0.5):
        assert 0.9 <= coverage(lambda draw, rho=rho: interval(draw, rho), 0.0) <= 0.99


def test_a_shift_is_that_of_the_means_of_both_ends() -> None:
    assert stats.shift([0.0] * 10 + [5.0] * 3 + [1.0] * 10, 10) == (1.0, 1.0)
    low, high = stats.shift([0, 1] * 5 + [3, 4] * 5, 10)
    assert low > 2 and high < 4


def test_correlation_within_groups_ignores_what_differs_between_them() -> None:
    rewards, lengths, groups = [1.0, 2.0, 11.0, 12.0], [20.0, 10.0, 200.0, 190.0], "aabb"
    assert correlation(rewards, lengths) > 0.9
    assert stats.correlation_within(rewards, lengths, groups) == pytest.approx(-1.0)
    assert stats.correlation_within(rewards, lengths, "abcd") == correlation(rewards, lengths)


def test_fishers_interval_of_a_correlation() -> None:
    assert stats.correlation_interval(0.5, 103) == pytest.approx((0.3391, 0.6325), abs=1e-3)
    assert stats.correlation_interval(1.0, 3) == (-1.0, 1.0)

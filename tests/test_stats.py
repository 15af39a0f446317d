"""The figures, against values worked out by hand."""

import math
import random
from typing import Any

import pytest

from perlcli.stats import auc, correlation, distinct, pair_metrics, thumb_metrics, wilson


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


def test_pairs_by_hand() -> None:
    found = pair_metrics([2.0, 0.0, 1.0], [1.0, 3.0, 1.0], [4, 2, 3], [2, 4, 3])
    assert found == pytest.approx(
        {
            "rows": 3,
            "accuracy": 1 / 3,  # the tie is an error
            "accuracy_low": wilson(1, 3)[0],
            "accuracy_high": wilson(1, 3)[1],
            "auc": 3 / 9,  # two wins and two ties of nine
            "balanced_accuracy": (1 / 3 + 2 / 3) / 2,  # cut at 1, the median of 0 1 1 1 2 3
            "mean_margin": -2 / 3,
            "length_correlation": math.sqrt(3) / 2,  # 4 / sqrt(16 / 3 x 4)
        }
    )


def test_the_length_correlation_of_pairs_is_over_both_sides() -> None:
    assert pair_metrics([4, 2], [1, 3], [40, 20], [10, 30])["length_correlation"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([1.0], [0.0], {"accuracy": 1.0, "auc": 1.0, "balanced_accuracy": 1.0, "mean_margin": 1.0}),
        ([0.0], [1.0], {"accuracy": 0.0, "auc": 0.0, "balanced_accuracy": 0.0, "mean_margin": -1.0}),
        ([3.0] * 4, [3.0] * 4, {"accuracy": 0.0, "auc": 0.5, "balanced_accuracy": 0.5, "mean_margin": 0.0}),
    ],
    ids=["one right", "one wrong", "constant"],
)
def test_pairs_at_the_edge(chosen: list[float], rejected: list[float], expected: dict[str, float]) -> None:
    found = pair_metrics(chosen, rejected, [1] * len(chosen), [1] * len(chosen))
    assert {name: found[name] for name in expected} == expected
    assert found["length_correlation"] == 0.0


def test_thumbs_by_hand() -> None:
    found = thumb_metrics([2.0, -1.0, 0.5, -3.0], [True, True, False, False], [1, 2, 3, 4])
    expected = {
        "rows": 4,
        "accuracy": 0.5,
        "auc": 0.75,
        "balanced_accuracy": 0.5,
        "mean_margin": 0.5 - -1.25,
        "share_thumbs_up": 0.5,
    }
    assert {name: found[name] for name in expected} == expected
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson(2, 4)


def test_balanced_accuracy_weighs_both_kinds_alike() -> None:
    found = thumb_metrics([1.0] * 10, [True] * 9 + [False], [1] * 10)
    assert (found["accuracy"], found["balanced_accuracy"], found["auc"]) == (0.9, 0.5, 0.5)


def test_a_score_of_0_says_thumbs_down() -> None:
    found = thumb_metrics([0.0, 0.0], [True, False], [1, 1])
    assert (found["accuracy"], found["balanced_accuracy"]) == (0.5, 0.5)


@pytest.mark.parametrize(("label", "accuracy", "share"), [(True, 0.5, 1.0), (False, 0.5, 0.0)])
def test_thumbs_of_one_kind_have_no_figures_that_need_both(label: bool, accuracy: float, share: float) -> None:
    found = thumb_metrics([1.0, -1.0], [label] * 2, [1, 2])
    assert (found["accuracy"], found["share_thumbs_up"]) == (accuracy, share)
    assert not {"auc", "balanced_accuracy", "mean_margin"} & set(found)


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


def test_every_figure_is_a_finite_number() -> None:
    draw = random.Random(1)
    scores, lengths = [draw.gauss(0, 1) for _ in range(50)], [draw.randint(1, 90) for _ in range(50)]
    found: dict[str, Any] = pair_metrics(scores[:25], scores[25:], lengths[:25], lengths[25:])
    found |= thumb_metrics(scores, [draw.random() < 0.3 for _ in scores], lengths)
    assert all(map(math.isfinite, found.values()))

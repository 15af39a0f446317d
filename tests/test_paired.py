"""Intervals of paired differences, against values worked out by hand and by simulation."""

import math
import random

import pytest

from perlcli.paired import mean_difference, net_share, sign_of, t95


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)]
)
def test_the_percentile_is_that_of_the_tables(freedom: int, value: float) -> None:
    assert t95(freedom) == pytest.approx(value, rel=3e-3)


def test_one_win_among_ten_prompts_says_nothing() -> None:
    """Agresti and Min: (1 - 0) / 12, and the variance of 1.5 wins, 0.5 losses and 10 ties in 12."""
    found = net_share([1, *[0] * 9], range(10))
    spread = 1.959964 * math.sqrt(1.5 + 0.5 - 1 / 12) / 12
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 1 / 12 - spread, 1 / 12 + spread))
    assert found.sign == 0


@pytest.mark.parametrize(("wins", "losses", "sign"), [(20, 2, 1), (2, 20, -1), (12, 10, 0), (64, 0, 1), (0, 0, 0)])
def test_the_sign_needs_an_interval_without_0(wins: int, losses: int, sign: int) -> None:
    signs = [1] * wins + [-1] * losses + [0] * (64 - wins - losses)
    found = net_share(signs, range(64))
    assert found.sign == sign
    assert -1 <= found.low <= found.value <= found.high <= 1


def test_pairs_of_one_prompt_count_as_one() -> None:
    signs = [1, 1, 1, 1, -1, -1, 0, 0] * 4
    alone, repeated = net_share(signs, range(32)), net_share(signs, [place // 4 for place in range(32)])
    assert repeated.high - repeated.low > alone.high - alone.low
    differences = [float(sign) for sign in signs]
    one, four = mean_difference(differences, range(32)), mean_difference(differences, [i // 4 for i in range(32)])
    assert one is not None and four is not None
    assert one.value == four.value
    assert four.high - four.low > one.high - one.low


def test_the_mean_difference_has_students_interval() -> None:
    found = mean_difference([1.0, 2.0, 3.0], "abc")
    assert found is not None
    assert (found.value, found.high - found.value) == pytest.approx((2.0, 4.30265 * 1 / math.sqrt(3)))


def test_weighted_differences_are_per_token() -> None:
    found = mean_difference([2.0, 4.0, 12.0], "abc", [2.0, 4.0, 12.0])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_one_prompt_has_no_interval() -> None:
    assert mean_difference([1.0, 2.0], "aa") is None


def test_the_intervals_hold_as_often_as_they_say() -> None:
    """2,000 draws of 40 pairs; by chance the shares move by half a point."""
    rng, held = random.Random(0), {"net": 0, "mean": 0}
    for _ in range(2000):
        draws = [rng.choices((1, 0, -1), (0.3, 0.55, 0.15))[0] for _ in range(40)]
        net = net_share(draws, range(40))
        mean = mean_difference([rng.gauss(0.15, 1) for _ in draws], range(40))
        held["net"] += net.low <= 0.15 <= net.high
        held["mean"] += mean is not None and mean.low <= 0.15 <= mean.high
    assert all(0.935 <= count / 2000 <= 0.965 for count in held.values()), held


def test_signs() -> None:
    assert [sign_of(*pair) for pair in ((2.0, 1.0), (1.0, 1.0), (0.0, 1.0))] == [1, 0, -1]

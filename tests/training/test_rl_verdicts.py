"""What the steps of an RL run show."""

import random
from typing import Any

from perlcli.training.rl_verdicts import verdicts

Step = dict[str, Any]


def steps(count: int, rise: float = 0.0, longer: float = 0.0, cut: float = 0.0, link: float = 0.0) -> list[Step]:
    """Steps whose reward, length and truncated share change by so much in all, with noise."""
    draw = random.Random(0)
    return [
        {
            "reward": 1 + rise * step / count + draw.gauss(0, 0.1),
            "kl": 0.02 * step / count,
            "completions/mean_length": 20 + longer * step / count + draw.gauss(0, 0.5),
            "completions/clipped_ratio": max(0.0, min(1.0, 0.1 + cut * step / count + draw.gauss(0, 0.01))),
            "reward_by_length": link + draw.gauss(0, 0.05),
        }
        for step in range(count)
    ]


def test_a_rise_beyond_noise_is_said_with_its_interval_and_kl() -> None:
    first, second = verdicts(steps(80, rise=1.0))
    assert first.startswith("Reward rose beyond noise: yes. ")
    assert "in the first 20 steps" in first and "95 % interval +" in first
    assert ", at a KL of 0.0174 per token, about 0.3" in first and first.endswith(" per completion.")
    assert second.startswith("Neither length (20 to ") and " nor truncation (" in second


def test_no_rise_and_a_fall() -> None:
    (said,) = verdicts(steps(80))
    assert said.startswith("Reward rose beyond noise: can't say from 80 steps. ")
    (said,) = verdicts(steps(80, rise=-1.0))
    assert said.startswith("Reward rose beyond noise: no, it fell. ")


def test_length_that_grew_and_is_rewarded_is_a_warning() -> None:
    _, said = verdicts(steps(80, rise=1.0, longer=20, link=0.7))
    assert said.startswith("Warning: length may have carried the reward. Completions got longer (")
    assert "longer answers to a prompt score higher (correlation 0.7" in said
    _, shorter = verdicts(steps(80, rise=1.0, longer=-15, link=-0.7))
    assert "Completions got shorter (" in shorter
    _, apart = verdicts(steps(80, rise=1.0, longer=20, link=-0.7))
    assert apart.startswith("Neither")


def test_truncation_that_changed_is_a_warning() -> None:
    _, more = verdicts(steps(80, rise=1.0, cut=0.8))
    assert more.startswith("Warning: truncation may have carried the reward. More completions are cut off (")


def test_short_runs_say_nothing() -> None:
    assert verdicts(steps(2)) == ["Reward rose beyond noise: can't say from 2 steps; 20 are needed."]
    assert verdicts([]) == ["Reward rose beyond noise: can't say from 0 steps; 20 are needed."]


def test_without_a_penalty_the_kl_is_unknown() -> None:
    rows = [{"reward": float(step)} for step in range(40)]
    (said,) = verdicts(rows)
    assert said.endswith(", at an unknown KL (--beta 0 has no anchor).")


def test_a_reward_that_never_varies() -> None:
    (said,) = verdicts([{"reward": 1.0, "kl": 0.0}] * 30)
    assert said.startswith("Reward rose beyond noise: can't say from 30 steps. 1 in the first 10")

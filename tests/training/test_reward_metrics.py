"""The figures of reward models by hand, and the sentences on them."""

import math
import random
from typing import Any

import pytest

from perlcli.stats import wilson
from perlcli.training import reward_metrics
from perlcli.training.reward_metrics import better_than_chance, of_pairs, of_thumbs, of_training, verdicts


def pairs(right: int, wrong: int, longer: float = 0.5, trained: float | None = None) -> dict[str, float]:
    """The figures of pairs of which so many are right; `longer` is the share whose better answer is longer."""
    count = right + wrong
    chosen = [1.0 + place % 7 / 10 for place in range(right)] + [-1.0] * wrong
    lengths = [20 if place % 10 < longer * 10 else 5 for place in range(count)]
    found = of_pairs(chosen, [0.0] * count, lengths, [10] * count, range(count))
    if trained is not None:
        low, high = wilson(round(trained * 200), 200)
        found |= {"train_rows": 200, "train_accuracy": trained, "train_accuracy_low": low, "train_accuracy_high": high}
    return found


def thumbs(ups: int, downs: int, shift: float, seed: int = 0) -> dict[str, float]:
    """The figures of random scores, thumbs up higher by `shift` standard deviations."""
    draw = random.Random(seed)
    scores = [draw.gauss(shift, 1) for _ in range(ups)] + [draw.gauss(0, 1) for _ in range(downs)]
    lengths = [draw.randint(5, 50) for _ in scores]
    return of_thumbs(scores, [True] * ups + [False] * downs, lengths, range(ups + downs))


# Figures


def test_pairs_by_hand() -> None:
    found = of_pairs([2.0, 0.0, 1.0], [1.0, 3.0, 1.0], [4, 2, 3], [2, 4, 3], range(3))
    expected = {
        "rows": 3,
        "accuracy": 1 / 3,  # the tie is an error
        "accuracy_low": wilson(1, 3)[0],
        "accuracy_high": wilson(1, 3)[1],
        "share_ties": 1 / 3,
        "auc": 3 / 9,  # two wins and two ties of nine
        "mean_margin": -2 / 3,
        "length_correlation": math.sqrt(3) / 2,  # 4 / sqrt(16 / 3 x 4)
        "longer_wins": 0.5,  # one longer, one shorter, one as long
        "accuracy_if_longer": 1.0,
        "accuracy_if_shorter": 0.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "balanced_accuracy" not in found  # it means nothing where each prompt has one answer of each kind


def test_pairs_of_one_prompt_are_one_draw() -> None:
    chosen, rejected, lengths = [1.0] * 40 + [0.0] * 10, [0.0] * 40 + [1.0] * 10, [5] * 50
    apart = of_pairs(chosen, rejected, lengths, lengths, range(50))
    together = of_pairs(chosen, rejected, lengths, lengths, [place // 10 for place in range(50)])
    assert apart["accuracy"] == together["accuracy"] == 0.8
    assert together["accuracy_low"] < apart["accuracy_low"] - 0.1


def test_thumbs_by_hand() -> None:
    found = of_thumbs([2.0, -1.0, 0.5, -3.0], [True, True, False, False], [1, 2, 3, 4], range(4))
    expected = {
        "rows": 4,
        "accuracy": 0.5,
        "auc": 0.75,
        "balanced_accuracy": 0.5,
        "mean_margin": 0.5 - -1.25,
        "share_thumbs_up": 0.5,
        "majority_accuracy": 0.5,
        "accuracy_over_majority": 0.0,
        "longer_auc": 0.0,
    }
    assert {name: found[name] for name in expected} == expected
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson(2, 4)


def test_balanced_accuracy_weighs_both_kinds_alike() -> None:
    found = of_thumbs([1.0] * 10, [True] * 9 + [False], [1] * 10, range(10))
    assert (found["accuracy"], found["balanced_accuracy"], found["auc"]) == (0.9, 0.5, 0.5)
    assert (found["majority_accuracy"], found["accuracy_over_majority"]) == (0.9, 0.0)


@pytest.mark.parametrize(("label", "accuracy", "share"), [(True, 0.5, 1.0), (False, 0.5, 0.0)])
def test_thumbs_of_one_kind_have_no_figures_that_need_both(label: bool, accuracy: float, share: float) -> None:
    found = of_thumbs([1.0, -1.0], [label] * 2, [1, 2], range(2))
    assert (found["accuracy"], found["share_thumbs_up"]) == (accuracy, share)
    assert not {"auc", "balanced_accuracy", "mean_margin", "majority_accuracy"} & set(found)
    assert better_than_chance(found) is None
    (said,) = verdicts(found)
    assert (
        said == f"Better than chance: unknown. The held-out rows are all thumbs {'up' if label else 'down'}, which "
        "shows nothing."
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_rows_have_finite_figures(count: int) -> None:
    found = of_pairs([1.0] * count, [0.0] * count, [2] * count, [1] * count, [0] * count)
    found |= of_thumbs([1.0, 0.0] * count, [True, False] * count, [1, 2] * count, [0] * 2 * count)
    assert all(map(math.isfinite, found.values()))
    assert all(map(verdicts, (found, pairs(count, 0))))


def test_of_training_rows_only_what_decides_is_kept() -> None:
    assert set(of_training(pairs(8, 2))) == {"train_rows", *(f"train_accuracy{end}" for end in ("", "_low", "_high"))}
    assert set(of_training(thumbs(9, 9, 1))) == {"train_rows", *(f"train_auc{end}" for end in ("", "_low", "_high"))}


# Verdicts


@pytest.mark.parametrize(
    ("right", "wrong", "answer", "start"),
    [
        (
            180,
            80,
            "yes",
            "Better than chance: yes. Accuracy 69.2 % (95 % interval 63.4 % to 74.5 %) on 260 held-out pairs",
        ),
        (135, 125, "unknown", "Better than chance: can't say from 260 pairs. Accuracy 51.9 % "),
        (1000, 1000, "no", "Better than chance: no. Accuracy 50 % "),
        (80, 180, "no", "Better than chance: no, worse: it ranks answers the wrong way round. Accuracy 30.8 % "),
        (1, 0, "unknown", "Better than chance: can't say from 1 pair. Accuracy 100 % "),
    ],
)
def test_the_first_sentence_compares_with_chance(right: int, wrong: int, answer: str, start: str) -> None:
    found = pairs(right, wrong)
    assert better_than_chance(found) == answer
    assert verdicts(found)[0].startswith(start)
    assert verdicts(found)[0].endswith("; chance is 50 %.")


def test_thumbs_are_judged_by_their_auc_not_by_an_accuracy_that_the_majority_has() -> None:
    found = thumbs(242, 18, 0.0) | {"auc": 0.09, "auc_low": 0.04, "auc_high": 0.19}
    assert better_than_chance(found) == "no"
    first, second, few = verdicts(found)[:3]
    assert first.startswith(
        "Better than chance: no, worse: it ranks answers the wrong way round. AUC 0.09 (95 % interval"
    )
    assert "; always saying thumbs up scores 93.1 %: worse. Balanced accuracy " in second
    assert few == "Warning: only 18 of 260 held-out rows are thumbs down, so these figures are rough."


def test_scores_that_are_all_equal_are_ties() -> None:
    found = of_pairs([3.0] * 40, [3.0] * 40, [1] * 40, [1] * 40, range(40))
    assert better_than_chance(found) == "no"
    assert "(100 % ties, which count as errors)" in verdicts(found)[0]


def warned(found: dict[str, float], what: str) -> bool:
    return any(what in line for line in verdicts(found) if line.startswith("Warning: "))


def test_overfitting_is_a_warning_only_beyond_noise() -> None:
    assert warned(pairs(140, 60, trained=0.99), "overfitting. Accuracy is 99 % (95 % interval ")
    assert not warned(pairs(140, 60, trained=0.75), "overfitting")
    assert not warned(pairs(7, 3, trained=0.9), "overfitting")  # ten rows don't show it


def test_scores_that_follow_length_are_a_warning() -> None:
    lengths = [place % 50 for place in range(200)]
    biased = of_thumbs([n / 10 - 2 for n in lengths], [n > 20 for n in lengths], lengths, range(200))
    assert warned(biased, "length bias. Longer answers score higher: correlation 1.00")
    assert warned(biased, "always preferring the longer answer scores AUC 1.00, which may be as good as this model")
    assert not warned(thumbs(100, 100, 2.0), "length")


def test_pairs_that_are_only_right_where_the_better_one_is_longer_are_a_warning() -> None:
    lengths = [20 if place % 5 else 5 for place in range(200)]
    chosen = [1.0 if length == 20 else -1.0 for length in lengths]
    found = of_pairs(chosen, [0.0] * 200, lengths, [10] * 200, range(200))
    assert found["longer_wins"] == found["accuracy"] == 0.8
    assert warned(found, "Accuracy is 100 % (95 % interval ")
    assert warned(found, "always preferring the longer answer scores 80 %")


@pytest.mark.parametrize("metrics", [{}, {"accuracy": 0.9}, {"share_thumbs_up": 0.4, "auc": 0.9}])
def test_figures_without_an_interval_say_nothing(metrics: dict[str, Any]) -> None:
    assert reward_metrics.better_than_chance(metrics) is None

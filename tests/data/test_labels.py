"""Labels: the words that are understood, and --label-map and --label-threshold for the others."""

from typing import Any

import pytest
from row_samples import PAIR, THUMB, converted

from perlcli.data import Preference, Thumb
from perlcli.errors import PerlError

UP = [
    1,
    1.0,
    True,
    "1",
    "1.0",
    "true",
    "True",
    "up",
    "Thumbs_Up",
    "good",
    "YES",
    "chosen",
    "👍",
    "👍🏽",
    "like",
    "positive",
]
DOWN = [0, 0.0, False, "0", "-1", -1, "false", "down", "thumbs-down", "bad", "no", "rejected", "👎", "dislike"]


@pytest.mark.parametrize(("label", "is_up"), [*((up, True) for up in UP), *((down, False) for down in DOWN)])
def test_labels_in_words_are_understood(label: Any, is_up: bool) -> None:
    assert converted({**THUMB, "label": label}, use="reward").rows == [Thumb("a", "b", is_up)]


@pytest.mark.parametrize("label", [2, 0.5, "maybe", "5 stars", "inf", [1], {"a": 1}, 10**400])
def test_other_labels_are_an_error_that_says_what_to_type(label: Any) -> None:
    with pytest.raises(PerlError, match=r"x, row 1: label must be 0, 1, true or false, not ") as caught:
        converted({**THUMB, "label": label}, use="reward")
    assert "--label-map" in caught.value.hint or "--label-threshold" in caught.value.hint


def test_a_map_says_what_labels_mean() -> None:
    raws = [{**THUMB, "label": label} for label in ("Great", "poor", "unsure", "up", 3)]
    done = converted(*raws, use="reward", label_map="great=1,poor=0,unsure=none,3=0")
    assert [row.label for row in done.rows] == [True, False, True, False]  # type: ignore[union-attr]
    assert done.report.dropped == {"without a label": [3]}


@pytest.mark.parametrize("given", ["up", "up=2", "=1", "", "up=1,,down=0"])
def test_a_map_that_can_not_be_read_is_an_error(given: str) -> None:
    with pytest.raises(PerlError, match="--label-map must be LABEL=1, LABEL=0 or LABEL=none, comma-separated, not "):
        converted(THUMB, use="reward", label_map=given)


@pytest.mark.parametrize(
    ("labels", "hint"),
    [
        (
            ("Ja", "Nein"),
            "say what 'Ja', 'Nein' mean with --label-map Ja=N,Nein=N, where N is 1 (up), 0 (down) or none",
        ),
        (("so so",), "say what 'so so' means with --label-map 'so so=N', where N is"),
        ((3, "4,5"), "--label-threshold 4 makes 4 and above"),
        ((0.1, 0.9), "--label-threshold 0.9 makes 0.9 and above"),
    ],
)
def test_the_hint_takes_the_labels_that_were_found(labels: Any, hint: str) -> None:
    with pytest.raises(PerlError) as caught:
        converted(*({**THUMB, "label": label} for label in labels), use="reward")
    assert caught.value.hint.startswith(("on a scale, " if "threshold" in hint else "") + hint)


def test_numbers_may_have_a_decimal_comma() -> None:
    raws = [{**THUMB, "label": label} for label in ("4,5", "1,25", "3.5")]
    done = converted(*raws, use="reward", label_threshold=4)
    assert [row.label for row in done.rows] == [True, False, False]  # type: ignore[union-attr]
    mapped = converted(*raws[:2], use="reward", label_map="4.5=1,1.25=0")
    assert [row.label for row in mapped.rows] == [True, False]  # type: ignore[union-attr]
    (pair,) = converted({**PAIR, "margin": "0,125"}, use="reward").rows
    assert isinstance(pair, Preference) and pair.margin == 0.125
    with pytest.raises(PerlError, match="margin must be a number, not '1,234'"):  # or a thousand
        converted({**PAIR, "margin": "1,234"}, use="reward")


def test_a_threshold_is_for_labels_on_a_scale() -> None:
    raws = [{**THUMB, "label": label} for label in (1, "3", 4, "5.0")]
    done = converted(*raws, use="reward", label_threshold=4)
    assert [row.label for row in done.rows] == [False, False, True, True]  # type: ignore[union-attr]


def test_0_and_minus_1_can_not_both_be_a_thumbs_down() -> None:
    raws = [{**THUMB, "label": label} for label in (1, -1, 0)]
    with pytest.raises(PerlError, match="row 3: label has both 0 and -1") as caught:
        converted(*raws, use="reward")
    assert "--label-map 1=1,0=none,-1=0" in caught.value.hint
    done = converted(*raws, use="reward", label_map="1=1,0=none,-1=0")
    assert [row.label for row in done.rows] == [True, False]  # type: ignore[union-attr]

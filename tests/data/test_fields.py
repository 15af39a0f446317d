"""The fields of a row: labels in every spelling, and no other values."""

from typing import Any

import pytest
from row_samples import THUMB, converted

from perlcli.data import Thumb
from perlcli.errors import PerlError


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (0, False),
        (1, True),
        (0.0, False),
        (1.0, True),
        (True, True),
        (False, False),
        ("true", True),
        ("False", False),
        ("0", False),
        ("1", True),
    ],
)
def test_a_label_is_0_or_1_in_any_spelling(label: Any, expected: bool) -> None:
    assert converted({**THUMB, "label": label}, use="reward").rows == [Thumb("a", "b", expected)]


def test_a_label_on_another_scale_is_an_error() -> None:
    """One of five stars is bad, but as a label 1 would be a thumbs up."""
    with pytest.raises(PerlError, match="row 2: label must be 0, 1, true or false, not 5"):
        converted(*({"prompt": "a", "completion": "b", "label": stars} for stars in (1, 5)), use="reward")

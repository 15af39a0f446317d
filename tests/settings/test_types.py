"""Values from YAML against annotated types."""

from typing import Any, Literal

import pytest

from perlcli.settings.types import convert, describe, fits, is_plain

Color = Literal["red", "blue"]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, int, True),
        (1.0, int, False),
        ("1", int, False),
        (True, int, False),
        (1, float, True),
        (1.5, float, True),
        ("1e-4", float, True),
        ("one", float, False),
        (True, float, False),
        (True, bool, True),
        (1, bool, False),
        ("true", bool, False),
        ("text", str, True),
        (5, str, False),
        (False, str, False),
        (None, str, False),
        (None, str | None, True),
        (None, int | None, True),
        (2, int | None, True),
        (True, int | None, False),
        ("1e-4", float | None, True),
        ("red", Color, True),
        ("green", Color, False),
        (["a=1", "b=2"], tuple[str, ...], True),
        ([], tuple[str, ...], True),
        (["a", 1], tuple[str, ...], False),
        ("a=1", tuple[str, ...], True),
        ([0, 1.5], tuple[float, float] | None, True),
        ([0], tuple[float, float] | None, False),
        ([0, "x"], tuple[float, float] | None, False),
        ({"a": 1}, dict | str | None, True),
        ([1], dict | str | None, False),
        ([1, 2], list[int], True),
        (True, str | bool, True),
        (10**400, float, False),
        (["a", 1], list[int], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "b"}, dict[str, int], False),
        ({1: 1}, dict[str, int], False),
        ({"a": {"b": object}}, dict[str, Any], True),
        (True, dict[str, Any], False),
        (True, Any, True),
    ],
)
def test_whether_a_value_fits_a_type(value: Any, kind: Any, expected: bool) -> None:
    assert fits(value, kind) is expected


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, float, 1.0),
        ("1e-4", float, 1e-4),
        ("1e-4", float | None, 1e-4),
        (3, float | None, 3.0),
        (None, float | None, None),
        (3, int, 3),
        (3, int | None, 3),
        (True, bool, True),
        ("1e-4", str, "1e-4"),
        ("auto", str | float, "auto"),
        (2.5, str | float, 2.5),
        ("red", Color, "red"),
        (["a=1"], tuple[str, ...], ("a=1",)),
        ("a=1", tuple[str, ...], ("a=1",)),
        (["1e-1", 2], tuple[float, ...], (0.1, 2.0)),
        ([0, 1], tuple[float, float] | None, (0, 1)),
        ([1, 2], list[int], [1, 2]),
    ],
)
def test_a_fitting_value_takes_its_type(value: Any, kind: Any, expected: Any) -> None:
    found = convert(value, kind)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (str, "text"),
        (int | None, "a whole number"),
        (float | None, "a number"),
        (bool, "true or false"),
        (Color, "one of red, blue"),
        (tuple[str, ...], "text or a list of texts"),
        (tuple[float, float], "a list: a number, a number"),
        (str | float, "text or a number"),
        (dict | str | None, "a mapping or text"),
    ],
)
def test_a_type_is_told_in_words(kind: Any, words: str) -> None:
    assert describe(kind) == words


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, 2.5, None, True, "é"]}, True),
        ({"a": [float("nan")]}, True),
        ([[2**63]], False),
        ({"\ud800": 1}, False),
        ([{"a": "\udfff"}], False),
    ],
)
def test_whether_a_value_can_be_written_anywhere(value: Any, expected: bool) -> None:
    assert is_plain(value) is expected

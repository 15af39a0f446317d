"""Errors: the problem in the first line, what to type in the second, and the exit code that goes with it."""

import pytest

from perlcli.errors import Interrupted, PerlError, RunFailed, listing, nearest
from perlcli.text import clip, shorten


def test_the_hint_is_a_second_line() -> None:
    assert str(PerlError("--data x does not exist", "give a file")) == "--data x does not exist\nHint: give a file"


def test_without_a_hint_the_problem_stands_alone() -> None:
    assert str(PerlError("the problem")) == "the problem"


@pytest.mark.parametrize(("kind", "code"), [(PerlError, 2), (RunFailed, 1), (Interrupted, 130)])
def test_each_kind_has_its_exit_code(kind: type[PerlError], code: int) -> None:
    assert kind("problem").exit_code == code


@pytest.mark.parametrize(
    ("name", "hint"),
    [("learnin_rate", "Did you mean learning_rate?"), ("lora_rr", "Did you mean lora_r?"), ("zzz", ""), ("", "")],
)
def test_an_unknown_name_suggests_the_nearest_known_one(name: str, hint: str) -> None:
    assert nearest(name, iter(["learning_rate", "lora_r", "seed"])) == hint


@pytest.mark.parametrize(
    ("value", "text"),
    [("abc", "'abc'"), (2, "2"), (None, "None"), ("x" * 78, "'" + "x" * 78 + "'"), ("x" * 79, "'" + "x" * 78 + "…")],
)
def test_a_long_value_is_cut_at_80_characters(value: object, text: str) -> None:
    assert shorten(value) == text
    assert len(text) <= 80


@pytest.mark.parametrize(
    "value", [{"a": [1, "b", (2.5,)], 3: None}, [], {}, [b"x"], {"a": {"b": []}}, "it's", ["a", ["b"]]], ids=repr
)
def test_a_value_is_spelled_as_python_does(value: object) -> None:
    assert shorten(value) == repr(value)


def test_no_more_of_a_value_is_spelled_than_is_shown() -> None:
    wide: list[object] = ["a"]
    for _ in range(60):
        wide = [wide] * 9  # 9 ** 60 texts
    assert shorten(wide).startswith("[" * 61)
    assert len(shorten(wide)) == 80
    assert shorten(10**5000) == "a number of thousands of digits"


def test_text_and_lists_of_faults_are_cut() -> None:
    assert (clip("abc", 3), clip("abcd", 3)) == ("abc", "ab…")
    assert listing(["a", "b"]) == "a\nb"
    assert listing([str(n) for n in range(1020)]).splitlines()[19:] == ["19", "… and 1,000 more"]

"""Errors: the problem in the first line, what to type in the second, and the exit code that goes with it."""

import pytest

from perlcli.errors import Interrupted, PerlError, RunFailed, nearest, shorten


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

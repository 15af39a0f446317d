"""Errors: the problem in the first line, what to type in the second, and the exit code that goes with it."""

import pytest

from perlcli.errors import Interrupted, PerlError, RunFailed, line, listing, nearest, reason


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


def test_a_long_list_of_faults_is_cut() -> None:
    assert listing(["a", "b"]) == "a\nb"
    assert listing([str(n) for n in range(1020)]).splitlines()[19:] == ["19", "… and 1,000 more"]


def test_a_librarys_error_is_one_line() -> None:
    assert line(ValueError("a\n  b")) == "a b"
    assert line(ValueError()) == "ValueError"
    assert line(ValueError("x" * 400)) == "x" * 299 + "…"
    assert reason(ValueError("a\n  b")) == "ValueError: a b"
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory: x"

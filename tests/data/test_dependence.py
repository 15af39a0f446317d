"""Which rows count as one draw."""

from perlcli.data import Preference, Thumb
from perlcli.data.dependence import groups


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(texts)]


def test_rows_of_one_prompt_and_later_turns_of_its_dialog_are_one_group() -> None:
    prompts = [said("hi"), said("hi", "hello", "a latte"), said("bye"), said("hi", "hello", "a tea"), said("hi ")]
    assert groups([Thumb(prompt, "ok", True) for prompt in prompts]) == [0, 0, 1, 0, 0]


def test_dialogs_that_only_open_alike_are_apart() -> None:
    prompts = [said("hi", "hello", "a latte"), said("hi", "hello", "a tea"), said("hi", "hello", "a tea", "ok", "go")]
    assert groups([Thumb(prompt, "ok", True) for prompt in prompts]) == [0, 1, 1]


def test_texts_continue_by_lines() -> None:
    prompts = ["user: hi", "user: hi\nagent: hello", "user: hi there", ""]
    assert groups([Thumb(prompt, "ok", True) for prompt in prompts]) == [0, 0, 1, 2]


def test_rows_without_a_prompt_are_apart() -> None:
    assert groups([Preference(None, "a", "b"), Preference(None, "a", "c"), Preference("q", "a", "b")]) == [0, 1, 2]

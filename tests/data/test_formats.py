"""Formats: recognised by their columns, used by several stages, and documented in one table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from row_samples import HH, PAIR, TASK, THUMB, Raw, agent, converted, user
from typer.testing import Result

from perlcli.data import Demonstration, Preference, Prompt, Thumb
from perlcli.data.examples import joined, rows_table, table
from perlcli.data.formats import FORMATS, NAMES, detect
from perlcli.errors import PerlError

Perl = Callable[..., Result]


@pytest.mark.parametrize(
    ("raw", "use", "name", "row"),
    [
        (PAIR, "reward", "pairs", Preference("a", "b", "c")),
        ({"chosen": "b", "rejected": "c"}, "reward", "pairs", Preference(None, "b", "c")),
        ({**PAIR, "prompt": None}, "reward", "pairs", Preference(None, "b", "c")),
        (
            {"prompt": user("a"), "chosen": agent("b"), "rejected": agent("c")},
            "reward",
            "pairs",
            Preference(user("a"), agent("b"), agent("c")),
        ),
        (
            {"chosen": [*user("a"), *agent("b")], "rejected": [*user("a"), *agent("c")]},
            "reward",
            "pairs",
            Preference(user("a"), agent("b"), agent("c")),
        ),
        ({"chosen": agent("b"), "rejected": agent("c")}, "reward", "pairs", Preference(None, agent("b"), agent("c"))),
        (
            {"chosen": [*user("a"), *agent("b"), *user("d"), *agent("e")], "rejected": [*user("a"), *agent("c")]},
            "reward",
            "pairs",
            Preference(user("a"), [*agent("b"), *user("d"), *agent("e")], agent("c")),
        ),
        (
            {"chosen": [*user("a"), *agent("b"), *agent("c")], "rejected": [*user("a"), *agent("b"), *agent("d")]},
            "reward",
            "pairs",
            Preference(user("a"), [*agent("b"), *agent("c")], [*agent("b"), *agent("d")]),
        ),
        (HH, "reward", "hh", Preference([*user("hi"), *agent("hello"), *user("more")], agent("good"), agent("bad"))),
        (THUMB, "reward", "thumbs", Thumb("a", "b", True)),
        (
            {"prompt": user("a"), "completion": agent("b"), "label": False},
            "reward",
            "thumbs",
            Thumb(user("a"), agent("b"), False),
        ),
        (TASK, "reward", "taskmaster", Thumb(user("user: a latte\nagent:"), agent('{"add": {"id": "latte"}}'), True)),
        ({"prompt": "a", "completion": "b"}, "sft", "prompt-completion", Demonstration("a", "b")),
        ({"messages": [*user("a"), *agent("b")]}, "sft", "messages", Demonstration(None, [*user("a"), *agent("b")])),
        ({"text": "a"}, "sft", "text", Demonstration(None, "a")),
        ({"prompt": "a"}, "rl", "prompts", Prompt("a")),
        ({"prompt": user("a"), "order": 3}, "rl", "prompts", Prompt(user("a"), {"order": 3})),
    ],
)
def test_a_format_is_recognised_by_its_columns(raw: Raw, use: str, name: str, row: Any) -> None:
    made = converted(raw, use=use)
    assert (made.report.format, made.rows) == (name, [row])


@pytest.mark.parametrize(
    ("raw", "use", "row"),
    [
        (PAIR, "sft", Demonstration("a", "b")),
        (THUMB, "sft", Demonstration("a", "b")),
        ({**THUMB, "label": 0}, "sft", None),
        ({**PAIR, "chosen": "c"}, "reward", None),
        (PAIR, "rl", Prompt("a")),
        (THUMB, "rl", Prompt("a", {"label": 1})),
        ({"messages": [*user("a"), *agent("b")]}, "rl", Prompt(user("a"), {"messages": [*user("a"), *agent("b")]})),
        ({"messages": user("a")}, "rl", Prompt(user("a"), {"messages": user("a")})),
        (HH, "rl", Prompt([*user("hi"), *agent("hello"), *user("more")])),
        (HH, "sft", Demonstration([*user("hi"), *agent("hello"), *user("more")], agent("good"))),
    ],
)
def test_a_format_serves_other_stages_too(raw: Raw, use: str, row: Any) -> None:
    assert converted(raw, use=use).rows == ([] if row is None else [row])


def test_ten_faulty_rows_are_reported_and_the_rest_counted() -> None:
    with pytest.raises(PerlError) as caught:
        converted(THUMB, *[{**THUMB, "label": 2}] * 1012, use="reward", source="rows.jsonl")
    told = caught.value.problem.splitlines()
    assert told[0] == "rows.jsonl, row 2: label must be 0, 1, true or false, not 2"
    assert told[9].startswith("rows.jsonl, row 11:")
    assert told[10:] == ["… and 1,002 more rows"]


def test_blank_prompts_are_dropped_and_counted() -> None:
    done = converted({"prompt": "a"}, {"prompt": " \n"}, {"prompt": user(" ")}, use="rl")
    assert (done.numbers, done.report.dropped) == ([1], {"with an empty prompt": [2, 3]})


@pytest.mark.slow
def test_a_named_format_is_that_of_the_held_out_data_too(perl: Perl, write: Any, tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "label": "a note"}
    paths = [write(tmp_path / name, [row]) for name in ("train.jsonl", "dev.jsonl")]
    words = ("--data", paths[0], "--eval-data", paths[1], "--dry-run")
    told = perl("sft", *words, "--data-format", "prompt-completion").stdout
    assert told.count("prompt-completion, 1 row read, 1 kept") == 2
    assert "label must be 0, 1" in perl("sft", *words, code=2).stderr


def test_a_name_overrides_what_the_columns_look_like() -> None:
    raw = {"prompt": "a", "completion": "b", "label": 1}
    assert converted(raw, use="sft").report.format == "thumbs"
    done = converted({**raw, "label": "a note"}, use="sft", data_format="prompt-completion")
    assert (done.report.format, done.rows) == ("prompt-completion", [Demonstration("a", "b")])
    with pytest.raises(PerlError, match="needs the columns instruction, output; x has prompt, completion, label"):
        converted(raw, use="sft", data_format="alpaca")


def test_every_format_is_distinguished_from_all_others() -> None:
    assert len(NAMES) == len(FORMATS)
    for known in FORMATS:
        assert detect(joined(known)) == known


def test_the_documentation_has_the_table_of_all_formats() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"[{len(FORMATS)} formats]" in readme
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert table() in page
    assert rows_table() in page
    assert all(f"| `{name}` |" in page for name in NAMES)


def test_what_two_texts_share_is_found_in_one_pass() -> None:
    """A regular expression that tried every letter of the word took 15 seconds."""
    word = "x" * 200_000
    (row,) = converted({"chosen": f"{word} a b", "rejected": f"{word} a c"}, use="rl", chat=False).rows
    assert row == Prompt(f"{word} a", {})


def test_a_completion_of_a_pair_starts_with_the_assistant() -> None:
    """If conversations first differ in a user turn, their shared prompt ends before the previous answer."""
    opening = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ends = [[{"role": "user", "content": said}, {"role": "assistant", "content": "sure"}] for said in ("tea", "milk")]
    pair = {"chosen": opening + ends[0], "rejected": opening + ends[1]}
    assert converted(pair, use="reward").rows == [Preference(opening[:1], opening[1:] + ends[0], opening[1:] + ends[1])]

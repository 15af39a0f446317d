"""Rows of all kinds, and the report of what became of them."""

import dataclasses
import json
from typing import Any

import pytest
from row_samples import agent, pairs, user

from perlcli import data
from perlcli.data import Demonstration, Preference, Prompt, Thumb
from perlcli.data.rows import DataReport, is_empty


@pytest.mark.parametrize(
    "row", [Demonstration(None, "a"), Preference(None, "a", "b"), Thumb("a", "b", True), Prompt("a")]
)
def test_a_row_can_not_change(row: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.prompt = "b"


@pytest.mark.parametrize(
    ("content", "text"), [("a", "a"), (user("a"), "a"), ([*user("a"), *agent("b")], "user: a\nassistant: b")]
)
def test_a_content_is_readable_text(content: Any, text: str) -> None:
    assert data.text_of(content) == text


def test_up_to_three_dropped_rows_are_all_named() -> None:
    report = DataReport("x", "pairs", 4, 4)
    for number in (1, 2, 4):
        report.drop("equal pairs", number)
    assert report.line() == "x: pairs, 4 rows read, 1 kept; dropped 3 equal pairs (rows 1, 2, 4)"


def test_the_summary_is_json_with_counts_and_first_rows() -> None:
    report = pairs(*"abc").report
    report.repeated = list(range(1, 21))
    found = json.loads(json.dumps(report.summary()))
    assert found["repeated"] == {"count": 20, "first_rows": list(range(1, 11))}
    assert set(found) == {
        "source",
        "format",
        "read",
        "kept",
        "fingerprint",
        "held_out",
        "serves",
        "dropped",
        "truncated",
        "repeated",
        "overlap",
        "labels",
        "tokens",
        "unused",
        "unused_keys",
        "passed",
        "rendered",
        "findings",
    }


@pytest.mark.parametrize(
    ("row", "empty"),
    [
        (Demonstration("a", " \n"), True),
        (Demonstration("a", "b"), False),
        (Demonstration(None, ""), True),
        (Demonstration(user("hi"), agent("")), True),
        (Demonstration(user("hi"), [*agent(""), *user("b"), *agent("c")]), True),
        (Demonstration(user("hi"), [{**agent("")[0], "weight": 0}, *user("b"), *agent("c")]), False),
        (Demonstration(user("hi"), [{**agent("")[0], "tool_calls": [{"name": "f"}]}]), False),
        (Preference("a", "", "c"), True),
        (Preference("a", "b", ""), False),
        (Thumb("a", "", False), True),
        (Prompt("a"), False),
    ],
)
def test_a_blank_completion_is_empty(row: Any, empty: bool) -> None:
    assert is_empty(row) == empty

"""Two answers and a column that says which is better, in the names that people give them."""

from typing import Any

import pytest
from row_samples import Raw, agent, converted, user

from perlcli.data import Demonstration, Preference, Prompt
from perlcli.data.formats import detect
from perlcli.errors import PerlError

ASK = {"prompt": "2+2?"}
PAIR = Preference("2+2?", "4", "5")


@pytest.mark.parametrize(
    ("better", "worse", "verdict", "value"),
    [
        ("response_a", "response_b", "winner", "model_a"),
        ("response_b", "response_a", "winner", "model_b"),
        ("response_b", "response_a", "winner", "Response B"),
        ("response_a", "response_b", "winner", "response_a"),
        ("response_B", "response_A", "preferred", "B"),
        ("answer_a", "answer_b", "better", " a "),
        ("response_1", "response_2", "preference", 1),
        ("response2", "response1", "choice", "response2"),
        ("completion_0", "completion_1", "label", "0"),
        ("model response b", "model response a", "verdict", "assistant b"),
    ],
)
def test_the_verdict_names_the_better_answer(better: str, worse: str, verdict: str, value: object) -> None:
    raw = {**ASK, worse: "5", better: "4", verdict: value}
    assert converted(raw, use="reward").rows == [PAIR]
    assert converted(raw, use="sft").rows == [Demonstration("2+2?", "4")]


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        ({"question": "2+2?"}, user("2+2?")),
        ({"instruction": "Add.", "input": "2+2"}, user("Add.\n\n2+2")),
        ({"messages": user("2+2?")}, user("2+2?")),
        ({"prompt": user("2+2?"), "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, *user("2+2?")]),
        ({"prompt": "\n\nHuman: 2+2?\n\nAssistant:"}, user("2+2?")),
    ],
)
def test_the_prompt_of_two_answers_is_read_as_in_other_formats(raw: Raw, prompt: Any) -> None:
    given = {**raw, "response_a": "5", "response_b": "4", "winner": "b"}
    assert converted(given, use="reward").rows == [Preference(prompt, agent("4"), agent("5"))]
    assert [row.prompt for row in converted(given, use="rl").rows] == [prompt]


def test_ties_missing_verdicts_and_null_answers_are_left_out_and_counted() -> None:
    values = [("4", "5", "a"), ("4", "5", "tie (bothbad)"), ("4", "5", None), ("4", None, "a")]
    rows = [{**ASK, "response_a": one, "response_b": other, "winner": winner} for one, other, winner in values]
    done = converted(*rows, use="reward")
    assert done.rows == [PAIR]
    reasons = {"with tied scores": [2], "without a label": [3], "without another answer to compare": [4]}
    assert done.report.dropped == reasons
    assert [type(row) for row in converted(*rows, use="rl").rows] == [Prompt] * 4


@pytest.mark.parametrize("value", [0.7, "the first", True])
def test_another_verdict_is_an_error(value: object) -> None:
    with pytest.raises(PerlError, match="winner must be a, b or tie, not "):
        converted({**ASK, "response_a": "4", "response_b": "5", "winner": value}, use="reward")


@pytest.mark.parametrize(
    "raw",
    [
        {"response_a": "4", "response_b": "5", "winner": "a"},
        {**ASK, "response_a": "4", "response_b": "5", "response_c": "6", "winner": "a"},
        {**ASK, "response_a": "4", "answer_b": "5", "winner": "a"},
        {**ASK, "response_a": "4", "response_b": "5"},
    ],
)
def test_answers_that_are_not_two_with_a_verdict_are_no_such_format(raw: Raw) -> None:
    known = detect(raw)
    assert known is None or known.name != "verdicts"


def test_score_field_names_the_verdict_if_there_are_several() -> None:
    raw = {**ASK, "response_a": "5", "response_b": "4", "winner": "a", "preference": "b"}
    assert converted(raw, use="reward", score_field="preference").rows == [PAIR]

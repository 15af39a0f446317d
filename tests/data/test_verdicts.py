"""What says whether an answer is good: thumbs in columns that a format doesn't have, and columns that are empty."""

from typing import Any

import pytest
from row_samples import Raw, agent, converted, user

from perlcli.data import Intake, Preference, Thumb
from perlcli.data.formats import detect
from perlcli.data.rows import SourceRow
from perlcli.settings import DataSettings

ASK, GOOD, BAD = user("2+2?"), agent("4"), agent("5")
NAN = float("nan")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"messages": [*ASK, *GOOD], "label": None}, {"messages": [*ASK, *BAD], "label": False}),
        ({"question": "2+2?", "response": "4", "label": "good"}, {"question": "2+2?", "response": "5", "label": "bad"}),
        ({"instruction": "2+2?", "output": "4"}, {"instruction": "2+2?", "output": "5", "label": 0}),
        ({"instruction": "2+2?", "output": "4", "label": 1}, {"instruction": "2+2?", "output": "5", "label": 0}),
        ({"prompt": "2+2?", "completion": "4", "label": None}, {"prompt": "2+2?", "completion": "5", "label": "down"}),
        ({"prompt": "2+2?", "completion": "4"}, {"prompt": "2+2?", "completion": "5", "kto_tag": False}),
    ],
)
def test_sft_learns_no_answer_with_a_thumbs_down(first: Raw, second: Raw) -> None:
    done = converted(first, second, use="sft")
    assert (len(done.rows), done.report.dropped) == (1, {"with a thumbs down": [2]})
    assert "5" not in str(done.rows)


@pytest.mark.parametrize("raw", [{"text": "a dull film", "label": 0}, {"messages": [*ASK, *GOOD], "label": "sums"}])
def test_a_label_that_is_no_thumb_is_reported_as_not_used(raw: Raw) -> None:
    intake = Intake("x", "sft", "train", chat=True, options=DataSettings())
    assert len(intake.take(1, SourceRow("x, row 1", raw))) == 1
    intake.end()
    assert intake.report.unused == ("label",)


def test_labels_on_a_scale_are_thumbs_by_their_threshold() -> None:
    rows = [{"question": "2+2?", "response": str(label), "label": label} for label in (5, 1)]
    assert [row.completion for row in converted(*rows, use="sft", label_threshold=4).rows] == [agent("5")]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "raw",
    [
        {"instruction": "Add.", "input": "2+2", "completion": "5", "label": False},
        {"instruction": "Add.", "input": "2+2", "output": "5", "label": False},
        {"instruction": "Add.", "input": "2+2", "output": "5", "kto_tag": None, "label": False},
    ],
)
def test_an_instruction_with_a_label_is_a_thumb(raw: Raw) -> None:
    assert converted(raw, use="reward").rows == [Thumb(user("Add.\n\n2+2"), BAD, False)]


@pytest.mark.parametrize("empty", ["", None, NAN])
def test_an_instruction_without_input_is_the_question(empty: Any) -> None:
    raw = {"instruction": "2+2?", "input": empty, "completion": "5", "label": False}
    assert converted(raw, use="reward").rows == [Thumb(ASK, BAD, False)]


@pytest.mark.parametrize("empty", [None, NAN])
@pytest.mark.parametrize(
    ("filled", "use", "name"),
    [
        ({"messages": [*ASK, *GOOD]}, "sft", "messages"),
        ({"messages": [*ASK, *GOOD]}, "rl", "messages"),
        ({"prompt": "a", "completion": "b"}, "sft", "prompt-completion"),
        ({"instruction": "a", "output": "b"}, "sft", "alpaca"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "reward", "pairs"),
    ],
)
def test_columns_that_are_null_decide_the_format_only_if_the_others_do_not(
    filled: Raw, use: str, name: str, empty: Any
) -> None:
    columns = ("prompt", "completion", "chosen", "rejected", "messages", "label", "kto_tag")
    found = detect(dict.fromkeys(columns, empty) | filled, use)
    assert found is not None
    assert found.name == name
    thumbs = detect({"prompt": "a", "completion": "b", "label": empty}, "reward")
    assert thumbs is not None
    assert thumbs.name == "thumbs"


def test_rows_without_a_label_are_left_out_wherever_they_are() -> None:
    rows = [{"messages": [*ASK, *GOOD], "label": label} for label in (None, True)]
    done = converted(*rows, use="reward")
    assert (done.rows, done.report.dropped) == ([Thumb(ASK, GOOD, True)], {"without a label": [1]})


@pytest.mark.parametrize("name", ["input", "system", "history"])
def test_nan_is_an_empty_cell(name: str) -> None:
    raw = {"instruction": "2+2?", "chosen": "4", "rejected": "5", name: NAN}
    assert converted(raw, use="reward").rows == [Preference(ASK, GOOD, BAD)]

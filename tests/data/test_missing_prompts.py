"""Rows whose prompt is empty or missing, and what of a prompt's row reward functions receive."""

from pathlib import Path
from typing import Any

import pytest
from row_samples import Raw, agent, converted, user

from perlcli.data import Demonstration, Intake, Preference, Thumb, load
from perlcli.data.loading import numbered
from perlcli.data.rows import SourceRow
from perlcli.settings import DataSettings

DIALOG, OTHER = [*user("2+2?"), *agent("4")], [*user("2+2?"), *agent("5")]


@pytest.mark.parametrize("empty", ["", "  ", None, []])
def test_an_empty_prompt_next_to_complete_conversations_is_no_turn(empty: Any) -> None:
    pair = {"prompt": empty, "chosen": DIALOG, "rejected": OTHER}
    assert converted(pair, use="reward").rows == [Preference(user("2+2?"), agent("4"), agent("5"))]
    if empty is None:
        return
    row = {"prompt": empty, "completion": DIALOG}
    assert converted(row, use="sft").rows == [Demonstration(None, DIALOG)]
    assert converted({**row, "label": 1}, use="reward").rows == [Thumb(user("2+2?"), agent("4"), True)]


@pytest.mark.parametrize(
    ("raw", "use", "found"),
    [
        ({"prompt": "", "completion": "b"}, "sft", "an empty prompt, which becomes an empty user turn"),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "reward", "no prompt, so its text is not part of a chat"),
    ],
)
def test_a_text_without_a_prompt_is_reported(raw: Raw, use: str, found: str) -> None:
    full = {**raw, "prompt": "a"}
    assert converted(full, raw, use=use).report.findings == {found: [2]}
    assert converted(full, raw, use=use, chat=False).report.findings == {}


def test_reward_functions_receive_the_columns_that_are_read_under_another_name() -> None:
    raw = {"question": "2+2?", "answer": "#### 4", "level": 1}
    options = DataSettings(columns="prompt=question,completion=answer")
    intake = Intake("x", "rl", "train", chat=True, options=options)
    ((number, item),) = numbered((row for row in [SourceRow("x, row 1", raw)]), options)
    (row,) = intake.take(number, item)
    intake.end()
    assert row.extra == {"answer": "#### 4", "level": 1}  # type: ignore[union-attr]
    assert intake.report.passed == ("level", "answer")


def test_a_thumb_may_be_on_an_answer_next_to_the_messages() -> None:
    raw = {"messages": user("2+2?"), "response": "4", "label": "bad"}
    assert converted(raw, use="reward").rows == [Thumb(user("2+2?"), agent("4"), False)]


def test_an_unknown_status_is_reported_also_among_ties() -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "status": status} for status in ("swap them", "tie")]
    report = converted(*rows, use="reward").report
    assert report.findings == {"the status is 'swap them', and the pair is kept as it is": [1]}
    assert converted(*rows[1:], {**rows[0], "status": "swapped"}, use="reward").report.findings == {}


def test_the_report_says_which_of_two_held_out_files_is_read(tmp_path: Path, write: Any) -> None:
    for name in ("train", "test", "validation"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "b"}])
    held_out = load(str(tmp_path), "sft", split="test")
    assert held_out.report.source == f"{tmp_path} (test, not validation)"
    assert [row.prompt for row in held_out.rows] == ["test"]
    assert load(str(tmp_path), "sft").report.source == str(tmp_path)

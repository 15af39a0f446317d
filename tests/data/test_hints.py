"""What the errors about files propose, and files that are not what their name says."""

from pathlib import Path
from typing import Any

import pytest
from row_samples import Raw, agent, converted, user

from perlcli.data import Demonstration, load
from perlcli.data.proposals import proposal, rivals
from perlcli.errors import PerlError


@pytest.mark.parametrize(
    ("raw", "use", "way"),
    [
        ({"inputs": "a", "targets": "b", "task": "sums"}, "sft", "--columns prompt=inputs,completion=targets"),
        ({"question": "a", "choices": ["b", "c"], "answer": 1}, "rl", ""),
        (
            {"prompt": "a", "response": "b", "is_safe": False},
            "sft",
            "--columns prompt=prompt,completion=response,label=is_safe",
        ),
        ({"prompt": "a", "correct_answer": "b"}, "sft", "--columns prompt=prompt,completion=correct_answer"),
    ],
)
def test_the_proposal_loses_no_part_of_the_question_or_of_the_verdict(raw: Raw, use: str, way: str) -> None:
    assert proposal(raw, use) == way


def test_of_two_answers_that_are_no_alternatives_one_is_chosen() -> None:
    raw = {"problem": "2+2?", "solution": "It is 4.", "answer": "4"}
    assert "choose one, such as --columns prompt=problem,completion=solution" in rivals(raw, "sft")
    assert rivals(raw, "reward") == rivals(raw, "rl") == ""
    assert "label=label" in rivals({**raw, "label": 1}, "reward")


@pytest.mark.parametrize("raw", [{"instruction": "a", "input": "b", "output": "c"}, {"messages": [], "response": "a"}])
def test_data_without_a_verdict_has_no_way_to_a_reward_model(raw: Raw) -> None:
    assert proposal(raw, "reward") == rivals(raw, "reward") == ""


def test_without_a_known_name_the_hint_shows_what_sft_and_reward_need(perl: Any, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"Frage": "a", "Antwort": "b"}])
    found = perl("data", "check", path, code=2).stderr
    assert "--columns prompt=COLUMN,completion=COLUMN for perl sft" in found
    assert perl("data", "check", path, "--columns", "prompt=Frage,completion=Antwort").stdout.count(" yes ") == 3


def test_a_row_for_each_message_is_refused_with_what_to_write() -> None:
    with pytest.raises(PerlError, match="has the column role") as caught:
        converted({"role": "user", "text": "2+2?"}, use="sft")
    assert caught.value.hint.startswith("the messages of a conversation belong into one row")


@pytest.mark.parametrize(
    ("start", "problem"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "is a pointer of Git LFS, not the data"),
        ("\n<!DOCTYPE html>\n<html>", "is a web page, not data"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_what_a_download_left_in_place_of_the_data_is_refused(
    start: str, problem: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(start)
    with pytest.raises(PerlError, match=problem):
        load(str(tmp_path / name), "sft")


def test_line_ends_of_old_macs_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\r2+2?,4\r")
    with pytest.raises(PerlError, match=r"a carriage return in a line: end lines with LF or CRLF"):
        load(str(tmp_path / "a.csv"), "sft")


def test_parts_that_are_reasoning_become_the_reasoning_of_the_message() -> None:
    parts = [{"type": "thinking", "thinking": "two and two"}, {"type": "output_text", "text": "4"}]
    (row,) = converted({"messages": [*user("2+2?"), {"role": "assistant", "content": parts}]}, use="sft").rows
    assert row == Demonstration(None, [*user("2+2?"), {**agent("4")[0], "reasoning_content": "two and two"}])
    with pytest.raises(PerlError, match=r"a part that is not text: \{'type': 'redacted'"):
        converted({"messages": [*user("a"), {"role": "assistant", "content": [{"type": "redacted"}]}]}, use="sft")


def test_rounds_of_input_and_output_are_turns() -> None:
    rounds = [{"system": "Be brief.", "input": "1+1?", "output": "2"}, {"input": "2+2?", "output": "4"}]
    turns = [{"role": "system", "content": "Be brief."}, *user("1+1?"), *agent("2"), *user("2+2?"), *agent("4")]
    assert converted({"messages": rounds}, use="sft").rows == [Demonstration(None, turns)]
    assert proposal({"conversation": rounds}, "sft") == "--columns messages=conversation"
    with pytest.raises(PerlError, match="which is not a message with role and content"):
        converted({"messages": [{**rounds[1], "image": "a.png"}]}, use="sft")

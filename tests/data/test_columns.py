"""Columns: the unused ones are named, those of the question are never ignored, and --columns gives names."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from row_samples import PAIR, THUMB, Raw, agent, converted, user

from perlcli import data
from perlcli.data import Demonstration, Preference, Prompt, Thumb
from perlcli.data.columns import parse
from perlcli.data.proposals import proposal
from perlcli.errors import PerlError
from perlcli.settings import DataSettings


def loaded(path: Path, use: str, **options: Any) -> data.Data:
    return data.load(str(path), use, options=DataSettings(data=str(path), **options))


def test_columns_that_nothing_reads_are_named_in_report_and_record(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{**PAIR, "id": 1, "note": None, "empty": []}, {**PAIR, "note": "x"}])
    report = loaded(path, "reward").report
    assert report.unused == ("id", "note")
    assert "columns not used: id, note" in report.lines()
    assert report.summary()["unused"] == ("id", "note")


def test_keys_of_messages_that_nothing_reads_are_named(tmp_path: Path, write: Any) -> None:
    said = {**agent("b")[0], "id": 7, "name": "x", "mood": None}
    path = write(tmp_path / "a.jsonl", [{"messages": [{**user("a")[0], "time": 1}, said], "source": "web"}])
    report = loaded(path, "sft").report
    assert (report.unused, report.unused_keys) == (("source",), ("id", "time"))
    assert "message keys not used: id, time" in report.lines()


def test_rl_passes_other_columns_to_reward_functions(tmp_path: Path, write: Any) -> None:
    done = loaded(write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "4"}]), "rl")
    assert done.rows == [Prompt("a", {"answer": "4"})]
    assert (done.report.unused, done.report.passed) == ((), ("answer",))
    assert "columns passed to reward functions: answer" in done.report.lines()


@pytest.mark.parametrize(
    ("raw", "use", "column"),
    [
        ({**PAIR, "question": "q"}, "reward", "question"),
        ({**PAIR, "context": "c"}, "rl", "context"),
        ({"text": "a", "system": "s"}, "sft", "system"),
        ({**PAIR, "images": ["x.png"]}, "reward", "images"),
        ({**PAIR, "weight": 0.5}, "reward", "weight"),
        ({**THUMB, "kto_tag": True}, "reward", "kto_tag"),
        ({"prompt": "a", "completion": "b", "train": False}, "sft", "train"),
        ({"prompt": "a", "completion": "b", "margin": 1.0}, "sft", "margin"),
        ({"text": "a", "role": "user"}, "sft", "role"),
        ({"question": "q", "response_j": "a", "response_k": "b", "context": "c"}, "reward", "context"),
    ],
)
def test_a_column_of_the_question_or_the_meaning_is_never_ignored(raw: Raw, use: str, column: str) -> None:
    with pytest.raises(PerlError, match=f"x has the column {column}, which the format ") as caught:
        converted(raw, use=use)
    assert "--columns" in caught.value.hint


@pytest.mark.parametrize(
    "more", [{"question": "a"}, {"question": None}, {"tools": ""}, {"history": []}, {"input": ""}], ids=str
)
def test_an_empty_column_or_one_that_repeats_the_prompt_is_no_error(more: Raw) -> None:
    assert converted({**PAIR, **more}, use="reward").rows == [Preference("a", "b", "c")]


@pytest.mark.parametrize(
    ("raw", "use", "way"),
    [
        ({"prompt": "a", "context": "c", "answer": "4"}, "rl", "prompt=prompt"),
        ({"prompt": "a", "question": "c", "system": "s", "margin": 1}, "rl", "prompt=prompt,system=system"),
        (
            {**PAIR, "system": "s", "images": ["x"]},
            "reward",
            "prompt=prompt,chosen=chosen,rejected=rejected,system=system",
        ),
        ({"text": "a", "role": "user"}, "sft", "text=text"),
        ({"question": "q", "response_j": "a", "response_k": "b", "context": "c"}, "rl", "prompt=COLUMN"),
    ],
)
def test_the_hint_about_an_ignored_column_has_the_columns_of_the_row(raw: Raw, use: str, way: str) -> None:
    with pytest.raises(PerlError, match="which the format") as caught:
        converted(raw, use=use)
    assert caught.value.hint.endswith(f"--columns {way}")


def test_columns_that_only_say_ties_are_named_as_not_used(tmp_path: Path, write: Any) -> None:
    rows = [{**PAIR, "status": "wrong, swap them", "score_chosen": "5", "score_rejected": "4"}, PAIR]
    report = loaded(write(tmp_path / "a.jsonl", rows), "reward").report
    assert report.unused == ("status", "score_chosen", "score_rejected")
    rows = [{**PAIR, "score_chosen": "5", "score_rejected": "5.0"}, {**PAIR, "chosen_score": 1, "rejected_score": 9}]
    done = loaded(write(tmp_path / "a.jsonl", rows), "reward")
    assert done.report.dropped == {"with tied scores": [1]} and done.report.unused == ()
    told = "1 row: chosen_score is lower than rejected_score, and the pair is kept as it is (row 2)"
    assert told in done.report.lines()


NAMED: Raw = {"Question": "a", "Better answer": "b", "Worse, answer": "c", "system": "s", "id": 1}


def test_columns_reads_other_names(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [NAMED])
    how = "prompt=Question, chosen=\"Better answer\",rejected='Worse, answer'"
    done = loaded(path, "reward", columns=how)
    assert done.rows == [Preference("a", "b", "c")]
    assert (done.report.format, done.report.unused) == ("pairs", ("system", "id"))
    assert loaded(path, "rl", columns=how).rows == [Prompt("a", {"system": "s", "id": 1})]


def test_columns_reaches_into_nested_rows(tmp_path: Path, write: Any) -> None:
    raw = {"a.b": "x", "data": {"q": "a", "answers": [{"text": "b"}]}, "ok": "👍"}
    path = write(tmp_path / "a.jsonl", [raw])
    done = loaded(path, "reward", columns="prompt=data.q,completion=data.answers.0.text,label=ok")
    assert done.rows == [Thumb("a", "b", True)]
    assert loaded(path, "sft", columns="text=a.b").rows == [Demonstration(None, "x")]


def test_a_row_without_a_named_column_is_the_error_of_that_row(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "a"}, {"x": "a"}, {"q": "c"}])
    with pytest.raises(PerlError) as caught:
        loaded(path, "rl", columns="prompt=q")
    assert caught.value.problem == f"{path}, row 2: the row has no q (--columns): it has x"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("prompt", "'prompt' has no column"),
        ("promt=a", "'promt' is not one of prompt, completion"),
        ("prompt=a,prompt=b", "prompt is there twice"),
        ("prompt=", "prompt has no column"),
        ("", "'' is not one of"),
    ],
)
def test_columns_that_can_not_be_read_are_an_error(given: str, told: str) -> None:
    with pytest.raises(PerlError, match="--columns must be NAME=COLUMN, comma-separated, not ") as caught:
        parse(given)
    assert told.replace("'prompt'", "prompt") in caught.value.hint


@pytest.mark.parametrize(
    ("raw", "use", "way"),
    [
        ({"Question": "", "Better answer": "", "Worse answer": ""}, "reward", True),
        ({"instruction": "", "response": ""}, "sft", "--columns prompt=instruction,completion=response"),
        (
            {"userQuery": "", "reply": "", "rating": ""},
            "reward",
            "--columns prompt=userQuery,completion=reply,label=rating",
        ),
        ({"data": {"query": "", "answer": ""}}, "sft", "--columns prompt=data.query,completion=data.answer"),
        ({"a, b question": "", "it's the answer": ""}, "sft", True),
        ({"input": "", "output": ""}, "sft", "--columns prompt=input,completion=output"),
        ({"x": "", "y": ""}, "sft", ""),
        # Several columns may be the prompt, or the answer: one of them would be lost.
        ({"instruction": "a", "input": "b", "output": "c", "label": False}, "reward", ""),
        ({"prompt": "a", "response_a": "b", "response_b": "c", "winner": "A"}, "sft", ""),
        ({"question": "a", "answer_1": "b", "answer_2": "c", "preference": 1}, "sft", ""),
        ({"prompt": "a", "response_1": "b", "response_2": "c", "label": "response_2"}, "reward", ""),
        # A judgement or a part of the question would be lost.
        ({"query": "a", "answer": "b", "preference": 1}, "sft", ""),
        ({"query": "a", "answer": "b", "context": "c"}, "sft", ""),
        ({"query": "a", "answer": "b", "feedback": "too long " * 9}, "reward", ""),
        # The values are not of the kind that the name says.
        ({"conversation_id": 1, "role": "user", "content": "a"}, "sft", ""),
        ({"conversation": 1, "x": ""}, "sft", ""),
        ({"query": user("a"), "reply": 5}, "sft", ""),
        ({"query": "a", "answer": "b", "model_a": "x"}, "sft", "--columns prompt=query,completion=answer"),
        # Judgements that are known are part of the proposal.
        ({"q": "a", "a": "b", "score": 0.9}, "reward", "--columns prompt=q,completion=a,score=score"),
        ({"q": "a", "a": "b", "score": "0.9"}, "sft", "--columns prompt=q,completion=a,score=score"),
        ({"q": "a", "a": "b", "score": 1}, "reward", "--columns prompt=q,completion=a,label=score"),
        ({"q": "a", "a": "b", "rating": 4}, "sft", "--columns prompt=q,completion=a,label=rating"),
        ({"q": "a", "good": "b", "bad": "c"}, "sft", "--columns prompt=q,chosen=good,rejected=bad"),
        (
            {"query": "a", "better": "b", "worse": "c", "score_better": 5, "score_worse": 1},
            "reward",
            "--columns prompt=query,chosen=better,rejected=worse",
        ),
    ],
)
def test_an_unknown_format_gets_a_proposal_that_works(raw: Raw, use: str, way: Any) -> None:
    found = proposal(raw, use)
    assert found == way or way is True
    if found:
        name, given = shlex.split(found)
        assert name == "--columns"
        flat = {**raw, **{f"data.{key}": 1 for key in raw.get("data", {})}} if "data" in raw else raw
        assert set(parse(given).values()) <= set(flat)


@pytest.mark.parametrize(
    ("raw", "use", "told"),
    [
        ({"question": "a", "answer_1": "b", "answer_2": "c"}, "reward", "answer_1 and answer_2 may both be answers"),
        ({"instruction": "a", "query": "b", "answer": "c"}, "sft", "instruction and query may both be parts of the"),
    ],
)
def test_columns_that_no_option_can_name_are_named(raw: Raw, use: str, told: str) -> None:
    with pytest.raises(PerlError) as caught:
        converted(raw, use=use)
    assert told in caught.value.hint and "--columns" not in caught.value.hint


def test_adjacent_answers_to_a_prompt_are_read_together(tmp_path: Path, write: Any) -> None:
    rows = [{"prompt": p, "completion": c, "score": s} for p, c, s in (("a", "x", 1), ("a", "y", 2), ("b", "z", 1))]
    path = write(tmp_path / "a.jsonl", rows)
    done = loaded(path, "reward")
    assert done.rows == [Preference(user("a"), agent("y"), agent("x"))]
    assert done.report.dropped == {"without another answer to compare": [3]}
    assert done.report.line().startswith(f"{path}: scored, 2 rows read from 3 source rows, 1 kept")
    assert loaded(path, "sft").numbers == [1, 3]
    rows[1]["score"] = "many"
    with pytest.raises(PerlError, match="row 1 to row 2: score must be a number, not 'many'"):
        loaded(write(path, rows), "reward")

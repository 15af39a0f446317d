"""What is told of rows before they become tokens: empty completions, repeats, labels, overlap; the held-out side."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from perlcli import data
from perlcli.data import Data, Demonstration, Preference, Prompt, Thumb, checks
from perlcli.data.rows import DataReport
from perlcli.errors import PerlError


def of(*rows: Any) -> Data:
    found = list(rows)
    return Data(found, list(range(1, len(found) + 1)), DataReport("x", "pairs", len(found), len(found)))


def pairs(*prompts: str) -> Data:
    return of(*(Preference(prompt, f"b{place}", "c") for place, prompt in enumerate(prompts)))


SAID = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("row", "empty"),
    [
        (Demonstration("a", " \n"), True),
        (Demonstration("a", "b"), False),
        (Demonstration(None, ""), True),
        (Demonstration(SAID, [{"role": "assistant", "content": ""}]), True),
        (Demonstration(SAID, [{"role": "assistant", "content": ""}, {"role": "user", "content": "b"}]), False),
        (Preference("a", "", "c"), True),
        (Preference("a", "b", ""), False),
        (Thumb("a", "", False), True),
        (Prompt("a"), False),
    ],
)
def test_a_completion_that_says_nothing_is_empty(row: Any, empty: bool) -> None:
    assert checks.is_empty(row) == empty


@pytest.mark.parametrize("use", ["sft", "reward"])
def test_rows_with_an_empty_completion_are_left_out_and_counted(use: str, tmp_path: Path, write: Any) -> None:
    rows = [{"prompt": "a", "chosen": said, "rejected": "c"} for said in ("b", " ", "d")]
    found = data.load(str(write(tmp_path / "a.jsonl", rows)), use)
    assert (found.numbers, found.report.kept) == ([1, 3], 2)
    assert found.report.line().endswith("2 of 3 rows; left out 1 with an empty completion (row 2)")


def test_repeats_are_told_and_kept_until_asked(tmp_path: Path, write: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}] * 3
    found = data.load(str(write(tmp_path / "a.jsonl", rows)), "sft")
    assert (len(found.rows), found.report.repeated) == (6, [3, 4, 5, 6])
    assert "4 repeats of an earlier row, kept (rows 3, 4, 5…)" in found.report.lines()
    data.drop_repeats(found)
    assert (found.numbers, found.report.kept, found.report.repeated) == ([1, 2], 2, [])
    assert "left out 4 repeating an earlier row (rows 3, 4, 5…)" in found.report.line()


def test_rows_of_another_kind_or_label_are_no_repeats() -> None:
    assert checks.repeats([Thumb("a", "b", True), Thumb("a", "b", False), Demonstration("a", "b")]) == []


def test_the_balance_of_thumbs_is_told() -> None:
    found = of(Thumb("a", "b", True), Thumb("a", "c", False), Thumb("b", "c", True))
    checks.tally(found)
    assert found.report.labels == {"up": 2, "down": 1}
    assert "2 thumbs up, 1 thumbs down (66.7% up)" in found.report.lines()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Preference("a b", "c", "d"), Prompt("a  b\n"), True),
        (Preference("a", "c", "d"), Preference("b", "c", "d"), False),
        (Prompt(SAID), Thumb(SAID, [], True), True),
        (Demonstration(None, [*SAID, {"role": "assistant", "content": "x"}]), Prompt(SAID), True),
        (Demonstration(None, "a"), Demonstration(None, "a"), True),
        (Preference(None, "a", "b"), Preference(None, "a", "c"), False),
        (Prompt([{"role": "system", "content": "hi"}]), Prompt(SAID), False),
    ],
)
def test_prompts_are_the_same_but_for_white_space(one: Any, other: Any, same: bool) -> None:
    assert (checks.prompt_mark(one) == checks.prompt_mark(other)) == same


def test_held_out_rows_whose_prompt_is_trained_on_are_told() -> None:
    held_out = pairs("z", "a", "b ")
    held_out.report.overlap = data.overlap(pairs("a", "b", "c"), held_out)
    assert held_out.report.overlap == [2, 3]
    (warning,) = (line for line in held_out.report.lines() if line.startswith("Warning"))
    assert "2 held-out rows with a prompt that is trained on, too" in warning
    assert "(rows 2, 3)" in warning


def test_percentiles_are_lengths_that_rows_have() -> None:
    assert checks.percentiles([*range(1, 101)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert checks.percentiles([7]) == {"p50": 7, "p90": 7, "p99": 7, "max": 7}


def test_the_summary_is_json_with_counts_and_first_rows() -> None:
    report = pairs(*"abc").report
    report.repeated = list(range(1, 21))
    found = json.loads(json.dumps(report.summary()))
    assert found["repeated"] == {"count": 20, "first_rows": list(range(1, 11))}
    assert set(found) == {"source", "format", "read", "kept", "fingerprint", "held_out", "dropped", "truncated",
                          "repeated", "overlap", "labels", "tokens"}  # fmt: skip


# --- splits


def test_a_prompt_never_stands_on_both_sides_and_no_row_is_lost() -> None:
    whole = pairs(*(f"prompt {place % 40}" for place in range(200)))
    train, held_out = data.hold_out(whole, 0.1)
    assert data.overlap(train, held_out) == []
    assert sorted(train.numbers + held_out.numbers) == whole.numbers
    assert (len(held_out.rows), train.report.held_out, train.report.kept) == (20, 20, 180)
    assert "180 of 200 rows; 20 held out for evaluation" in train.report.line()
    assert (held_out.report.read, held_out.report.kept) == (20, 20)
    assert held_out.report.source == "x, 0.1 held out by prompt"


def test_each_side_counts_on_its_own() -> None:
    train, held_out = data.hold_out(pairs(*(f"prompt {place}" for place in range(20))), 0.5)
    train.report.truncated.append(1)
    train.report.drop("longer", 1)
    assert (held_out.report.truncated, held_out.report.dropped) == ([], {})
    assert train.report.fingerprint != held_out.report.fingerprint


def test_the_split_is_by_content_and_not_by_order() -> None:
    prompts = [f"prompt {place}" for place in range(50)]
    sides = []
    for _ in range(2):
        _, held_out = data.hold_out(pairs(*prompts), 0.2)
        sides.append({str(row.prompt) for row in held_out.rows})
        random.Random(1).shuffle(prompts)
    assert sides[0] == sides[1]
    assert len(sides[0]) == 10


def test_a_small_share_holds_out_one_prompt_at_least() -> None:
    assert len(data.hold_out(pairs(*"abc"), 0.01)[1].rows) == 1


def test_rows_of_one_prompt_can_not_be_split() -> None:
    with pytest.raises(PerlError, match="leaves nothing to train on: x has 1 different prompts"):
        data.hold_out(pairs("a", "a", "a"), 0.5)


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_a_fraction_is_held_out_of_a_run(command: str, perl: Any, llama: Path, tmp_path: Path, rows: Any) -> None:
    source = rows["demonstrations" if command == "sft" else "pairs"] / "train.jsonl"
    words = ("-m", llama, "-d", source, "--eval-fraction", "0.25", "--dry-run", "-o", tmp_path / "run")
    found = perl(command, *words).stdout
    assert "8 held out for evaluation" in found
    assert "eval: " + str(source) + ", 0.25 held out by prompt" in found
    assert "Warning" not in found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--eval-fraction", "0.5"], "Measuring on the first 2 of "),
        ([], "--max-eval-samples does nothing: no rows are held out"),
    ],
)
def test_the_rows_to_measure_on_can_be_fewer(
    words: list[str], told: str, perl: Any, llama: Path, rows: dict[str, Path]
) -> None:
    given = ("--data", rows["pairs"] / "train.jsonl", "--max-eval-samples", "2", "--dry-run")
    assert told in perl("reward", "--model", llama, *given, *words).output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--eval-fraction", "0.1", "--eval-data", "x.jsonl"], "--eval-data and --eval-fraction can't be combined"),
        (["--eval-fraction", "1"], "--eval-fraction must be above 0 and below 1, not 1"),
        (["--eval-fraction", "0"], "--eval-fraction must be above 0 and below 1, not 0"),
    ],
)
def test_a_fraction_that_can_not_be_is_refused(words: list[str], told: str, perl: Any) -> None:
    assert told in perl("reward", "--dry-run", *words, code=2).stderr


def test_overlap_is_told_and_recorded_by_a_run(perl: Any, llama: Path, tmp_path: Path, write: Any, rows: Any) -> None:
    source = rows["pairs"] / "train.jsonl"
    found = perl("reward", "-m", llama, "-d", source, "--eval-data", source, "--dry-run", "-o", tmp_path / "run").stdout
    assert "eval: Warning: 32 held-out rows with a prompt that is trained on, too" in found


def test_duplicates_are_left_out_of_a_run_when_asked(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    source = write(
        tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": "c"}]
    )
    words = ("-m", llama, "-d", source, "--dry-run", "-o", tmp_path / "run")
    assert "train: 2 repeats of an earlier row, kept (rows 2, 3)" in perl("sft", *words).stdout
    found = perl("sft", *words, "--drop-duplicates").stdout
    assert "2 of 4 rows; left out 2 repeating an earlier row (rows 2, 3)" in found
    assert "are kept" not in found

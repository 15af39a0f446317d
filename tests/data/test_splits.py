"""Rows held out for evaluation: no prompt on both sides, no row lost."""

import random
from pathlib import Path
from typing import Any

import pytest
from row_samples import pairs

from perlcli import data
from perlcli.errors import PerlError


def test_no_prompt_is_on_both_sides_and_no_row_is_lost() -> None:
    whole = pairs(*(f"prompt {place % 40}" for place in range(200)))
    train, held_out = data.hold_out(whole, 0.1)
    assert data.overlap(train, held_out) == []
    assert sorted(train.numbers + held_out.numbers) == whole.numbers
    assert (len(held_out.rows), train.report.held_out, train.report.kept) == (20, 20, 180)
    assert "200 rows read, 180 kept, 20 held out for evaluation" in train.report.line()
    assert (held_out.report.read, held_out.report.kept) == (20, 20)
    assert held_out.report.source == "x, 0.1 held out by prompt"


def test_each_side_has_its_own_report() -> None:
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


def test_a_small_fraction_holds_out_at_least_one_prompt() -> None:
    assert len(data.hold_out(pairs(*"abc"), 0.01)[1].rows) == 1


def test_rows_of_one_prompt_can_not_be_split() -> None:
    with pytest.raises(PerlError, match="leaves no rows to train on: x has only 1 distinct prompt"):
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
        (["--eval-fraction", "0.1", "--eval-data", "x.jsonl"], "--eval-data and --eval-fraction exclude each other"),
        (["--eval-fraction", "1"], "--eval-fraction must be above 0 and below 1, not 1"),
        (["--eval-fraction", "0"], "--eval-fraction must be above 0 and below 1, not 0"),
    ],
)
def test_a_fraction_that_can_not_be_is_refused(words: list[str], told: str, perl: Any) -> None:
    assert told in perl("reward", "--dry-run", *words, code=2).stderr

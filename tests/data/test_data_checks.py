"""Reports about rows before they become tokens: empty completions, duplicates, labels, overlap. Held-out rows."""

import random
from pathlib import Path
from typing import Any

import pytest
from row_samples import of, pairs

from perlcli import data
from perlcli.data import Data, Demonstration, Preference, Prompt, Thumb, checks
from perlcli.errors import PerlError

SAID = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("use", ["sft", "reward"])
def test_rows_with_an_empty_completion_are_dropped_and_counted(use: str, tmp_path: Path, write: Any) -> None:
    rows = [{"prompt": "a", "chosen": said, "rejected": "c"} for said in ("b", " ", "d")]
    found = data.load(str(write(tmp_path / "a.jsonl", rows)), use)
    assert (found.numbers, found.report.kept) == ([1, 3], 2)
    assert found.report.line().endswith("3 rows read, 2 kept; dropped 1 with an empty completion (row 2)")


def test_duplicates_are_reported_and_kept_unless_asked_otherwise(tmp_path: Path, write: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}] * 3
    found = data.load(str(write(tmp_path / "a.jsonl", rows)), "sft")
    assert (len(found.rows), found.report.repeated) == (6, [3, 4, 5, 6])
    assert "4 duplicate rows kept (rows 3, 4, 5…)" in found.report.lines()
    data.drop_repeats(found)
    assert (found.numbers, found.report.kept, found.report.repeated) == ([1, 2], 2, [])
    assert "dropped 4 repeating an earlier row (rows 3, 4, 5…)" in found.report.line()


def test_rows_of_another_kind_or_label_are_no_repeats() -> None:
    rows = of(Thumb("a", "b", True), Thumb("a", "b", False), Demonstration("a", "b"))
    checks.tally(rows)
    assert rows.report.repeated == []


def test_the_balance_of_thumbs_is_reported() -> None:
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
def test_prompts_that_differ_only_in_white_space_are_the_same(one: Any, other: Any, same: bool) -> None:
    assert (checks.prompt_digest(one) == checks.prompt_digest(other)) == same


def test_held_out_rows_whose_prompt_is_trained_on_are_reported() -> None:
    held_out = pairs("z", "a", "b ")
    held_out.report.overlap = data.overlap(pairs("a", "b", "c"), held_out)
    assert held_out.report.overlap == [2, 3]
    (warning,) = (line for line in held_out.report.lines() if line.startswith("Warning"))
    assert "2 held-out rows with a prompt that is also in the training data" in warning
    assert "(rows 2, 3)" in warning


def test_percentiles_are_lengths_that_rows_have() -> None:
    assert checks.percentiles([*range(1, 101)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert checks.percentiles([7]) == {"p50": 7, "p90": 7, "p99": 7, "max": 7}


def test_a_run_reports_overlap(perl: Any, llama: Path, tmp_path: Path, write: Any, rows: Any) -> None:
    source = rows["pairs"] / "train.jsonl"
    found = perl("reward", "-m", llama, "-d", source, "--eval-data", source, "--dry-run", "-o", tmp_path / "run").stdout
    assert "eval: Warning: 32 held-out rows with a prompt that is also in the training data" in found


@pytest.mark.slow
def test_a_run_drops_duplicates_when_asked(perl: Any, llama: Path, tmp_path: Path, write: Any) -> None:
    source = write(
        tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": "c"}]
    )
    words = ("-m", llama, "-d", source, "--dry-run", "-o", tmp_path / "run")
    assert "train: 2 duplicate rows kept (rows 2, 3)" in perl("sft", *words).stdout
    found = perl("sft", *words, "--drop-duplicates").stdout
    assert "4 rows read, 2 kept; dropped 2 repeating an earlier row (rows 2, 3)" in found
    assert "are kept" not in found


def test_no_prompt_is_on_both_sides_and_no_row_is_lost() -> None:
    rows = pairs(*(f"prompt {place % 40}" for place in range(200)))
    train, held_out = data.hold_out(rows, 0.1)
    assert data.overlap(train, held_out) == []
    assert sorted(train.numbers + held_out.numbers) == rows.numbers
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


def test_rows_with_the_same_prompt_cannot_be_split() -> None:
    with pytest.raises(PerlError, match="leaves no rows to train on: x has only 1 distinct prompt"):
        data.hold_out(pairs("a", "a", "a"), 0.5)


def dialogs(count: int) -> Data:
    """Dialogs that became two rows each, with prompts of their own."""
    found = pairs(*(f"prompt {place}" for place in range(2 * count)))
    return Data(found.rows, [place // 2 for place in range(2 * count)], found.report)


def test_the_rows_of_one_dialog_stay_together() -> None:
    for sides in (data.hold_out(dialogs(150), 0.2), data.hold_out_some(dialogs(150))):
        assert sides is not None
        train, held_out = sides
        assert not set(train.numbers) & set(held_out.numbers)
        assert len(train.rows) + len(held_out.rows) == 300


@pytest.mark.parametrize(
    ("prompts", "held_out"), [(95, None), (96, 32), (640, 32), (2000, 100), (30_000, 1000)], ids=str
)
def test_5_percent_of_the_prompts_and_at_least_32_are_held_out(prompts: int, held_out: int | None) -> None:
    sides = data.hold_out_some(pairs(*(f"prompt {place}" for place in range(prompts))))
    assert (sides and len(sides[1].rows)) == held_out
    if sides is not None:
        assert sides[0].report.held_out == held_out
        assert data.overlap(*sides) == []


def test_a_prompt_with_most_of_the_rows_is_never_held_out() -> None:
    rows = [f"prompt {place}" for place in range(100)]
    for frequent in range(0, 100, 10):
        sides = data.hold_out_some(pairs(*rows, *[f"prompt {frequent}"] * 300))
        assert sides is not None
        assert len(sides[1].rows) == 32


def test_rows_that_were_trained_on_are_left_out() -> None:
    rows = dialogs(3)
    data.drop_trained(rows, data.unpacked(data.prompts(pairs("prompt 0", "prompt 5")).packed([1, 2], b"")))
    assert [row.prompt for row in rows.rows] == ["prompt 1", "prompt 2", "prompt 3", "prompt 4"]
    assert "dropped 2 with a prompt that the model was trained on" in rows.report.line()
    with pytest.raises(PerlError, match="--skip-trained leaves no row of x"):
        data.drop_trained(rows, data.unpacked(data.prompts(rows).packed(rows.numbers, b"")))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "reward", "rl"])
def test_some_prompts_are_held_out_unless_the_fraction_is_0(
    command: str, perl: Any, llama: Path, write: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{place}?", "chosen": f"{place}!", "rejected": "no"} for place in range(120)]
    source = write(tmp_path / "pairs.jsonl", rows)
    reward = ("--reward", "perlcli.coffee:reward") if command == "rl" else ()
    words = (command, "-m", llama, "-d", source, *reward, "--dry-run", "-o", tmp_path / "run")
    found = perl(*words).stdout
    assert "Held out 32 rows for evaluation, chosen by prompt (--eval-fraction 0 trains on all)." in found
    assert f"eval: {source}, held out by prompt: pairs, 32 rows read" in found
    assert "held out" not in perl(*words, "--eval-fraction", "0").stdout
    write(source, rows[:95])
    assert "Nothing is held out for evaluation: by default that takes at least 96 prompts" in perl(*words).stdout


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_a_fraction_is_held_out_of_a_run(command: str, perl: Any, llama: Path, tmp_path: Path, rows: Any) -> None:
    source = rows["demonstrations" if command == "sft" else "pairs"] / "train.jsonl"
    words = ("-m", llama, "-d", source, "--eval-fraction", "0.25", "--dry-run", "-o", tmp_path / "run")
    output = perl(command, *words).stdout
    assert "8 held out for evaluation" in output
    assert "eval: " + str(source) + ", 0.25 held out by prompt" in output
    assert "Warning" not in output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--eval-fraction", "0.5"], "Evaluating on the first 2 rows that fit, of "),
        ([], "--max-eval-samples has no effect: no rows are held out"),
    ],
)
def test_fewer_rows_can_be_evaluated(
    words: list[str], expected: str, perl: Any, llama: Path, rows: dict[str, Path]
) -> None:
    given = ("--data", rows["pairs"] / "train.jsonl", "--max-eval-samples", "2", "--dry-run")
    assert expected in perl("reward", "--model", llama, *given, *words).output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--eval-fraction", "0.1", "--eval-data", "x.jsonl"], "--eval-data and --eval-fraction can't be combined"),
        (["--eval-fraction", "1"], "--eval-fraction must be at least 0 and below 1, not 1"),
        (["--eval-fraction", "-0.1"], "--eval-fraction must be at least 0 and below 1, not -0.1"),
    ],
)
def test_an_impossible_fraction_is_rejected(words: list[str], expected: str, perl: Any) -> None:
    assert expected in perl("reward", "--dry-run", *words, code=2).stderr

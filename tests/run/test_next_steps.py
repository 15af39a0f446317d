"""The commands that every command ends with; each is run with --dry-run, where it has that."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT

from perlcli.run import next_steps
from perlcli.run.record import RunRecord, find_record

Perl = Callable[..., Any]
DRY = ("sft", "reward", "rl", "eval", "merge")


def commands(output: str) -> list[list[str]]:
    """The commands below `Next:`, without `perl`."""
    _, found, block = output.partition("Next:\n")
    assert found, output
    lines = [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("  perl ")]
    return [words[1:] for words in lines]


def check(perl: Perl, output: str) -> list[str]:
    """Run every command below `Next:`; gives their names."""
    found = commands(output)
    assert 1 <= len(found) <= 3
    for words in found:
        perl(*words, *(["--dry-run"] if words[0] in DRY else []))
    return [words[0] for words in found]


@pytest.fixture
def held_out(write: Any) -> Path:
    """A file of 100 pairs in a folder whose name has a space, of which every stage holds out 32."""
    Path("my data").mkdir()
    rows = [{"prompt": f"what is {place}?", "chosen": f"it is {place}!", "rejected": "no"} for place in range(100)]
    return write(Path("my data/pairs.jsonl"), rows)


@pytest.mark.slow
def test_every_stage_ends_with_commands_that_work(perl: Perl, llama: Path, held_out: Path) -> None:
    sft = perl("sft", "-m", llama, "-d", held_out, "-o", "runs/sft", *SHORT).stdout
    assert check(perl, sft) == ["eval", "reward", "merge"]
    assert f"  perl eval --model runs/sft --data '{held_out}' --skip-trained --on-long drop\n" in sft
    reward = perl("reward", "-m", llama, "-d", held_out, "-o", "runs/reward", *SHORT).stdout
    assert check(perl, reward) == ["eval", "rl", "report"]
    assert f"perl rl --model runs/sft --reward runs/reward --data '{held_out}' --output runs/rl\n" in reward
    lengths = ("--max-completion-length", "8", "--num-generations", "2")
    words = ("-m", "runs/sft", "--reward", "runs/reward", "-d", held_out, "-o", "runs/rl")
    rl = perl("rl", *words, *SHORT[:6], *lengths, "--max-eval-samples", "8").stdout
    assert check(perl, rl) == ["eval", "merge", "report"]
    found = find_record("runs/rl")
    assert found is not None
    assert found.metrics["eval_prompts"] == 8
    measured = perl(*commands(rl)[0], "--max-samples", "8").stdout  # for real, into the default folder
    assert check(perl, measured) == ["report", "merge"]
    evaluated = find_record("runs/eval-rl")
    assert evaluated is not None
    assert evaluated.metrics["prompts"] == 8
    again = perl("eval", *commands(rl)[0][1:], "--max-samples", "8", "-o", "runs/eval-rl-2").stdout
    assert "perl report runs/rl runs/eval-rl-2\n" in again
    merged = perl("merge", "runs/rl").stdout
    assert check(perl, merged) == ["eval"]
    assert "perl eval --model runs/rl-merged --reward runs/reward" in merged


@pytest.mark.slow
def test_a_run_ends_with_its_commands(perl: Perl, llama: Path, held_out: Path) -> None:
    output = perl("sft", "-m", llama, "-d", held_out, "-o", "runs/sft", *SHORT[:2]).stdout
    assert [words[0] for words in commands(output)] == ["eval", "reward", "merge"]
    perl(*commands(output)[0], "--dry-run")


def test_the_embedded_data_needs_no_options() -> None:
    record = RunRecord(command="sft", settings={"output": "runs/sft", "data": None, "max_length": 128})
    record.model, record.data = {"base": "coffee base (embedded)"}, {"train": {"serves": ["sft"]}, "eval": {}}
    assert next_steps.text(record).splitlines() == [
        "Next:",
        "  perl eval --model runs/sft",
        "  perl reward --output runs/reward",
        "  perl merge runs/sft",
    ]


def test_data_that_a_user_must_bring_has_a_name_in_capitals() -> None:
    settings = {"output": "a b/sft", "data": "chats.jsonl", "max_length": 1024, "load_in_4bit": True, "full": False}
    record = RunRecord(command="sft", settings=settings)
    record.model, record.data = {"base": "org/base"}, {"train": {"serves": ["sft"]}}
    text = next_steps.text(record)
    assert "  perl reward --model org/base --load-in-4bit --data PREFERENCES.jsonl --output 'a b/reward'\n" in text
    assert "perl eval" not in text  # nothing is held out


def test_data_from_standard_input_is_not_read_again() -> None:
    settings = {"output": "runs/reward", "data": "-", "max_length": 1024}
    record = RunRecord(command="reward", settings=settings)
    record.model, record.data = (
        {"base": "org/base"},
        {"train": {"serves": ["reward", "rl"], "held_out": 32}, "eval": {}},
    )
    assert next_steps.text(record).splitlines()[1:] == [
        "  perl rl --model org/base --reward runs/reward --data PROMPTS.jsonl --output runs/rl",
        "  perl report runs/reward",
    ]


def test_the_source_is_described_again() -> None:
    settings = {"output": "runs/reward", "data": "org/data", "split": None, "max_length": 99, "columns": "prompt=q"}
    record = RunRecord(command="reward", settings=settings | {"subset": "en", "on_long": "truncate"})
    record.model, record.data = (
        {"base": "org/base"},
        {"train": {"serves": ["reward", "rl"], "held_out": 32}, "eval": {}},
    )
    assert next_steps.text(record).splitlines()[1:3] == [
        "  perl eval --model runs/reward --columns prompt=q --subset en --data org/data --max-length 99 --skip-trained "
        "--split train --on-long truncate",
        "  perl rl --model org/base --reward runs/reward --columns prompt=q --subset en --data org/data "
        "--output runs/rl",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("use", ["sft", "reward", "rl"])
def test_converted_data_can_be_checked_and_used(use: str, perl: Perl, write: Any) -> None:
    rows = [{"prompt": f"{place}?", "chosen": f"{place}!", "rejected": "no"} for place in range(3)]
    source = write(Path("a b.jsonl"), rows)
    found = check(perl, perl("data", "convert", source, "--for", use).stdout)
    assert found == ["data", "data", *([use] if use != "rl" else [])]


def test_after_quickstart_the_folder_is_quoted() -> None:
    assert "perl eval --model 'my runs'/rl --reward 'my runs'/reward" in next_steps.after_quickstart(Path("my runs"))


def test_a_comparison_is_shown_again(tmp_path: Path) -> None:
    record = RunRecord(command="compare-full", settings={"output": "runs/c"})
    assert next_steps.text(record) == "Next:\n  perl report runs/c\n  perl runs runs/c"

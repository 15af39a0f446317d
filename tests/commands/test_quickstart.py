"""`perl quickstart`: a short run of every part, and a slow one of what it promises."""

import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perlcli import coffee, data
from perlcli.run.record import read_record, write_record

Perl = Callable[..., Any]
STAGES = {"sft": 2, "reward": 2, "rl": 2, "eval-base": 0, "eval-sft": 0, "eval-rl": 0}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, perl: Perl) -> Iterator[tuple[Path, str]]:
    """The folder and the output of a quickstart with two steps per stage on few rows."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    kinds = {"sft": coffee.demonstrations, "reward": coffee.preferences, "rl": coffee.prompts}
    with pytest.MonkeyPatch.context() as patch:
        for (use, split), _ in list(data.EMBEDDED_ROWS.items()):
            count = 64 if split == "train" else 12
            patch.setitem(data.EMBEDDED_ROWS, (use, split), lambda kind=kinds[use], s=split, n=count: kind(s, n))
        patch.setitem(coffee.SETTINGS, "eval", {**coffee.SETTINGS["eval"], "max_samples": 6})
        yield folder, perl("quickstart", "--max-steps", "2", "--output", folder).stdout


@pytest.mark.slow
def test_resumed_quickstart_continues_where_it_stopped(
    quick: tuple[Path, str], tmp_path: Path, perl: Perl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished stages stay, interrupted training resumes, and a stage without a record starts over."""
    folder = shutil.copytree(quick[0], tmp_path / "run")
    for path in ("settings.yaml", "record.json"):
        text = (folder / path).read_text()
        (folder / path).write_text(text.replace(str(quick[0]), str(folder)))
    record = read_record(folder)
    record.status = "interrupted"
    write_record(folder, record)
    (folder / "eval-rl" / "record.json").unlink()
    shutil.rmtree(folder / "eval-sft")
    monkeypatch.setitem(coffee.SETTINGS, "eval", {**coffee.SETTINGS["eval"], "max_samples": 6})
    told = perl("quickstart", "--max-steps", "2", "--output", folder, "--resume").stdout
    assert told.count("(already done)") == 4
    assert read_record(folder).status == "finished"
    assert {read_record(folder / name).status for name in STAGES} == {"finished"}


@pytest.mark.slow
def test_every_stage_leaves_its_run(quick: tuple[Path, str]) -> None:
    folder, _ = quick
    assert {path.name for path in folder.iterdir()} == {*STAGES, "data", "plots", "record.json", "settings.yaml"}
    assert {path.name for path in (folder / "data").iterdir()} == {
        "demonstrations.jsonl",
        "preferences.jsonl",
        "prompts.jsonl",
        "test-preferences.jsonl",
        "test-prompts.jsonl",
    }
    assert (folder / "plots" / "success.png").stat().st_size > 0
    for name, steps in STAGES.items():
        found = read_record(folder / name)
        assert (found.status, found.steps, found.seed) == ("finished", steps, 0)
        assert found.model["base"] == "coffee base (embedded)"


@pytest.mark.slow
def test_each_stage_uses_those_before(quick: tuple[Path, str]) -> None:
    folder, _ = quick
    found = read_record(folder / "rl")
    assert (found.settings["model"], found.settings["reward"]) == (str(folder / "sft"), [str(folder / "reward")])
    assert any("an adapter on the policy's base" in note for note in found.notes)
    assert read_record(folder / "eval-rl").settings["model"] == str(folder / "rl")
    assert f"anchor: {folder / 'sft'}, where RL started" in read_record(folder / "eval-rl").notes


def test_record_holds_the_figures_of_the_stages(quick: tuple[Path, str]) -> None:
    folder, _ = quick
    found = read_record(folder)
    assert (found.command, found.status) == ("quickstart", "finished")
    wanted = {"reward_accuracy": read_record(folder / "reward").metrics["accuracy"]}
    for name in ("base", "sft", "rl"):
        measured = read_record(folder / f"eval-{name}").metrics
        wanted |= {f"{name}_gold": measured["gold"], f"{name}_mean_reward": measured["mean_reward"]}
    assert found.metrics == wanted


def test_table_shows_base_sft_and_rl(quick: tuple[Path, str]) -> None:
    folder, said = quick
    lines = said.splitlines()
    top = next(index for index, line in enumerate(lines) if "orders right" in line)
    assert [line.split()[0] for line in lines[top + 2 : top + 5]] == ["base", "SFT", "RL"]
    gold = read_record(folder).metrics["rl_gold"]
    assert lines[top + 4].split()[1] == f"{gold:.1%}"
    assert f"Picture: {folder}/plots/success.png" in said
    assert "\x1b" not in said
    assert max(map(len, lines)) <= 240  # the paths of a test run are long


@pytest.mark.slow
def test_commands_that_come_next_would_run(quick: tuple[Path, str], perl: Perl) -> None:
    _, said = quick
    commands = [shlex.split(line.split("     ")[0]) for line in said.splitlines() if line.startswith("  perl ")]
    assert [words[1] for words in commands] == ["eval", "rl", "reward"]
    for words in commands[:2]:  # the last one is on a model and data that the user brings
        perl(*words[1:], "--dry-run")


def test_non_empty_folder_is_rejected(quick: tuple[Path, str], perl: Perl) -> None:
    folder, _ = quick
    result = perl("quickstart", "--output", folder, code=2)
    assert f"Error: --output {folder} is not empty\nHint: --resume to continue, --overwrite" in result.stderr


def test_dry_run_writes_nothing(perl: Perl) -> None:
    assert "Would run sft, reward, rl and eval" in perl("quickstart", "--dry-run").stdout
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_quickstart_reaches_the_documented_accuracy(perl: Perl) -> None:
    perl("quickstart", "--output", "run")
    found = read_record(Path("run")).metrics
    assert found["reward_accuracy"] >= 0.90
    assert found["rl_gold"] >= 0.80
    assert found["rl_gold"] >= found["sft_gold"] + 0.30

"""The examples: every YAML file is valid for the command that it names, and every command of a script works."""

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perlcli import coffee, settings
from perlcli.commands import early, evaluate, reward, rl, sft
from perlcli.settings.yaml import read_config

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CONFIGS = {str(path.relative_to(ROOT)): path for path in sorted(EXAMPLES.rglob("*.yaml"))}
SCRIPTS = {str(path.relative_to(ROOT)): path for path in sorted(EXAMPLES.rglob("*.sh"))}
STAGES: dict[str, Any] = {"sft": sft, "reward": reward, "rl": rl, "eval": evaluate}

Perl = Callable[..., Any]


def commands(script: Path) -> list[list[str]]:
    """The words of every `perl …` line of a script."""
    lines = script.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("perl ")]


def check(command: str, given: Any) -> None:
    """Check settings as a run does before it reads models and data."""
    resolved = settings.resolve(given, {})
    settings.check(resolved)
    if command != "eval":
        STAGES[command].trainer_args(resolved)


def test_there_are_examples() -> None:
    assert CONFIGS
    assert SCRIPTS


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_valid_for_the_command_that_it_names(name: str) -> None:
    first = CONFIGS[name].read_text(encoding="utf-8").splitlines()[0]
    start, command, option, path = first.removeprefix("# ").split()
    assert (start, option, path) == ("perl", "--config", name)
    values = read_config(settings.COMMANDS[command], CONFIGS[name])
    check(command, settings.build(settings.COMMANDS[command], values))


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_has_valid_commands(name: str, perl: Perl, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    for stage in STAGES.values():
        monkeypatch.setattr(stage, "run", given.append)
    monkeypatch.setattr(
        early, "check", lambda settings_of_line: settings_of_line
    )  # no earlier line ran, no Hub is there
    lines = SCRIPTS[name].read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    change = next(line for line in lines if line.startswith('cd "$(dirname "$0")'))
    monkeypatch.chdir(SCRIPTS[name].parent / change.removeprefix('cd "$(dirname "$0")').strip('/"'))
    for words in commands(SCRIPTS[name]):
        perl(*words)
        check(words[0], given[-1])
    assert len(given) == len(commands(SCRIPTS[name])) > 0


@pytest.mark.parametrize("command", ["sft", "reward", "rl"])
def test_coffee_spells_out_the_embedded_defaults(command: str) -> None:
    values = read_config(settings.COMMANDS[command], EXAMPLES / "coffee" / f"{command}.yaml")
    own = {"lora_r"} if "model" in values else set()  # RL starts from an adapter that has its own
    given = {name: value for name, value in values.items() if name not in ("model", "reward", "output")}
    assert given == {name: value for name, value in coffee.SETTINGS[command].items() if name not in own}


@pytest.mark.slow
def test_function_example_runs_from_its_folder(perl: Perl, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXAMPLES / "function-reward", "example")
    monkeypatch.chdir("example")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "short_reward", raising=False)
    (words,) = commands(Path("run.sh"))
    perl(*words, "--max-steps", "1", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1")
    assert (Path("runs") / "function-reward" / "adapter_model.safetensors").exists()

"""Several processes are refused before anything is written; a single launched one is ordinary."""

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.run import launch

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("command", [*settings.COMMANDS, "data convert"])
def test_several_processes_are_refused_before_anything_is_written(
    command: str, perl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    words = ("x.jsonl", "--for", "sft") if command == "data convert" else ()
    output = ("--output", tmp_path / "run") if command != "data convert" else ()
    result = perl(*command.split(), *words, *output, code=2)
    assert result.stderr.splitlines() == [
        f"Error: perl {command} was started in 2 processes (WORLD_SIZE=2), but runs in only one: several processes are "
        "not supported yet",
        f"Hint: {launch.HINT}",
    ]
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", launch.SIZES)
def test_every_launcher_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "4")
    with pytest.raises(PerlError, match=rf"^perl sft was started in 4 processes \({name}=4\)"):
        launch.check("sft")
    monkeypatch.setenv(name, "many")
    with pytest.raises(PerlError, match=f"{name} must be a whole number, not 'many'"):
        launch.check("sft")
    monkeypatch.setenv(name, "1")
    launch.check("sft")


def test_commands_that_only_read_run_anywhere(perl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "No runs in" in perl("runs", tmp_path).stdout


def test_a_single_launched_process_is_an_ordinary_one(
    perl: Any, llama: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With LOCAL_RANK set, accelerate would wait for others at an address that nobody listens to."""
    for name, value in {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    perl("sft", "--model", llama, "--data", rows["demonstrations"], "--output", tmp_path / "run", *SHORT)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert "LOCAL_RANK" not in os.environ

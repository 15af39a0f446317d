"""Several processes are refused before anything is written; a single launched one is ordinary."""

import os
import time
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
    for name, value in {**TORCHRUN, "RANK": "0"}.items():
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


@pytest.mark.slow
def test_a_single_launched_process_is_an_ordinary_one(
    perl: Any, llama: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With LOCAL_RANK set, accelerate would wait for others at an address that nobody listens to."""
    for name, value in {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    perl("sft", "--model", llama, "--data", rows["demonstrations"], "--output", tmp_path / "run", *SHORT)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize("name", launch.RANKS)
def test_only_the_first_of_several_processes_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait, because torchrun ends all of them when the first one ends."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit, match=r"^2$"):
        launch.check("sft")
    assert waited == [launch.PATIENCE] and "".join(capsys.readouterr()) == ""


@pytest.mark.parametrize("name", launch.ACCELERATE)
def test_what_accelerate_would_read_from_the_environment_is_refused(
    name: str, perl: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in launch.ACCELERATE[name][0]:  # as `accelerate launch` sets it where nothing was asked for
        monkeypatch.setenv(name, value)
        launch.check("sft")
    monkeypatch.setenv(name, "bf16")
    result = perl("sft", "--output", tmp_path / "run", code=2)
    first, second = result.stderr.splitlines()
    assert first.startswith(f"Error: perl sft was started with {name}=bf16, as accelerate launch sets it: ")
    assert second.startswith("Hint: ") and second.endswith(f", or unset {name}")
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


def test_accelerate_on_the_cpu_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's trainers would leave the GPU that the model is on."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    launch.check("sft")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch.check("sft")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and "ACCELERATE_USE_CPU" not in os.environ

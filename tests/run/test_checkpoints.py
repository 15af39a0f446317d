"""Checkpoints: whole or none."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from perlcli.run import checkpoints, disk

RUN = Path("checkpoints")


def write(step: int, where: Path | None = None) -> Path:
    """A checkpoint as a trainer writes it."""
    folder = (where or checkpoints.side(RUN)) / f"checkpoint-{step}"
    (folder / "value").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"state" * step)
    (folder / "value" / "adapter.safetensors").write_bytes(b"weights")
    (folder / checkpoints.STATE).write_text(json.dumps({"global_step": step}))
    return folder


def kept(*steps: int, limit: int | None = None) -> list[Path]:
    for step in steps:
        write(step)
        checkpoints.keep(RUN, step, limit)
    return checkpoints.found(RUN)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_checkpoint_counts_once_it_is_whole() -> None:
    write(3)
    assert checkpoints.found(RUN) == []
    place = checkpoints.keep(RUN, 3, None)
    assert checkpoints.found(RUN) == [place] and checkpoints.fault(place) is None
    assert set(json.loads((place / "manifest.json").read_text())["files"]) == {
        "optimizer.pt", "value/adapter.safetensors", "trainer_state.json",
    }  # fmt: skip
    assert checkpoints.step_of(place) == 3


def test_the_oldest_go_and_steps_count_as_numbers() -> None:
    assert names(kept(8, 9, 10, 11, limit=3)) == ["checkpoint-11", "checkpoint-10", "checkpoint-9"]


def test_a_checkpoint_of_the_same_step_is_replaced() -> None:
    (first,) = kept(2)
    (first / "old").touch()
    (again,) = kept(2)
    assert not (again / "old").exists() and checkpoints.fault(again) is None


def test_nothing_counts_that_a_kill_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two steps of keeping, what was there before is what counts."""
    kept(1)
    write(2)
    for name in ("seal", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, name, lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                checkpoints.keep(RUN, 2, None)
        assert names(checkpoints.found(RUN)) == ["checkpoint-1"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.keep(RUN, 2, None)
    assert names(checkpoints.found(RUN)) == ["checkpoint-1"]
    checkpoints.begin(RUN)
    assert not checkpoints.side(RUN).exists()


def unlink(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (unlink("manifest.json"), "has no manifest.json, so it is incomplete"),
        (put("manifest.json", b""), "is damaged: its manifest.json can't be read"),
        (put("manifest.json", b"\xff{"), "is damaged: its manifest.json can't be read"),
        (put("manifest.json", b"[]"), "is damaged: its manifest.json can't be read"),
        (put("manifest.json", b'{"files": 3}'), "is damaged: its manifest.json can't be read"),
        (unlink("optimizer.pt"), "is damaged: optimizer.pt is missing"),
        (put("optimizer.pt", b"state"), "is damaged: optimizer.pt has changed since it was written"),
        (
            put("value/adapter.safetensors", b"weightz"),
            "is damaged: value/adapter.safetensors has changed since it was written",
        ),
        (put("planted.pkl", b"evil"), "is damaged: it contains planted.pkl, which its run did not write"),
    ],
)
def test_damage_is_found_and_named_and_the_one_before_is_taken(damage: Callable[[Path], object], told: str) -> None:
    last, before = kept(1, 2)
    damage(last)
    assert checkpoints.fault(last) == told
    said: list[str] = []
    assert checkpoints.last_complete(RUN, lambda path: None, said.append) == before
    assert said == [f"checkpoint-2 {told}. Deleting it."]
    assert not last.exists()


def test_every_folder_of_a_checkpoint_is_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that goes down could take an adapter's file names with it."""
    synced: list[Path] = []
    for module in (checkpoints, disk):
        monkeypatch.setattr(module, "sync", synced.append)
    place = write(1)
    checkpoints.seal(place)
    assert {place, place / "value", place / "value" / "adapter.safetensors", place / "manifest.json"} <= {*synced}
    assert synced[-1] == place


def test_a_disk_that_fails_makes_no_checkpoint_a_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can't be read for now would be deleted else."""
    kept(1)
    error = OSError(errno.EIO, "Input/output error", str(RUN / "checkpoint-1" / "manifest.json"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(Path, "read_text", mock.Mock(side_effect=error))
        checkpoints.last_complete(RUN, lambda path: None, print)
    assert names(checkpoints.found(RUN)) == ["checkpoint-1"]


def test_a_caller_may_find_faults_of_its_own() -> None:
    kept(1, 2)
    said: list[str] = []
    found = checkpoints.last_complete(RUN, lambda path: "is too new" if path.name.endswith("2") else None, said.append)
    assert found and found.name == "checkpoint-1"
    assert said == ["checkpoint-2 is too new. Deleting it."]


def test_without_any_there_is_none() -> None:
    assert checkpoints.last_complete(RUN, lambda path: None, print) is None

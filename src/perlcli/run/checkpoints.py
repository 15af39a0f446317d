"""Checkpoints: written to the side, whole only with a manifest of checksums; what isn't whole is never loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perlcli.run.disk import sync, sync_names

SIDE = ".writing"  # where the trainer writes, below the folder of checkpoints
HERE = ".here"  # marks the folder as long as its run is at work: one that the trainer made again hasn't got it
MANIFEST = "manifest.json"
STATE = "trainer_state.json"  # transformers': how far the training was
# What trainers write and nothing of ours reads: a pickle with paths and whatever else the trainer was told, a card.
UNREAD = ("training_args.bin", "README.md")
PICKLES = ("pytorch_model.bin", "adapter_model.bin")  # weights as others keep them: ours are safetensors
NAME = re.compile(r"checkpoint-(\d+)")
Say = Callable[[str], None]


def side(folder: Path) -> Path:
    """The folder that a trainer is to write its checkpoints into: from there `keep` takes them once they are whole."""
    return folder / SIDE


def begin(folder: Path) -> None:
    """Make the folder and mark it, and clear away what a killed run left half-written."""
    clear(folder)
    folder.mkdir(exist_ok=True)
    (folder / HERE).touch()


def clear(folder: Path) -> None:
    """Delete what is half-written, and the mark of a run at work."""
    (folder / HERE).unlink(missing_ok=True)
    if side(folder).is_symlink():
        side(folder).unlink()  # nobody's checkpoints go elsewhere
    shutil.rmtree(side(folder), ignore_errors=True)


def keep(folder: Path, step: int, limit: int | None) -> Path:
    """Seal the checkpoint of a step that lies at the side, bring it to the disk and to its place; then delete all but
    the `limit` newest. A run that is killed in between has the ones before."""
    written, kept = side(folder) / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    seal(written)
    if kept.exists():
        shutil.rmtree(kept)  # of a run that was killed after it, and went on from one before
    os.replace(written, kept)
    sync(folder)
    for old in found(folder)[limit:] if limit else ():
        discard(old)
    return kept


def seal(checkpoint: Path) -> None:
    """Bring a checkpoint's files to the disk, and write their checksums beside them."""
    for path in [path for name in UNREAD for path in checkpoint.rglob(name)]:
        path.unlink()
    files = [*files_of(checkpoint)]
    for path in files:
        sync(path)
    sums = {str(path.relative_to(checkpoint)): checksum(path) for path in files}
    manifest = checkpoint / MANIFEST
    manifest.write_text(json.dumps({"files": sums}, indent=2) + "\n", encoding="utf-8")
    sync(manifest)
    sync_names(checkpoint, files)  # an adapter in it has a folder of its own


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, in words that go behind its name; None for a whole one."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = dict(sums)
    except FileNotFoundError:
        return f"has no {MANIFEST}, as one that is half written"
    except (IsADirectoryError, ValueError, KeyError, TypeError):  # a disk that fails makes no checkpoint a bad one
        return f"is damaged: its {MANIFEST} can't be read"
    present = {str(path.relative_to(checkpoint)) for path in files_of(checkpoint)}
    missing, foreign = sorted(set(wanted) - present), sorted(present - set(wanted))
    if missing:
        return f"is damaged: it lacks {missing[0]}"
    if foreign:
        return f"is damaged: it has {foreign[0]}, which isn't of its run"
    if pickle := next((name for name in sorted(wanted) if Path(name).name in PICKLES), None):
        return f"holds {pickle}, a pickle: weights are safetensors alone"
    changed = next((name for name in sorted(wanted) if checksum(checkpoint / name) != wanted[name]), None)
    return None if changed is None else f"is damaged: {changed} isn't what was written"


def last_whole(folder: Path, fault_of: Callable[[Path], str | None], say: Say) -> Path | None:
    """The newest checkpoint that is whole and in which `fault_of` finds nothing; the others are named and deleted."""
    for checkpoint in found(folder):
        wrong = fault(checkpoint) or fault_of(checkpoint)
        if wrong is None:
            return checkpoint
        say(f"{checkpoint.name} {wrong}. It is deleted.")
        discard(checkpoint)
    return None


def found(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    numbered = [(int(match[1]), path) for path in _entries(folder) if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of."""
    return int(checkpoint.name.rpartition("-")[2])


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What transformers keeps of how far the training was."""
    found: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return found


def planned(folder: Path) -> int:
    """The steps that a run was to have when it wrote its last whole checkpoint; 0 without one."""
    whole = next((checkpoint for checkpoint in found(folder) if fault(checkpoint) is None), None)
    return int(state_of(whole)["max_steps"]) if whole is not None else 0


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: what is left of it if this is cut off is none."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def files_of(checkpoint: Path) -> Iterator[Path]:
    """The files of a checkpoint but for its manifest, and links, as what lies behind one is not of the checkpoint."""
    found = (path for path in checkpoint.rglob("*") if path.is_file() or path.is_symlink())
    return (path for path in found if path != checkpoint / MANIFEST)


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()] if folder.is_dir() else []

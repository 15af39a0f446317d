"""Checkpoints: complete only with a manifest of checksums; incomplete ones are never loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perlcli.run.disk import grant, sync, sync_names

SIDE = ".writing"  # where the trainer writes, below the folder of checkpoints
HERE = ".here"  # marks the folder during a run: if it is deleted and the trainer creates it again, the mark is missing
MANIFEST = "manifest.json"
STATE = "trainer_state.json"  # by transformers: how far the training is
# Written by trainers and never read here: a pickle of the trainer's arguments, with paths, and a card.
UNREAD = ("training_args.bin", "README.md")
PICKLES = ("pytorch_model.bin", "adapter_model.bin")  # formats of weights that are never loaded
NAME = re.compile(r"checkpoint-(\d+)")


def side(folder: Path) -> Path:
    """The folder that a trainer writes its checkpoints to; `keep` moves them from there once they are complete."""
    return folder / SIDE


def begin(folder: Path) -> None:
    """Create and mark the folder, and delete what a killed run left half-written."""
    clear(folder)
    folder.mkdir(exist_ok=True)
    (folder / HERE).touch()


def clear(folder: Path) -> None:
    """Delete half-written checkpoints, and the mark of a run in progress."""
    (folder / HERE).unlink(missing_ok=True)
    if side(folder).is_symlink():
        side(folder).unlink()  # never write or delete outside the folder
    shutil.rmtree(side(folder), ignore_errors=True)


def keep(folder: Path, step: int, limit: int | None) -> Path:
    """Complete the checkpoint that was written for a step and move it to its place; then keep the `limit` newest ones.
    A run that is killed meanwhile still has the earlier checkpoints."""
    written, kept = side(folder) / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    seal(written)
    if kept.exists():
        shutil.rmtree(kept)  # written before the run was killed and resumed from an earlier one
    os.replace(written, kept)
    sync(folder)
    if limit:
        for old in found(folder)[limit:]:
            discard(old)
    return kept


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint's files to the disk and write the manifest of their checksums."""
    for path in files_of(checkpoint):
        if path.name in UNREAD:
            path.unlink()
    files = files_of(checkpoint)
    for path in files:
        if not path.is_symlink():  # whose file isn't the run's
            grant(path)
        sync(path)
    sums = {str(path.relative_to(checkpoint)): checksum(path) for path in files}
    manifest = checkpoint / MANIFEST
    manifest.write_text(json.dumps({"files": sums}, indent=2) + "\n", encoding="utf-8")
    sync(manifest)
    sync_names(checkpoint, files)  # an adapter may be in a subfolder


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words that follow its name; None if it matches its manifest."""
    try:
        wanted = dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"])
    except FileNotFoundError:
        return f"has no {MANIFEST}, so it is incomplete"
    except (IsADirectoryError, ValueError, KeyError, TypeError):  # a failing disk raises: the checkpoint may be fine
        return f"is damaged: its {MANIFEST} can't be read"
    present = {str(path.relative_to(checkpoint)) for path in files_of(checkpoint)}
    missing, foreign = sorted(set(wanted) - present), sorted(present - set(wanted))
    if missing:
        return f"is damaged: {missing[0]} is missing"
    if foreign:
        return f"is damaged: it contains {foreign[0]}, which its run did not write"
    pickle = next((name for name in sorted(wanted) if Path(name).name in PICKLES), None)
    if pickle:
        return f"contains {pickle}, a pickle: weights must be safetensors"
    changed = next((name for name in sorted(wanted) if checksum(checkpoint / name) != wanted[name]), None)
    return None if changed is None else f"is damaged: {changed} has changed since it was written"


def last_complete(folder: Path, fault_of: Callable[[Path], str | None], say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint in which `fault_of` finds nothing; newer ones are reported and deleted."""
    for checkpoint in found(folder):
        wrong = fault(checkpoint) or fault_of(checkpoint)
        if wrong is None:
            return checkpoint
        say(f"{checkpoint.name} {wrong}. Deleting it.")
        discard(checkpoint)
    return None


def found(folder: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    own = [path for path in entries if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(own, key=step_of, reverse=True)


def last_step(folder: Path) -> int | None:
    """The step of the newest checkpoint that was written completely; None without one. Reads no weights."""
    return next((step_of(checkpoint) for checkpoint in found(folder) if (checkpoint / MANIFEST).is_file()), None)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state, as transformers writes it."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def planned(folder: Path) -> int:
    """The total steps that a run planned when it wrote its last complete checkpoint; 0 without one."""
    totals = (int(state_of(checkpoint)["max_steps"]) for checkpoint in found(folder) if fault(checkpoint) is None)
    return next(totals, 0)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: if this is interrupted, the rest does not count as a checkpoint."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def files_of(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint and the links in it, without its manifest."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() or path.is_symlink()]
    return [path for path in files if path != checkpoint / MANIFEST]


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

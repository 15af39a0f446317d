"""Failing disks: what happened, in plain words, and files that are written completely or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from perlcli.errors import RunFailed, line
from perlcli.terminal import say

SIDE = ".saving"  # below a run's folder: its last files are written here until they are complete
WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of a file is reached",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "input/output error, the disk may be failing",
}
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # more space would help
BY_WRITING = (*ROOM, errno.EROFS, errno.EIO)  # writing to an open file can raise these without a file name
RUST = re.compile(r"\(os error (\d+)\)")  # in the errors of safetensors and tokenizers
TORCH = ("PytorchStreamWriter", "inline_container", "iostream error")  # torch.save gives no reason
PROBE_BYTES = 1 << 20


def failure(error: BaseException, folder: Path, parts: Sequence[str], how_to_continue: str) -> RunFailed | None:
    """The error in plain words if the disk below a folder failed or the folder is gone; None for other errors. `parts`
    are the files that prove that the folder is still the run's (none before it is created), and `how_to_continue` is
    what to type once the disk works again."""
    if not isinstance(error, Exception):
        return None
    lost = vanished(folder, parts, how_to_continue) if parts else None
    code = code_of(error)
    if lost is not None or code is None:
        return lost  # the cause of whatever failed
    code = code or probe(folder)
    if not code:
        return RunFailed(f"Can't write to {folder}: {line(error, 600)}", how_to_continue)
    place = getattr(error, "filename", None) or str(folder)
    is_inside = Path(str(place)).resolve().is_relative_to(folder.resolve())
    if code in GONE and is_inside:
        return gone(place, how_to_continue)
    if code in ROOM or (code in WORDS and is_inside):
        cure = "free disk space" if code in ROOM else "fix that"
        problem = f"Can't write to {folder if is_inside else place}: {WORDS[code]}"
        return RunFailed(problem, f"{cure}, then {how_to_continue}")
    return None


def vanished(folder: Path, parts: Sequence[str], how_to_continue: str) -> RunFailed | None:
    """The error if a folder or one of its parts is gone; None if all are there. A part whose name starts with a dot
    marks its folder: if a library creates the folder again, the mark is missing."""
    missing = next((place for place in (folder, *(folder / part for part in parts)) if not place.exists()), None)
    if missing is None:
        return None
    if missing.name.startswith(".") and missing != folder:
        return gone(missing.parent, how_to_continue)
    again = "run the same command again"
    return gone(missing, again if missing == folder else f"delete what is left of {folder}, then {again}")


def gone(place: object, how_to_continue: str) -> RunFailed:
    """The error for a file or folder that was deleted during the run."""
    return RunFailed(f"{place} is gone: it was deleted during the run", how_to_continue)


def code_of(error: BaseException) -> int | None:
    """The errno of a failure to read or write; 0 if a library hides it, None for other errors."""
    if isinstance(error, OSError):
        is_unclear = error.filename is None and error.errno not in BY_WRITING
        return None if is_unclear else error.errno
    text = str(error)
    if match := RUST.search(text):
        return int(match[1])
    if any(mark in text for mark in TORCH) and "Reader" not in text:
        return 0
    return next((code for code in ROOM if os.strerror(code) in text), None)


def probe(folder: Path) -> int:
    """Why a file can't be written into a folder, as errno; 0 if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or 0
    return 0


def why_closed(folder: Path) -> str | None:
    """Why a folder can't be written to or created, in words; None if it can."""
    existing = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if existing is None:
        return f"{folder} can't be created"
    if not os.access(existing, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        return f"{existing} {'is on a read-only disk' if is_read_only else 'is not writable'}"
    usage = shutil.disk_usage(existing)
    is_full = usage.total and usage.free < PROBE_BYTES  # some network disks report no size
    return f"the disk of {existing} is full" if is_full else None


def grant(path: Path) -> None:
    """Give a file the permissions that the umask gives to new ones. Temporary files have 0600, which locks out other
    users, and so has what safetensors 0.8 writes (github.com/safetensors/safetensors/issues/782): until that is fixed,
    this concerns weights, too."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    with suppress(PermissionError):  # a disk without permissions
        path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def sync_names(folder: Path, files: Iterable[Path]) -> None:
    """Wait until the names of these files are on the disk, too: in their folders, then in `folder`."""
    for place in sorted({folder, *(path.parent for path in files)}, reverse=True):
        sync(place)


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A folder to write into; at the end its files move into `folder`, once all are on the disk. If writing fails,
    `folder` keeps its old files."""
    side = folder / SIDE
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir()
    try:
        yield side
        targets = {path: folder / path.relative_to(side) for path in sorted(side.rglob("*")) if path.is_file()}
        for path, target in targets.items():
            grant(path)
            sync(path)
            target.parent.mkdir(parents=True, exist_ok=True)
        for path, target in targets.items():
            os.replace(path, target)
        sync_names(folder, targets.values())
    finally:
        shutil.rmtree(side, ignore_errors=True)


def tell(text: str, *, error: bool = False) -> None:
    """Print a line; if it goes to a log on a full disk, it is lost and the run continues."""
    try:
        say(text, sys.stderr if error else None)
    except BrokenPipeError:
        raise
    except OSError:
        return

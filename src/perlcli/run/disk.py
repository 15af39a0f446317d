"""When the disk fails a run: what happened, in plain words, and files that are written whole or not at all."""

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

SIDE = ".saving"  # where a run's last files are written, below its folder, until they are whole
WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not grow as large as it has to",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "it may not be written to",
    errno.EPERM: "it may not be written to",
    errno.EIO: "the disk fails (input/output error)",
}
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what more room would cure
BY_WRITING = (*ROOM, errno.EROFS, errno.EIO)  # what writing into an open file can meet, where the system names none
RUST = re.compile(r"\(os error (\d+)\)")  # as safetensors and tokenizers tell the system's errors
TORCH = ("PytorchStreamWriter", "inline_container", "iostream error")  # torch.save tells no reason
PROBE_BYTES = 1 << 20


def failure(error: BaseException, folder: Path, parts: Sequence[str], way_on: str) -> RunFailed | None:
    """The error in words, where the disk below a folder failed or the folder vanished; None for any other.

    `parts` are what the folder holds as long as it stands (nothing, where it hasn't been made yet), `way_on` is what to
    type once the disk is well again.
    """
    if not isinstance(error, Exception):
        return None
    if parts and (lost := vanished(folder, parts, way_on)):
        return lost  # whatever else failed for it
    code = code_of(error)
    if code is None:
        return None
    return _in_words(error, code or probe(folder), folder, way_on)


def _in_words(error: Exception, code: int, folder: Path, way_on: str) -> RunFailed | None:
    place = getattr(error, "filename", None) or str(folder)
    is_inside = Path(str(place)).resolve().is_relative_to(folder.resolve())
    if code in GONE and is_inside:
        return gone(place, way_on)
    if code in ROOM or (code in WORDS and is_inside):
        cure = "make room" if code in ROOM else "put it right"
        return RunFailed(f"Can't write to {folder if is_inside else place}: {WORDS[code]}", f"{cure}, then {way_on}")
    return None if code else RunFailed(f"Can't write to {folder}: {line(error, 600)}", way_on)


def vanished(folder: Path, parts: Sequence[str], way_on: str) -> RunFailed | None:
    """The error of a folder that isn't there any more, or has lost one of its parts; None where it stands.

    A part with a dot is a mark of the folder that it lies in: one that a library made again hasn't got it.
    """
    missing = next((place for place in (folder, *(folder / part for part in parts)) if not place.exists()), None)
    if missing is None:
        return None
    if missing.name.startswith(".") and missing != folder:
        return gone(missing.parent, way_on)
    again = "the same command begins again"
    return gone(missing, again if missing == folder else f"{again}, once nothing is left of {folder}")


def gone(place: object, way_on: str) -> RunFailed:
    """The error of something that was there and is no more."""
    return RunFailed(f"{place} has vanished: it was deleted while the run was at work", way_on)


def code_of(error: BaseException) -> int | None:
    """The system's number of an error of reading or writing; 0 where a library tells none, None for other errors."""
    if isinstance(error, OSError):
        is_unclear = error.filename is None and error.errno not in BY_WRITING
        return None if is_unclear else error.errno
    text = str(error)
    if found := RUST.search(text):
        return int(found[1])
    if any(mark in text for mark in TORCH) and "Reader" not in text:
        return 0
    return next((code for code in ROOM if os.strerror(code) in text), None)


def probe(folder: Path) -> int:
    """Why a file can't be written into a folder, as the system's number; 0 where it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or 0
    return 0


def why_closed(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or made where it isn't yet, in words; None where it can."""
    standing = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if not standing.exists():
        return f"{standing} can't be made"
    if not os.access(standing, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(standing).f_flag & os.ST_RDONLY
        return f"{standing} {'lies on a read-only disk' if is_read_only else 'may not be written to'}"
    usage = shutil.disk_usage(standing)
    is_full = usage.total and usage.free < PROBE_BYTES  # some network disks tell no size
    return f"the disk of {standing} is full" if is_full else None


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def sync_names(folder: Path, files: Iterable[Path]) -> None:
    """Wait until a folder, and before it those in it, know these files by name on the disk, too."""
    for place in sorted({folder, *(path.parent for path in files)}, reverse=True):
        sync(place)


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files take their places in `folder` at the end, once all are on the disk.

    Where writing fails, what lay in `folder` is as it was.
    """
    side = folder / SIDE
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir()
    try:
        yield side
        files = [path for path in sorted(side.rglob("*")) if path.is_file()]
        for path in files:
            sync(path)
        for path in files:
            (folder / path.relative_to(side)).parent.mkdir(parents=True, exist_ok=True)
        for path in files:
            os.replace(path, folder / path.relative_to(side))
        sync_names(folder, [folder / path.relative_to(side) for path in files])
    finally:
        shutil.rmtree(side, ignore_errors=True)


def tell(text: str, *, error: bool = False) -> None:
    """Print a line; where it goes into a log whose disk is full it is lost, and ends no run."""
    try:
        say(text, sys.stderr if error else None)
    except BrokenPipeError:
        raise
    except OSError:
        return


def remove_empty(*folders: Path) -> None:
    """Take away folders that hold nothing: those that a library made again where a run's own had been deleted."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()

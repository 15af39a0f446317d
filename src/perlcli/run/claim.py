"""The claim on an output folder: only one run at a time writes to it.

A claim is a lock on a file in the folder, which the operating system releases when the process ends in any way, `kill
-9` included. It holds on local disks and, between machines too, on NFS and other network disks that support `flock`;
where a disk has no locks, `output_folder` still finds runs of this machine by their record. `_claims` is global since
locks belong to the process: a forked one must know them, and the end of a command releases what is left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perlcli.errors import PerlError, reason

LOCK = ".perlcli.lock"
HINT = "wait until it ends, stop it, or choose another --output"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from disks that can't lock files
TRIES, PAUSE = 20, 0.02  # another process holds the lock for a moment when it only looks whether it is free
File = tuple[int, int]  # device and inode


class Claim:
    """This process's claim on a folder by an open file; `made` are the folders that it created, outermost first."""

    def __init__(self, folder: Path, place: int, made: list[Path]) -> None:
        self.folder, self.place, self.made = folder, place, made
        self.is_used = False  # by a run that writes to the folder
        self.is_locked = True  # False on a disk without locks
        self.file = _file(os.fstat(place))

    @property
    def is_lost(self) -> bool:
        """Whether the folder was deleted and another run has claimed the new one of its name."""
        with suppress(OSError):
            return _file((self.folder / LOCK).stat()) != self.file
        return False

    def release(self) -> None:
        """Give the folder up, and delete it if nothing was written to it."""
        if _claims.pop(self.file, None) is None:
            return
        with suppress(OSError):
            if not self.is_lost:
                (self.folder / LOCK).unlink()
        os.close(self.place)
        with suppress(OSError):  # not empty
            for folder in reversed(self.made):
                folder.rmdir()


_claims: dict[File, Claim] = {}  # of this process


def take(folder: Path) -> Claim:
    """Claim a folder, which is created if it is missing. A claim that this process has on it and that no run uses yet
    is given again. Raises PerlError if another run has claimed it."""
    made = [place for place in reversed((folder, *folder.parents)) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _of_this_process(folder) or _locked(folder, made)
    except OSError as error:
        raise PerlError(f"--output {folder}: {reason(error)}", "choose a folder that is writable") from error


@contextmanager
def used(folder: Path) -> Iterator[Claim]:
    """The claim of the run that writes to a folder, released at its end. Raises PerlError as `take` does."""
    claim = take(folder)
    claim.is_used = True
    try:
        yield claim
    finally:
        claim.release()


def release_all() -> None:
    """Give up the folders that this process claimed, at the end of a command that may have failed before its run."""
    for claim in list(_claims.values()):
        claim.release()


def check_free(folder: Path) -> None:
    """Raises PerlError if another run has claimed a folder; writes nothing."""
    if (folder / LOCK).exists() and _of_this_process(folder) is None:
        _check_unlocked(folder)


def check_free_below(folder: Path) -> None:
    """Raises PerlError if another run has claimed a folder inside this one: a killed comparison can leave one."""
    for place, _, names in os.walk(folder):
        if LOCK in names and Path(place) != folder:
            check_free(Path(place))


def _of_this_process(folder: Path) -> Claim | None:
    with suppress(FileNotFoundError):
        claim = _claims.get(_file((folder / LOCK).stat()))
        if claim is not None and claim.is_used:
            raise _in_progress(folder)
        return claim
    return None


def _locked(folder: Path, made: list[Path]) -> Claim:
    path = folder / LOCK
    for turn in range(TRIES):
        place = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_locked = _lock(place, fcntl.LOCK_EX)
            if is_locked is not False and _is_there(path, place):
                claim = Claim(folder, place, made)
                claim.is_locked = bool(is_locked)
                return _marked(claim)
        except BaseException:
            os.close(place)
            raise
        os.close(place)
        if turn < TRIES - 1:
            time.sleep(PAUSE)
    raise _in_progress(folder)


def _marked(claim: Claim) -> Claim:
    """The claim, with who has it written into its file."""
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    mark = {"pid": os.getpid(), "host": platform.node(), "started": started}
    with suppress(OSError):  # a full disk: the run reports it when it writes its record
        os.truncate(claim.place, 0)
        os.pwrite(claim.place, json.dumps(mark).encode(), 0)
    _claims[claim.file] = claim
    return claim


def _lock(place: int, kind: int) -> bool | None:
    """Whether an open file could be locked; None on a disk without locks, where it can't be known."""
    try:
        fcntl.flock(place, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # NFS says the latter
            return False
        raise
    return True


def _is_there(path: Path, place: int) -> bool:
    """Whether a locked file is still the one in the folder: a run that has just ended deletes its own."""
    try:
        return _file(path.stat()) == _file(os.fstat(place))
    except FileNotFoundError:
        return False


def _check_unlocked(folder: Path) -> None:
    try:
        place = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return  # just deleted, or not ours to read
    try:
        is_free = _lock(place, fcntl.LOCK_SH)
    finally:
        os.close(place)
    if is_free is False:
        raise _in_progress(folder)


def _in_progress(folder: Path) -> PerlError:
    """The error that names the run in a folder."""
    mark: dict[str, Any] = {}
    for _ in range(TRIES):  # its process writes this right after it has locked the file
        with suppress(OSError, ValueError):
            mark = dict(json.loads((folder / LOCK).read_text(encoding="utf-8")))
            break
        time.sleep(PAUSE)
    who = f" (process {mark.get('pid')} on {mark.get('host')}, started {mark.get('started')})" if mark else ""
    return PerlError(f"--output {folder}: a run is in progress there{who}", HINT)


def _file(status: os.stat_result) -> File:
    return status.st_dev, status.st_ino


def _close_in_child() -> None:
    """Close the locks in a forked process, such as a worker that loads data: it may outlive the run."""
    for claim in _claims.values():
        with suppress(OSError):
            os.close(claim.place)
    _claims.clear()


os.register_at_fork(after_in_child=_close_in_child)

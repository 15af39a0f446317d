"""Runs perlcli in fresh processes, one after another, which end when their parent does."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from perlcli.errors import Interrupted
from perlcli.run import signals

PR_SET_PDEATHSIG = 1  # of prctl(2)
ERROR = "Error: "  # how the command line reports one
PARENT = "PERLCLI_PARENT"  # environment variable with the id of the process that started this one
MODULE = ("-P", "-m", "perlcli")  # -P: modules in the working folder don't shadow ours
GRACE_SECONDS = 30  # for a process to end after SIGTERM, before it is killed


class Stopped(Interrupted):
    """A signal stopped the comparison, and the run in progress with it."""


def run(words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run `perl WORDS` in a fresh process with its output in a log; returns its exit code, negative for a signal.

    A signal that asks this process to stop is passed on, so that the run can save; then Stopped is raised. A second one
    is passed on as well, and ends the run at once.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, PARENT: str(os.getpid()), **(environment or {})}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *MODULE, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=variables,
            start_new_session=True,
        )
        try:
            with handing_on(process) as signals_seen:
                code = process.wait()
        finally:
            end(process)
    if signals_seen:
        stopped = Stopped(f"Stopped by {signal.Signals(signals_seen[0]).name}")
        stopped.exit_code = 128 + signals_seen[0]
        raise stopped
    return code


def end_with_parent() -> None:
    """Have the system end this process when the one that started it is killed, so that no run is left behind. Only
    works on Linux; elsewhere nothing happens."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it was killed already
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def handing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals that ask for the end on to a process; yields the list of those that came."""
    asked: list[int] = []

    def hand_on(number: int) -> None:
        asked.append(number)
        process.send_signal(number)
        if len(asked) == 1:
            print("Stopping after this step is saved. Press Ctrl-C again to stop at once.", flush=True)

    with signals.heard(hand_on):
        yield asked


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still running."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_error(log: Path) -> str:
    """The last error in a log, without its prefix and hint; the last line if there is no error."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    starts = [place for place, line in enumerate(lines) if line.startswith(ERROR)]
    if not starts:
        return lines[-1] if lines else "no output"
    error = [line for line in lines[starts[-1] :] if not line.startswith("Hint: ")]
    return "\n".join(error).removeprefix(ERROR)

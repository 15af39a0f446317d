"""Runs of perlcli in fresh processes, one after another, that end with their parent and say how they ended."""

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
ERROR = "Error: "  # as the command line tells one
PARENT = "PERLCLI_PARENT"  # tells a process whose child it is
MODULE = ("-P", "-m", "perlcli")  # -P: no module of the working folder comes before ours
GRACE_SECONDS = 30  # for a process to end, once it was told to stop at once


class Stopped(Interrupted):
    """A signal asked for the end; the process of the time has ended, too."""


def run(words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Run `perl WORDS` in a fresh process with its output in a log; gives its exit code, negative for a signal.

    A signal that asks this process to stop is handed on, so that the run can save; then Stopped is raised. A second one
    is handed on, too: the run ends at once.
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
            with handing_on(process) as asked:
                code = process.wait()
        finally:
            end(process)
    if asked:
        stopped = Stopped(f"Stopped by {signal.Signals(asked[0]).name}")
        stopped.exit_code = 128 + asked[0]
        raise stopped
    return code


def end_with_parent() -> None:
    """Let the system ask this process to end when the one that started it is killed: no run is left behind unseen.

    Linux alone has this; elsewhere nothing happens.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it was killed before
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def handing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Give the signals that ask for the end to a process; the list that is given holds those that came."""
    asked: list[int] = []

    def hand_on(number: int) -> None:
        asked.append(number)
        process.send_signal(number)
        if len(asked) == 1:
            print("Stopping: this run saves its step, then all ends. Once more to stop at once.", flush=True)

    with signals.heard(hand_on):
        yield asked


def end(process: subprocess.Popen[bytes]) -> None:
    """See to it that a process has ended."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_error(log: Path) -> str:
    """The last error that a log tells, without the word and the hint; its last line where it tells none."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    starts = [place for place, line in enumerate(lines) if line.startswith(ERROR)]
    if not starts:
        return lines[-1] if lines else "it said nothing"
    told = [line for line in lines[starts[-1] :] if not line.startswith("Hint: ")]
    return "\n".join(told).removeprefix(ERROR)

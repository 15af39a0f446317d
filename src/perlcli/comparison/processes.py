"""Runs perlcli in fresh processes, one after another, which end when their parent does."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    is passed on as well, and ends the run at once."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *MODULE, *words]
    variables = {**os.environ, PARENT: str(os.getpid()), **(environment or {})}
    asked: list[int] = []
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=variables, start_new_session=True
        )

        def hand_on(number: int) -> None:
            asked.append(number)
            process.send_signal(number)
            if len(asked) == 1:
                print("Stopping after this step is saved. Press Ctrl-C again to stop at once.", flush=True)

        try:
            with signals.heard(hand_on):
                code = process.wait()
        finally:
            _end(process)
    if asked:
        stopped = Stopped(f"Stopped by {signal.Signals(asked[0]).name}")
        stopped.exit_code = 128 + asked[0]
        raise stopped
    return code


def end_with_parent() -> None:
    """Have the system end this process when its parent is killed, so that no run is left behind. Only on Linux."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it was killed already
        os.kill(os.getpid(), signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still running."""
    process.terminate()  # does nothing if it has ended
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

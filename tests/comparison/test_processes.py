"""Runs in processes of their own: exit codes, logs, signals handed on, and none left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from perlcli.comparison import processes
from perlcli.comparison.processes import Stopped

WAITS = """\
import signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_run_gives_its_exit_code_and_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.log"
    assert processes.run(["--version"], log) == 0
    assert log.read_text().startswith("perlcli ")
    assert processes.run(["sft", "--lora-r", "none"], log) == 2
    assert "lora-r" in log.read_text()


def test_the_environment_is_handed_on(tmp_path: Path, program: str) -> None:
    Path(program).write_text("import os; print(os.environ['MARK'], os.environ['PERLCLI_PARENT'])")
    processes.run([], tmp_path / "log", {"MARK": "here"})
    assert (tmp_path / "log").read_text() == f"here {os.getpid()}\n"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that runs in perlcli's place; the test writes it."""
    script, python = tmp_path / "program.py", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return str(script)


def when_ready(log: Path, number: int) -> None:
    while not (log.exists() and "ready" in log.read_text()):
        time.sleep(0.02)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_run_save_and_then_ends_all(tmp_path: Path, program: str, number: int) -> None:
    Path(program).write_text(WAITS)
    log = tmp_path / "log"
    before = signal.getsignal(number)
    threading.Thread(target=when_ready, args=(log, number), daemon=True).start()
    with pytest.raises(Stopped) as caught:
        processes.run([], log)
    assert caught.value.exit_code == 128 + number
    assert "saved" in log.read_text()
    assert signal.getsignal(number) is before


def test_a_killed_run_gives_the_signal(tmp_path: Path, program: str) -> None:
    Path(program).write_text("import os; os.kill(os.getpid(), 9)")
    assert processes.run([], tmp_path / "log") == -9


def test_a_run_ends_with_its_parent(tmp_path: Path) -> None:
    """Killed by -9 the parent can't tell its run to end: the system does."""
    child = (
        "import time; from pathlib import Path; from perlcli.comparison.processes import end_with_parent; "
        "end_with_parent(); Path('ready').touch(); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys; "
        "mark = {'PERLCLI_PARENT': str(os.getpid())}; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], env=os.environ | mark); "
        "print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        while not Path("ready").exists():
            time.sleep(0.02)
        process.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]:
        assert time.monotonic() < deadline, "the run lives on"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\nError: one\n", "one"),
        ("Error: one\nError: two\nmore\nHint: x\n", "two\nmore"),
        ("a\n\nb\n", "b"),
        ("", "no output"),
    ],
)
def test_the_last_error_of_a_log(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "log").write_text(text)
    assert processes.last_error(tmp_path / "log") == told

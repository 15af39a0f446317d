"""A mark of a process: it lives, it is gone, its number was given to another, or nobody here can tell."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from perlcli.run import liveness


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that waits."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def mark_of(pid: int) -> dict[str, Any]:
    return {"pid": pid, "started": liveness.start_of(pid), "host": liveness.host()}


def test_a_process_lives_until_it_is_killed(child: "subprocess.Popen[bytes]") -> None:
    mark = mark_of(child.pid)
    assert liveness.life(mark) == "alive"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still listed: a zombie
    assert liveness.life(mark) == "gone"
    child.wait()
    assert liveness.life(mark) == "gone"


def test_a_number_that_was_given_to_another_process_is_not_the_one_that_ran() -> None:
    assert liveness.life(liveness.mark()) == "alive"
    assert liveness.life(liveness.mark() | {"started": "0"}) == "gone"


@pytest.mark.parametrize("given", [{"host": "other"}, {"pid": None}, {"pid": True}, {"pid": "1"}, {"pid": -1}])
def test_nobody_can_tell_of_another_machine_or_without_a_number(given: dict[str, Any]) -> None:
    assert liveness.life(liveness.mark() | given) == "unknown"
    assert liveness.life({}) == "unknown"


def test_a_number_that_no_process_can_have_is_gone() -> None:
    assert liveness.life(liveness.mark() | {"pid": 10**30}) == "gone"


def test_what_the_system_hides_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(liveness, "start_of", lambda pid: None)
    mark = {"pid": 4, "started": "x", "host": liveness.host()}
    monkeypatch.setattr(liveness.os, "kill", refuse)
    assert liveness.life(mark) == "unknown"


def test_a_mark_holds_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness.platform, "node", lambda: "alices-laptop")
    text = json.dumps(liveness.mark())
    assert "alice" not in text
    assert set(json.loads(text)) == {"pid", "started", "host"}


@pytest.mark.skipif(not liveness.BOOT.exists(), reason="Linux only")
def test_on_linux_the_start_is_counted_from_the_boot_so_that_setting_the_clock_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert liveness.start_of(os.getpid()) == f"{liveness.BOOT.read_text()[:8]}-{ticks}"
    psutil.boot_time()  # older versions of psutil keep it
    shifted = psutil.boot_time() + 3600
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil, "boot_time", lambda: shifted)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + 3600)
    assert liveness.start_of(os.getpid()) == f"{liveness.BOOT.read_text()[:8]}-{ticks}"


def test_elsewhere_the_start_is_the_time_that_the_system_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "BOOT", tmp_path / "none")
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: 1234.5)
    assert liveness.start_of(os.getpid()) == "1234.5"


def test_a_process_that_may_not_be_looked_at_has_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: psutil.Process) -> str:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "status", refuse)
    assert liveness.start_of(os.getpid()) is None


@pytest.mark.parametrize("started", ["Mon Nov 23 05:00:00 2026", 12.5, None, ["x"], {}])
def test_a_mark_of_another_form_is_not_the_process_that_has_its_number(started: object) -> None:
    assert liveness.life(liveness.mark() | {"started": started}) in ("gone", "unknown")

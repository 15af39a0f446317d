"""A mark of a process: it lives, it is gone, its number was given to another, or nobody here can tell."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def test_a_name_with_blanks_and_brackets_is_read_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = tmp_path / "sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("0123456789abcdef\n")
    fields = " ".join(str(number) for number in range(4, 53))
    for pid, state in (("7", "S"), ("8", "Z")):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "stat").write_text(f"{pid} (a) Z (b c) {state} {fields}\n")
    (tmp_path / "self").symlink_to("7")
    monkeypatch.setattr(liveness, "PROC", tmp_path)
    assert liveness.start_of(7) == "01234567-22"
    assert liveness.start_of(8) is None and liveness.start_of(9) is None


@pytest.mark.parametrize(
    ("said", "found"),
    [("Ss   Mon Nov 23 05:00:00 2026\n", "Mon Nov 23 05:00:00 2026"), ("Z    Mon Nov 23 05:00:00\n", None), ("", None)],
)  # fmt: skip
def test_without_proc_ps_is_asked(
    said: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "PROC", tmp_path / "none")
    monkeypatch.setattr(
        liveness.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 0, stdout=said)
    )
    assert liveness.start_of(os.getpid()) == found


def test_without_ps_nothing_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PROC", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert liveness.start_of(os.getpid()) is None

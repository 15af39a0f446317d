"""The claim on an output folder: one run at a time, released by any end."""

import errno
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from perlcli import settings
from perlcli.errors import PerlError, RunFailed
from perlcli.run import claim, lifecycle
from perlcli.run.output_folder import check_output

HOLD = """
import signal, sys
from pathlib import Path
from perlcli.run import claim
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets background jobs ignore it, and their children too
held = claim.take(Path(sys.argv[1]))
{more}
print("held", flush=True)
sys.stdin.read()
"""
FORK = """
import os, time
if os.fork() == 0:
    os.close(1)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    claim.release_all()


@pytest.fixture
def other() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a process that claims a folder and holds it."""
    started = []

    def start(folder: Path, more: str = "") -> "subprocess.Popen[str]":
        words = [sys.executable, "-c", HOLD.format(more=more), str(folder)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, start_new_session=True, **pipes)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def resolved(folder: Path, **given: Any) -> settings.Sft:
    return settings.resolve(settings.build(settings.Sft, {"output": str(folder), **given}), {})


def refused(action: Callable[[], object]) -> PerlError:
    with pytest.raises(PerlError, match="a run is in progress there") as caught:
        action()
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_claimed_folder_is_refused_until_its_process_dies(other: Any, tmp_path: Path, number: int) -> None:
    process = other(tmp_path / "run")
    for given in ({}, {"overwrite": True}, {"resume": "latest"}, {"dry_run": True}):
        error = refused(lambda given=given: check_output(resolved(tmp_path / "run", **given)))
        who = rf"process {process.pid} on {re.escape(platform.node())}, started 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        assert re.search(
            rf"--output {re.escape(str(tmp_path))}/run: a run is in progress there \({who}\)$", error.problem
        )
        assert (error.exit_code, error.hint) == (2, "wait until it ends, stop it, or choose another --output")
    process.send_signal(number)
    process.wait()
    check_output(resolved(tmp_path / "run"))


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(other: Any, tmp_path: Path) -> None:
    """Processes that a run forks, such as those that load data, inherit its open files."""
    process = other(tmp_path / "run", FORK)
    process.kill()
    process.wait()
    claim.take(tmp_path / "run")


def test_by_another_name_it_is_the_same_folder(other: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    other(tmp_path / "link")
    refused(lambda: claim.take(tmp_path / "run"))


def test_only_one_of_many_that_start_at_once_gets_the_folder(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD.format(more=""), str(tmp_path / "a" / "run")]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(words, **pipes) for _ in range(4)]
    waiting = list(started)
    while len(waiting) > 1:  # those that are refused end at once, while the one that holds waits for its input
        waiting = [process for process in waiting if process.poll() is None]
    (holder,) = waiting
    assert holder.stdout.readline() == "held\n"
    for process in started:
        out, error = process.communicate()
        assert process is holder or (out == "" and f"(process {holder.pid} on " in error)
    assert holder.returncode == 0


def test_a_run_inside_the_folder_counts_where_the_folder_is_reused(other: Any, tmp_path: Path) -> None:
    """Such as an arm that goes on after its comparison was killed."""
    with lifecycle.recording(lifecycle.Run(resolved(tmp_path / "run"))):
        pass
    arm = other(tmp_path / "run" / "arms" / "lora")
    for given in ({"overwrite": True}, {"resume": "latest"}):
        error = refused(lambda given=given: check_output(resolved(tmp_path / "run", **given)))
        assert f"{tmp_path}/run/arms/lora: " in error.problem and str(arm.pid) in error.problem


def test_what_is_refused_or_never_begins_leaves_nothing(tmp_path: Path) -> None:
    check_output(resolved(tmp_path / "new" / "run"))
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == [claim.LOCK]
    claim.release_all()
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(PerlError, match="is not empty"):
        check_output(resolved(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    check_output(resolved(tmp_path / "dry", dry_run=True))
    assert not (tmp_path / "dry").exists()


def test_a_run_holds_the_folder_until_it_ends(tmp_path: Path) -> None:
    check_output(resolved(tmp_path))
    with lifecycle.recording(lifecycle.Run(resolved(tmp_path))):
        refused(lambda: claim.take(tmp_path))
        mark = json.loads((tmp_path / claim.LOCK).read_text())
        assert (mark["pid"], mark["host"]) == (os.getpid(), platform.node())
    assert not (tmp_path / claim.LOCK).exists()
    with pytest.raises(ValueError), lifecycle.recording(lifecycle.Run(resolved(tmp_path))):
        raise ValueError
    assert not (tmp_path / claim.LOCK).exists()


def test_a_command_that_fails_before_its_run_gives_the_folder_up(perl: Any, llama: Path, tmp_path: Path) -> None:
    Path("bad.jsonl").write_text('{"unknown": 1}\n')
    perl("sft", "--model", llama, "--data", "bad.jsonl", "--output", tmp_path / "run", code=2)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_folder_was_deleted_leaves_the_next_one_there_intact(tmp_path: Path) -> None:
    first = lifecycle.Run(resolved(tmp_path / "run"))
    with pytest.raises(RunFailed, match="is gone: it was deleted during the run") as caught, lifecycle.recording(first):
        (tmp_path / "run").rename(tmp_path / "deleted")
        with lifecycle.recording(lifecycle.Run(resolved(tmp_path / "run"))):
            before = (tmp_path / "run" / "record.json").read_bytes()
            assert not first.is_intact
            first.check_intact()
    assert caught.value.hint == "another run uses the folder now: choose another --output"
    assert (tmp_path / "run" / "record.json").read_bytes() != before  # by the second run's end
    assert json.loads((tmp_path / "run" / "record.json").read_text())["failure"].endswith("was deleted during the run")


def test_a_file_that_a_kill_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / claim.LOCK).write_text('{"pid": 1, "host": "elsewhere", "started": "long ago, and longer than ours"}')
    held = claim.take(tmp_path)
    assert json.loads((tmp_path / claim.LOCK).read_text())["pid"] == os.getpid()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run = lifecycle.Run(resolved(tmp_path))
    with lifecycle.recording(run):
        claim.check_free(tmp_path / "other")
    assert run.record.notes == [f"The disk of {tmp_path} can't lock files: don't start a second run there meanwhile."]


def test_a_folder_that_can_not_be_claimed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(PerlError, match=f"^--output {tmp_path}: Input/output error"):
        claim.take(tmp_path)

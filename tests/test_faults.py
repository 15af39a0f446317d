"""Disks that fill up, fail or vanish during a run, clocks that jump, and long runs: nothing good is lost."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT
from safetensors.torch import load_file
from transformers import Trainer
from trl import RLOOTrainer, SFTTrainer

from perlcli.commands import reward as reward_module
from perlcli.commands import runs
from perlcli.errors import RunFailed
from perlcli.model import tokenizers
from perlcli.run import checkpoints, disk, liveness, plots
from perlcli.run.files import RECORD, SAMPLES, file_bytes
from perlcli.run.record import read_record, write_record
from perlcli.training import loop, policies

Perl = Callable[..., Any]
STAGES = ("sft", "reward", "rl", "reinforce")
FULL = OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def room(count: int) -> Iterator[None]:
    """Limits every file to so many bytes, so that writing fails in the libraries as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def words(
    llama: Path, sft_run: Path, reward_run: Path, rows: dict[str, Path], tmp_path: Path
) -> Callable[[str, str], list[Any]]:
    """The command line of three steps of a stage, into a folder with the given name."""
    steps = ["--learning-rate", "1e-2", "--max-steps", "3", "--save-steps", "1", "--per-device-train-batch-size", "4"]
    of_rl = ["rl", "-m", sft_run, "--reward", reward_run, "-d", rows["prompts"], "--max-completion-length", "8", *steps]
    kinds = {
        "sft": ["sft", "-m", llama, "-d", rows["demonstrations"] / "train.jsonl", "--lora-r", "4", *steps],
        "reward": ["reward", "-m", llama, "-d", rows["pairs"] / "train.jsonl", "--lora-r", "4", *steps],
        "rl": [*of_rl, "--gradient-accumulation-steps", "1", "--num-generations", "4"],
        "reinforce": [*of_rl, "--algorithm", "reinforce", "--gradient-accumulation-steps", "1"],
    }
    return lambda stage, name: [*kinds[stage], "-o", tmp_path / name]


@pytest.fixture(scope="module")
def ends() -> dict[str, Path]:
    """The undisturbed runs by stage, as far as a test has needed them."""
    return {}


@pytest.fixture
def unharmed(words: Any, perl: Perl, ends: dict[str, Path], tmp_path_factory: Any) -> Callable[[str], Path]:
    """The folder of a stage's undisturbed run."""

    def run(stage: str) -> Path:
        if stage not in ends:
            folder = tmp_path_factory.mktemp("unharmed") / stage
            perl(*words(stage, "run")[:-1], folder)
            ends[stage] = folder
        return ends[stage]

    return run


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Does something once, after the backward pass of a step."""

    def plant(step: int, act: Callable[[], object]) -> None:
        waiting = [act]
        for trainer in (SFTTrainer, RLOOTrainer):
            original = trainer.training_step

            def training_step(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> torch.Tensor:
                loss = original(self, *args, **kwargs)
                if waiting and self.state.global_step + 1 == step:
                    waiting.pop()()
                return loss

            monkeypatch.setattr(trainer, "training_step", training_step)

    return plant


@pytest.fixture
def failing_once(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a function of a module run without room for files the first time that it is called."""

    def plant(module: Any, name: str, count: int) -> None:
        original, waiting = getattr(module, name), [count]

        def function(*args: Any, **kwargs: Any) -> Any:
            if not waiting:
                return original(*args, **kwargs)
            with room(waiting.pop()):
                return original(*args, **kwargs)

        monkeypatch.setattr(module, name, function)

    return plant


def status(folder: Path) -> str:
    return str(read_record(folder).status)


def told(result: Any) -> list[str]:
    """The error and its hint, which are the last two lines; there must be no traceback."""
    assert "Traceback" not in result.output
    lines = list(result.stderr.splitlines()[-2:])
    assert [line.partition(":")[0] for line in lines] == ["Error", "Hint"], result.stderr
    return lines


def whole(folder: Path) -> list[int]:
    """The steps of the checkpoints, which must all be complete, with nothing half-written next to them."""
    found = checkpoints.found(folder / "checkpoints")
    assert [checkpoints.fault(place) for place in found] == [None] * len(found)
    assert not checkpoints.side(folder / "checkpoints").exists() and not (folder / disk.SIDE).exists()
    return [checkpoints.step_of(place) for place in found]


def assert_same_end(one: Path, other: Path) -> None:
    """Check that two runs ended with equal weights, metrics and samples."""
    files = sorted(str(path.relative_to(one)) for path in one.rglob("*.safetensors") if "checkpoints" not in path.parts)
    assert files
    for name in files:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    for name in ("metrics.jsonl", "samples.jsonl"):
        sides = [
            [
                {key: value for key, value in json.loads(line).items() if not re.search("seconds|step_time", key)}
                for line in (folder / name).read_text().splitlines()
            ]
            for folder in (one, other)
            if (folder / name).exists()
        ]
        assert not sides or sides[0] == sides[-1]


# A full disk


@pytest.mark.parametrize(
    ("stage", "count"),
    [
        ("sft", 400),  # the second line of metrics, of 250 bytes each; fewer bytes have no room for it either
        ("sft", 20_000),  # the optimiser
        *(
            pytest.param(stage, count, marks=pytest.mark.slow)
            for stage in STAGES
            for count in (100, 3000, 10_000, 20_000, 30_000)
            if (stage, count) != ("sft", 20_000)
        ),
    ],
)
def test_a_full_disk_during_training_leaves_the_previous_checkpoint(
    stage: str, count: int, words: Any, perl: Perl, unharmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, run = unharmed(stage), Path("run").absolute()
    original = Trainer._maybe_log_save_evaluate

    def without_room(self: Any, *args: Any, **kwargs: Any) -> Any:
        with room(count if self.state.global_step == 2 else resource.RLIM_INFINITY):
            return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_maybe_log_save_evaluate", without_room)
        lines = told(perl(*words(stage, "run"), code=1))
    assert lines[0].startswith(f"Error: Can't write to {run}: ")
    assert lines[1].endswith(f"perl {read_record(run).command} --config {run}/settings.yaml --resume")
    # there is room again once the error is handled: then the last step is saved, if its metrics are
    assert (whole(run), status(run)) == ([1] if count <= 400 else [2, 1], "failed")
    assert read_record(run).failure == lines[0].removeprefix("Error: ")
    perl(*lines[1].partition("perl ")[2].split())
    assert_same_end(run, end)


@pytest.mark.parametrize(
    ("stage", "fails"),
    [
        ("sft", (policies, "save", 500)),
        pytest.param("sft", (policies, "save", 8000), marks=pytest.mark.slow),
        pytest.param("sft", (plots, "curves", 500), marks=pytest.mark.slow),
        pytest.param("reward", (reward_module, "save", 8000), marks=pytest.mark.slow),
        pytest.param("reward", (reward_module, "prove", 500), marks=pytest.mark.slow),
        pytest.param("reinforce", (policies, "save", 8000), marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_at_the_end_leaves_the_previous_adapter(
    stage: str, fails: tuple[Any, str, int], words: Any, perl: Perl, failing_once: Any, tmp_path: Path
) -> None:
    """A run that is resumed for one more step keeps its adapter until the next one is complete."""
    constant = ("--set", "lr_scheduler_type=constant")
    run = tmp_path / "run"
    perl(*words(stage, "whole"), *constant)
    perl(*words(stage, "run"), *constant, "--max-steps", "2")
    before = (run / "adapter_model.safetensors").read_bytes()
    failing_once(*fails)
    lines = told(perl(*words(stage, "run"), *constant, "--resume", code=1))
    assert lines[0].startswith(f"Error: Can't write to {run}: ") and status(run) == "failed"
    assert 3 in whole(run)
    assert ((run / "adapter_model.safetensors").read_bytes() == before) == (fails[1] == "save")
    assert all(path.stat().st_size for path in run.iterdir() if path.is_file() and path.name != SAMPLES)
    perl(*words(stage, "run"), *constant, "--resume")
    assert_same_end(run, tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_leaves_the_old_run_unchanged(
    words: Any, perl: Perl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    perl(*words("sft", "run"), "--max-steps", "1")
    names = ("record.json", "settings.yaml", "metrics.jsonl", "adapter_model.safetensors")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    with room(0):
        lines = told(perl(*words("sft", "run"), "--resume", code=1))
        assert told(perl(*words("sft", "new"), code=1))[1].endswith(", then the same command")
    assert lines[0] == f"Error: Can't write to {tmp_path}/run: the limit on the size of a file is reached"
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == before
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 4096))
    lines = told(perl(*words("sft", "new"), code=2))
    assert lines[0] == f"Error: --output {tmp_path}/new: the disk of {tmp_path} is full"


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [1.2, 1.5])
def test_a_real_full_disk(megabytes: float, tmp_path: Path) -> None:
    """The embedded base on a small disk in memory, in a separate process and mount."""
    inside = f"mount -t tmpfs -o size={int(megabytes * 1024)}k none small"
    Path("small").mkdir()
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "sh", "-c", inside], check=False).returncode
    ):
        pytest.skip("no disk can be mounted here")
    run = f"{sys.executable} -m perlcli sft --max-steps 4 --save-steps 1 --output small/run"
    script = f"{inside} && {run} 2>said; echo $? >code; cp -r small/run kept"
    subprocess.run(["unshare", "-rm", "sh", "-c", script], check=True, stdout=subprocess.DEVNULL)
    lines = Path("said").read_text().splitlines()[-2:]
    assert lines[0] == "Error: Can't write to small/run: the disk is full"
    assert lines[1] == "Hint: free disk space, then perl sft --config small/run/settings.yaml --resume"
    assert Path("code").read_text() == "1\n" and 1 in whole(Path("kept"))
    assert status(Path("kept")) == "failed"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system"), "the disk is read-only"),
        (OSError(errno.EIO, "Input/output error"), "input/output error, the disk may be failing"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("unable to write: No space left on device (28)"), "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file"), "PytorchStreamWriter failed writing file"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), r".* pos 64 vs 0"),
        (RuntimeError("basic_ios::clear: iostream error"), "basic_ios::clear: iostream error"),
    ],
)
def test_disk_errors_are_explained(error: Exception, words: str, tmp_path: Path) -> None:
    found = disk.failure(error, tmp_path, (), "perl sft --resume")
    assert isinstance(found, RunFailed)
    assert re.fullmatch(f"Can't write to {tmp_path}: {words}", found.problem)
    assert found.hint.endswith("perl sft --resume")


def test_the_cause_of_torch_s_write_error_is_found_by_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "probe", lambda folder: errno.ENOSPC)
    found = disk.failure(RuntimeError("PytorchStreamWriter failed"), tmp_path, (), "go on")
    assert str(found) == f"Can't write to {tmp_path}: the disk is full\nHint: free disk space, then go on"
    monkeypatch.undo()
    assert disk.probe(tmp_path) == 0 and not list(tmp_path.iterdir())
    with room(1000):
        assert disk.probe(tmp_path) == errno.EFBIG
    assert disk.probe(tmp_path / "none") == errno.ENOENT


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        OSError("can't load this model"),
        FileNotFoundError(errno.ENOENT, "none", "/elsewhere"),
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere"),
        KeyboardInterrupt(),
        PermissionError(errno.EPERM, "Operation not permitted"),  # of a signal, say
        RuntimeError("[enforce fail at inline_container.cc:1] . PytorchStreamReader failed reading zip archive"),
    ],
)
def test_other_errors_are_unchanged(error: BaseException, tmp_path: Path) -> None:
    assert disk.failure(error, tmp_path, (), "go on") is None


def test_a_full_disk_elsewhere_is_named(tmp_path: Path) -> None:
    found = disk.failure(OSError(errno.ENOSPC, "No space left on device", "/elsewhere/x"), tmp_path, (), "go on")
    assert found is not None and found.problem == "Can't write to /elsewhere/x: the disk is full"


def test_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def write(text: str) -> None:
        with disk.aside(tmp_path) as side:
            (side / "a").write_text(text)
            (side / "below").mkdir()
            (side / "below" / "b").write_text(text)
            if text == "half":
                raise FULL

    with pytest.raises(OSError, match="No space"):
        write("half")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
    for text in ("new", "newer"):
        write(text)
        assert [(tmp_path / name).read_text() for name in ("a", "below/b")] == [text] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "below"]


def test_a_log_on_a_full_disk_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Log:
        encoding = "utf-8"

        def __init__(self, error: OSError) -> None:
            self.error = error

        def write(self, text: str) -> None:
            raise self.error

    monkeypatch.setattr(sys, "stdout", Log(FULL))
    disk.tell("lost")
    monkeypatch.setattr(sys, "stderr", Log(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    with pytest.raises(BrokenPipeError):
        disk.tell("nobody reads on", error=True)


def test_a_closed_token_cache_is_noted(words: Any, perl: Perl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("file").touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    said = perl(*words("sft", "run"), "--max-steps", "1").stdout
    assert said.count("Tokens are not cached for the next run: ") == 1 and status(tmp_path / "run") == "finished"


# Read-only


@pytest.mark.parametrize(("flag", "why"), [(os.ST_RDONLY, "is on a read-only disk"), (0, "is not writable")])
def test_an_output_that_cannot_be_written_is_rejected_before_weights_load(
    flag: int, why: str, words: Any, perl: Perl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = os.statvfs(tmp_path)
    values = [*old]
    values[8] = flag
    monkeypatch.setattr(os, "statvfs", lambda place: os.statvfs_result(values))
    monkeypatch.setattr(os, "access", lambda place, mode: mode == os.R_OK)
    monkeypatch.setattr(tokenizers, "load_tokenizer", lambda *args, **kwargs: pytest.fail("something was loaded"))
    for stage in ("sft", "reward", "rl"):
        lines = told(perl(*words(stage, "run"), code=2))
        assert lines[0] == f"Error: --output {tmp_path}/run: {tmp_path} {why}"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_another_user_is_rejected(words: Any, perl: Perl, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    assert "closed is not writable" in told(perl(*words("sft", "closed/run"), code=2))[0]


# Deleted underneath


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_run_whose_folder_vanishes_reports_it_and_creates_none(
    stage: str, words: Any, perl: Perl, at_step: Any, tmp_path: Path
) -> None:
    at_step(2, lambda: shutil.rmtree(tmp_path / "run"))
    lines = told(perl(*words(stage, "run"), code=1))
    assert lines[0] == f"Error: {tmp_path}/run is gone: it was deleted during the run"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["seal", "keep"])
def test_a_folder_that_vanishes_while_a_checkpoint_is_written(
    name: str, words: Any, perl: Perl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trainer creates its folder again: what is left must not look like a run."""
    original = getattr(checkpoints, name)

    def after_all(*args: Any) -> Any:
        shutil.rmtree(tmp_path / "run")
        checkpoints.side(tmp_path / "run" / "checkpoints").mkdir(parents=True)
        return original(*args)

    monkeypatch.setattr(checkpoints, name, after_all)
    lines = told(perl(*words("sft", "run"), code=1))
    assert lines[0].startswith(f"Error: {tmp_path}/run/record.json is gone: ")
    assert lines[1] == f"Hint: delete what is left of {tmp_path}/run, then run the same command again"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_checkpoints_that_vanish_stop_the_run_and_its_adapter_is_saved(
    words: Any, perl: Perl, at_step: Any, unharmed: Any, tmp_path: Path
) -> None:
    end = unharmed("sft")
    run = tmp_path / "run"
    at_step(2, lambda: shutil.rmtree(run / "checkpoints"))
    lines = told(perl(*words("sft", "run"), code=1))
    assert lines[0] == f"Error: {run}/checkpoints is gone: it was deleted during the run"
    assert not (run / "checkpoints").exists() and status(run) == "failed"
    first = load_file(run / "adapter_model.safetensors")
    second = load_file(end / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert lines[1].endswith(f"perl sft --config {run}/settings.yaml --overwrite")  # there is nothing to resume
    perl(*lines[1].partition("perl ")[2].split())
    assert_same_end(run, end)


def test_checkpoints_that_vanish_and_reappear_empty_are_noticed(
    words: Any, perl: Perl, at_step: Any, tmp_path: Path
) -> None:
    def act() -> None:
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        checkpoints.side(tmp_path / "run" / "checkpoints").mkdir(parents=True)

    at_step(2, act)
    assert f"{tmp_path}/run/checkpoints is gone: it was deleted" in told(perl(*words("sft", "run"), code=1))[0]


def test_a_file_of_the_run_that_vanishes_is_named(tmp_path: Path) -> None:
    (tmp_path / RECORD).touch()
    found = disk.failure(FileNotFoundError(errno.ENOENT, "none", tmp_path / "x"), tmp_path, [RECORD], "go on")
    assert found is not None and found.problem.startswith(f"{tmp_path}/x is gone: it was deleted")


# Clocks


@pytest.mark.parametrize("stage", ["sft", pytest.param("rl", marks=pytest.mark.slow)])
def test_a_jumping_clock_changes_nothing(
    stage: str, words: Any, perl: Perl, at_step: Any, unharmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, run = unharmed(stage), Path("run").absolute()
    year, true = 365 * 86400.0, time.time
    jumps = [20 * year, -30 * year, 3 * year, -1.0, 0.0, 86400.0, -86400.0]
    calls: list[int] = []

    def wrong() -> float:
        calls.append(1)
        return true() + jumps[len(calls) % len(jumps)]

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "time", wrong)
    at_step(3, stop)
    perl(*words(stage, "run"), code=130)
    for step, jump in ((1, 10 * year), (2, -10 * year)):  # the older one looks newer
        for path in (run / "checkpoints" / f"checkpoint-{step}").rglob("*"):
            os.utime(path, (true() + jump,) * 2)
    assert "Resuming from step 2" in perl(*words(stage, "run"), "--resume").stdout
    assert calls
    assert_same_end(run, end)
    assert 0 <= read_record(run).elapsed_seconds < 600
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["seconds/step"] < 600 for row in lines)


def test_the_last_checkpoint_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step, jump in ((9, 10**9), (10, -(10**9))):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(b"x" * step)
        os.utime(folder / "optimizer.pt", (time.time() + jump,) * 2)
    assert file_bytes(tmp_path)["optimizer"] == 10


@pytest.mark.parametrize(("started", "age"), [("2099-01-01", "0 s"), ("1970-01-01", "?")])
def test_ages_are_never_absurd(started: str, age: str, words: Any, perl: Perl, tmp_path: Path, sft_run: Path) -> None:
    shutil.copytree(sft_run, tmp_path / "runs" / "a")
    record = read_record(tmp_path / "runs" / "a")
    record.started, record.status = f"{started}T00:00:00+00:00", "running"
    record.process = {**liveness.mark(), "host": "another"}
    write_record(tmp_path / "runs" / "a", record)
    for path in (tmp_path / "runs" / "a").iterdir():
        os.utime(path, (4e9, 4e9))
    shown = perl("runs", tmp_path / "runs").stdout
    assert f"  {age}  " in shown and "last written 0 s ago" in shown
    (found,) = json.loads(perl("runs", tmp_path / "runs", "--json").stdout)
    assert found["age_seconds"] == (0 if age == "0 s" else None)
    assert runs.age(-1e12) == "0 s"


# Long runs


@pytest.mark.slow
def test_resources_do_not_grow_with_the_steps(
    words: Any, perl: Perl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """File handles, threads and the log history in each checkpoint, over 30 steps of RL."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("handles are counted by Linux's /proc")
    seen: list[tuple[int, int, int]] = []
    original = loop.Meter.on_step_begin

    def look(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        counts = (len(list(Path("/proc/self", name).iterdir())) for name in ("fd", "task"))
        seen.append((*counts, len(state.log_history)))

    monkeypatch.setattr(loop.Meter, "on_step_begin", look)
    perl(*words("rl", "run"), "--max-steps", "30", "--save-steps", "10", "--learning-rate", "1e-4")
    settled = seen[loop.KEPT :]
    assert len(settled) == 20 and set(settled) == {settled[0]}
    (last, *_) = checkpoints.found(tmp_path / "run" / "checkpoints")
    assert len(json.loads((last / checkpoints.STATE).read_text())["log_history"]) <= loop.KEPT
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 30 and max(map(len, lines)) < 2000
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) <= 31


@pytest.mark.slow
def test_final_metrics_use_all_steps_although_the_trainer_forgets_them(
    llama: Path, rows: dict[str, Path], perl: Perl, tmp_path: Path
) -> None:
    perl("sft", "-m", llama, "-d", rows["demonstrations"], "-o", tmp_path / "run", *SHORT, "--max-steps", "12")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert read_record(tmp_path / "run").metrics["train_loss"] == json.loads(lines[-1])["loss"]

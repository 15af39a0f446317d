"""A run in progress: its record and folder, kept up to date however it ends."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from perlcli import device
from perlcli import settings as definitions
from perlcli.errors import Interrupted, PerlError, reason
from perlcli.redaction import hidden_in
from perlcli.run import card, checkpoints, claim, disk, files, liveness, out_of_memory, output_folder, peaks, signals
from perlcli.run.claim import LOCK, Claim
from perlcli.run.files import CHECKPOINTS, RECORD, SETTINGS, write_whole
from perlcli.run.record import SEVERAL, RunRecord, command_line, find_record, git_commit, package_versions, write_record


class Run:
    """A run in progress: its record and its folder, which is only written to after `begin`."""

    def __init__(self, settings: definitions.Stage) -> None:
        values = definitions.flat(settings)
        self.folder = Path(values["output"]).expanduser()
        self.before: RunRecord | None = None  # of the run that this one resumes
        self.parts: list[str] = []  # names that prove that the folder is still this run's; set by `begin`
        self.claim: Claim | None = None  # on the folder, while the run lives
        self.prompts = b""  # digests of the training prompts, for later evaluations
        self._clock = time.monotonic()
        seed = values.get("seed", 0)
        self.record = RunRecord(
            command=definitions.command_of(settings),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            process=liveness.mark(),
            settings=values,
            seed=seed[0] if isinstance(seed, tuple) else seed,
        )

    def note(self, text: str) -> None:
        """Print a line and keep it in the record."""
        self.record.notes.append(text)
        disk.tell(text)

    def note_device(self, values: definitions.ModelSettings, *, takes_dtype: bool = True) -> None:
        """Print where and in which precision the base will be, and what to know of the device; keep both in the record.
        `takes_dtype` if --dtype decides how much memory the base takes: under full tuning it doesn't."""
        self.record.device = device.describe(values)
        disk.tell(device.line(self.record.device))
        for remark in device.remarks(values, takes_dtype=takes_dtype):
            self.note(remark)

    def begin(self) -> None:
        """Take over the folder; nothing is written before."""
        values, is_new = self.record.settings, bool(self.record.settings.get("overwrite"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record.versions, self.record.git_commit = package_versions(), git_commit()
        self.record.memory["before_mb"] = peaks.begin()
        if is_new:  # first: if this run is killed, it must not have the old checkpoints
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        if self.claim is not None and not self.claim.is_locked:
            self.note(f"The disk of {self.folder} can't lock files: don't start a second run there meanwhile.")
        self.write()  # before emptying the folder: without a record it would be refused next time
        if is_new:
            _empty(self.folder)
        for left in filter(files.is_half_written, self.folder.iterdir()):
            left.unlink()
        self.parts = [RECORD]
        write_settings(self.folder / SETTINGS, values)
        if self.prompts:
            write_whole(self.folder / files.PROMPTS, [self.prompts])

    def write(self) -> None:
        """Bring `record.json` up to date."""
        self.record.elapsed_seconds = self.elapsed
        write_record(self.folder, self.record)

    @property
    def elapsed(self) -> float:
        """Seconds of run time, including those before a resume."""
        earlier = self.before.elapsed_seconds if self.before is not None else 0.0
        return round(earlier + time.monotonic() - self._clock, 1)

    @property
    def resume_command(self) -> str:
        """What to type to resume the run."""
        return command_line(self.folder, self.record.command, "--resume")

    @property
    def how_to_continue(self) -> str:
        """What to type after a signal or the disk ended the run. `--resume` only if there is something to resume."""
        if "resume" not in self.record.settings:
            return "the same command with --overwrite"
        option = "--resume" if self.is_saved else "--overwrite"
        if (self.folder / SETTINGS).exists():
            return command_line(self.folder, self.record.command, option)
        return f"the same command with {option}" if (self.folder / RECORD).exists() else "the same command"

    @property
    def saved_step(self) -> int | None:
        """The step of the newest checkpoint; None without one."""
        return checkpoints.last_step(self.folder / CHECKPOINTS)

    @property
    def is_saved(self) -> bool:
        """Whether the run can be resumed: from a checkpoint, or if it consists of several runs from what they have."""
        return self.record.command in SEVERAL or self.saved_step is not None

    def stopped(self, error: KeyboardInterrupt) -> Interrupted:
        """How a signal ended the run: at which step, what is saved and what to type."""
        saved, problem = self.saved_step, "Stopped"
        if "save_steps" in self.record.settings and self.record.command not in SEVERAL:
            step = max(self.record.steps, saved or 0)
            place = f"at step {step:,}" if step else "before the first step was complete"
            part = "nothing saved yet" if saved is None else "saved" if saved == step else f"saved up to step {saved:,}"
            problem = f"Stopped {place}, {part}"
        is_saved = "resume" in self.record.settings and self.is_saved
        reported = Interrupted(problem, self.how_to_continue, is_saved=is_saved)
        reported.exit_code = signals.exit_code(error)
        return reported

    def end_now(self, number: int) -> NoReturn:
        """End the process although it is busy in a library's computation: the record keeps that it was
        stopped. For a thread, from which the main thread can't be interrupted."""
        reported = self.stopped(signals.Signalled(number))
        _keep_failure(self, reported)
        disk.tell(str(reported), error=True)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(reported.exit_code)

    @property
    def is_intact(self) -> bool:
        """Whether the folder is still this run's: if it is deleted and a library creates it again, it has no record; if
        another run does, that has the claim."""
        return (self.folder / RECORD).exists() and not self.is_taken

    @property
    def is_taken(self) -> bool:
        """Whether the folder was deleted and another run has claimed the new one of its name."""
        return self.claim is not None and self.claim.is_lost

    def check_intact(self) -> None:
        """Raises RunFailed if the folder or a part of it was deleted."""
        lost = disk.vanished(self.folder, self.parts, self.how_to_continue)
        if lost is None and self.is_taken:
            lost = disk.gone(self.folder, "another run uses the folder now: choose another --output")
        if lost is not None:
            raise lost

    @contextmanager
    def extra(self, what: str) -> Iterator[None]:
        """Make something that a run is complete without, such as samples or plots: if it fails, out of memory included,
        a note says why and the run goes on. Raises what a failing disk, a deleted folder or a signal raises."""
        try:
            yield
        except Exception as error:
            if disk.failure(error, self.folder, self.parts, self.how_to_continue) is not None:
                raise
            known = out_of_memory.failure(error, self.record) or error
            why = known.problem if isinstance(known, PerlError) else reason(known)
            self.note(f"{what} could not be made: {why}.")

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a line to a file of rows; samples keep the texts of data and model as they are."""
        self.check_intact()
        row = row if name in files.TEXTS else hidden_in(dict(row))
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


@contextmanager
def recording(run: Run) -> Iterator[Run]:
    """Hold the claim on the run's folder and record how the run ends. Raises PerlError if another run has the folder or
    the resumed run had other data or another base, RunFailed if memory runs out, the disk fails or the folder is
    deleted, and Interrupted on a signal to stop."""
    with claim.used(run.folder) as run.claim:
        yield from _recording(run)


def _recording(run: Run) -> Iterator[Run]:
    old = find_record(str(run.folder)) if run.record.settings.get("resume") else None
    if old is not None:
        output_folder.check_same(old, run.record, run.note)
        run.before, run.record.started = old, old.started
    try:
        with signals.heard(signals.stop):  # training replaces this: it finishes its step first
            run.begin()
            yield run
            if (run.folder / files.CARD).exists() or any(run.folder.glob("*.safetensors")):  # it saved a model
                with run.extra("The model card"):
                    write_whole(run.folder / files.CARD, [card.text(run.record)])
            checkpoints.clear(run.folder / CHECKPOINTS)
            run.record.status, run.record.files = "finished", files.file_bytes(run.folder)
            run.write()
    except BaseException as error:
        reported: PerlError | None = disk.failure(error, run.folder, run.parts, run.how_to_continue)
        reported = reported or out_of_memory.failure(error, run.record)
        if reported is None and isinstance(error, KeyboardInterrupt):
            reported = run.stopped(error)
        _keep_failure(run, reported or error)
        if reported is not None:
            raise reported from error
        raise


def _keep_failure(run: Run, error: BaseException) -> None:
    """Record why a run ended, if its folder and disk still allow it."""
    run.record.status = "interrupted" if isinstance(error, Interrupted) else "failed"
    run.record.failure = error.problem if isinstance(error, PerlError) else f"{type(error).__name__}: {error}"
    if run.is_taken:
        return
    with suppress(OSError):  # a failing disk is reported by the error itself
        checkpoints.clear(run.folder / CHECKPOINTS)  # frees space for the record
    if run.is_intact:
        with suppress(OSError):
            run.write()
        return
    for folder in (run.folder / CHECKPOINTS, run.folder):  # libraries create them again after a run's own were deleted
        with suppress(OSError):  # not empty
            folder.rmdir()


def _empty(folder: Path) -> None:
    """Delete everything in a folder except the record and the claim."""
    for entry in folder.iterdir():
        if entry.name in (RECORD, LOCK):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Write the YAML that repeats this run with `--config`, without options that only concern one call."""
    import yaml

    from perlcli.settings.yaml_loader import Dumper

    keeps_unset = bool(values.get("recipe"))  # so that the recipe does not fill it in again
    kept = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in definitions.ONCE and (keeps_unset or value is not None)
    }
    write_whole(path, [yaml.dump(hidden_in(kept), Dumper=Dumper, sort_keys=False, allow_unicode=True)])

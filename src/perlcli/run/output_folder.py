"""The folder that a run writes to: whether it may, and under --resume whether it would still be the same run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perlcli import settings as definitions
from perlcli.errors import PerlError
from perlcli.redaction import hidden_in
from perlcli.run import checkpoints, disk, liveness
from perlcli.run.files import CHECKPOINTS, RECORD, is_half_written
from perlcli.run.record import SEVERAL, RunRecord, package_versions, read_record

FUNCTION = "the reward function "
LENGTH = {"max_steps", "num_train_epochs"}
MAY_CHANGE = LENGTH | {
    "save_steps", "save_total_limit", "report_to", "resume", "overwrite", "dry_run",
    "output", "trust_remote_code", "strict", "recipe", "max_eval_samples",
}  # fmt: skip


def check_output(settings: definitions.Stage) -> None:
    """Refuse an output folder whose content this run would destroy or mix with its own."""
    values = definitions.flat(settings)
    folder = Path(values["output"]).expanduser()
    standing = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if standing.exists() and not standing.is_dir():
        raise PerlError(f"--output {folder}: {standing} is a file", "name a folder")
    if closed := disk.why_closed(folder):
        raise PerlError(f"--output {folder}: {closed}", "name a folder that can be written to, or make room there")
    if not folder.is_dir() or all(map(is_half_written, folder.iterdir())):
        _check_named(folder, values)  # there is none, and another run's would be taken unchecked
        return
    ours = (folder / RECORD).exists()
    if ours and (values.get("resume") or values.get("overwrite")):
        _check_idle(folder)
    if values.get("resume") and ours:
        _check_resumable(folder, definitions.command_of(settings), values)
    if (values.get("overwrite") or values.get("resume")) and not ours:
        raise PerlError(
            f"--output {folder} is not empty and not a run of perlcli", "name another folder, or empty it yourself"
        )
    if not values.get("overwrite") and not values.get("resume"):
        ways = (
            "--resume to go on, --overwrite to replace it, or"
            if "resume" in values
            else "--overwrite to replace it, or"
        )
        raise PerlError(f"--output {folder} is not empty", f"{ways} another --output")
    reads = [values.get(name) for name in ("model", "data", "eval_data", "anchor", "peft")]
    models = map(str.strip, (values.get("model") or "").split(","))  # compare-full takes several
    reads += [*values.get("reward", ()), *models]
    inside = [name for name in reads if name and is_inside(name, folder)]
    if values.get("overwrite") and inside:
        raise PerlError(f"--overwrite would delete {inside[0]}, which this run reads", "name another --output")


def _check_idle(folder: Path) -> None:
    """Refuse a folder whose run is at work: two that write to it would destroy each other's checkpoints."""
    try:
        found = read_record(folder)
    except PerlError:
        return  # of another version, or damaged: --overwrite may replace it
    pid = found.process.get("pid")
    if found.status == "running" and pid != os.getpid() and liveness.life(found.process) == "alive":
        raise PerlError(f"--output {folder}: its run is at work, process {pid}", "stop it first, or wait for its end")


def _check_resumable(folder: Path, command: str, values: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that has done all its steps, or under settings that would make it another run."""
    found, values = read_record(folder), hidden_in(dict(values))  # as the record has them
    if found.command != command:
        raise PerlError(
            f"--resume: {folder} is a run of perl {found.command}, not of perl {command}", "another --output"
        )
    if values["resume"] != definitions.LATEST and found.command in SEVERAL:
        raise PerlError(f"--resume {values['resume']}: every run goes on from its own last checkpoint", "name none")
    _check_named(folder, values)
    kept = hidden_in(found.settings).items()
    old = {name: tuple(value) if isinstance(value, list) else value for name, value in kept}
    fixed = LENGTH if found.command in SEVERAL else set()  # the runs that finished stay as they are
    changed = [name for name in values if name not in MAY_CHANGE - fixed and old.get(name) != values[name]]
    if changed:
        told = "; ".join(f"--{definitions.dashed(name)} was {_told(old.get(name))}, now {_told(values[name])}"
                         for name in changed)  # fmt: skip
        raise PerlError(f"--resume: the run in {folder} had other settings: {told}", "go on with the same ones")
    _check_longer(old, values)
    _check_counted(folder, old.get("max_steps"), values["max_steps"])
    if found.command in SEVERAL:
        return  # what hasn't finished runs again
    steps, epochs = values["max_steps"], values["num_train_epochs"]
    longer = steps > found.steps if steps is not None else (epochs or 0) > (found.settings.get("num_train_epochs") or 0)
    if found.status == "finished" and not longer:
        raise PerlError(
            f"The run in {folder} is complete ({found.steps} steps)", "a larger --max-steps goes on from there"
        )


def _told(value: Any) -> str:
    """A setting's value for a person to read."""
    listed = ", ".join(map(str, value)) if isinstance(value, tuple) else value
    return "not set" if listed in (None, "") else str(listed)


def _check_longer(old: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse to go on for fewer steps or epochs than the run was to have."""
    for name in sorted(LENGTH):
        was, now = old.get(name), values.get(name)
        if was and now and now < was:
            problem = f"--resume: --{definitions.dashed(name)} was {was:g}, now {now:g}: it may grow, not shrink"
            raise PerlError(problem, f"leave it at {was:g}, or begin a run of its own with another --output")


def _check_counted(folder: Path, was: Any, now: Any) -> None:
    """Refuse to go on by epochs where --max-steps was given, and with fewer --max-steps than a run's epochs have."""
    if was is not None and now is None:
        problem = f"--resume: the run in {folder} was of --max-steps {was}, and now none are given"
        raise PerlError(problem, f"--max-steps {was}, or more")
    planned = checkpoints.planned(folder / CHECKPOINTS) if was is None and now is not None else 0
    if now is not None and now < planned:
        problem = f"--resume: --max-steps {now} is less than the {planned} steps that the run's epochs have"
        raise PerlError(problem, "leave it out, or begin a run of its own with another --output")


def named(folder: Path, checkpoint: str) -> Path:
    """The checkpoint that --resume names: by its path, or as one of the run's own by its name alone."""
    place, its = Path(checkpoint).expanduser(), folder / CHECKPOINTS / checkpoint
    return its if not place.exists() and its.is_dir() else place


def _check_named(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that --resume names and that isn't one of the run's own, or isn't whole."""
    if values.get("resume") in (None, definitions.LATEST):
        return
    checkpoint = named(folder, values["resume"])
    if (checkpoint / RECORD).exists():
        problem = f"--resume {checkpoint}: that is the folder of a run, not a checkpoint"
        raise PerlError(problem, f"--output {checkpoint} --resume goes on from its last one")
    if not checkpoint.is_dir():
        raise PerlError(f"--resume {checkpoint}: there is no such checkpoint", "--resume alone takes the last one")
    is_its = checkpoint.parent.resolve() == (folder / CHECKPOINTS).resolve()
    if not is_its or not checkpoints.NAME.fullmatch(checkpoint.name):
        other = checkpoint.resolve().parent.parent
        is_others = (other / RECORD).exists() and other != folder.resolve()
        hint = f"--output {other}" if is_others else "--resume alone takes the last one"
        raise PerlError(f"--resume {checkpoint} is not a checkpoint of the run in {folder}", hint)
    if wrong := checkpoints.fault(checkpoint):
        raise PerlError(f"--resume {checkpoint}: it {wrong}", "--resume alone takes the last one that is whole")


def check_same(old: RunRecord, now: RunRecord, note: Callable[[str], None]) -> None:
    """Refuse to go on with a run of other data or other weights, whichever role they have: it would be another
    trajectory. A reward function may have been mended; that is told."""
    before, inputs = hidden_in(_inputs(old)), hidden_in(_inputs(now))  # named as the record has them
    changed = [name for name, mark in inputs.items() if mark and before.get(name) and mark != before[name]]
    for name in [name for name in changed if name.startswith(FUNCTION)]:
        changed.remove(name)
        note(f"The file of {name} was changed: the steps from here on have another reward than those before.")
    if changed:
        told = "; ".join(f"{name} was {before[name]}, now {inputs[name]}" for name in changed)
        raise PerlError(
            f"--resume: the run in {now.settings['output']} had other inputs: {told}",
            "go on with the same files, or begin a run of its own with another --output",
        )
    _tell_moved(old, now, note)


def _tell_moved(old: RunRecord, now: RunRecord, note: Callable[[str], None]) -> None:
    """Say so where a run goes on on another machine or under other versions, which may round otherwise."""
    before, here = old.versions | old.device, package_versions() | now.device
    moved = [f"{name} {before[name]}, now {here[name]}" for name in here if before.get(name, here[name]) != here[name]]
    if moved:
        note(f"The steps before were done with {'; '.join(moved)}: what follows may differ by rounding.")


def _inputs(record: RunRecord) -> dict[str, Any]:
    """What a run read, by name: the digest of each."""
    model = record.model
    found = {
        "the base": model.get("fingerprint"), "tokenizer": model.get("tokenizer"),
        f"the adapter {model.get('adapter')}": model.get("adapter_fingerprint"), "the anchor": model.get("anchor"),
        "training data": record.data.get("train", {}).get("fingerprint"),
        "the base's precision": record.device.get("precision"),
    }  # fmt: skip
    functions = {True: FUNCTION, False: "the reward "}
    is_function = {name: ":" in name and not Path(name).exists() for name in model.get("rewards", {})}
    return found | {functions[is_function[name]] + name: mark for name, mark in model.get("rewards", {}).items()}


def is_inside(name: str, folder: Path) -> bool:
    """Whether something local lies in a folder, or is it."""
    path = Path(name).expanduser()
    return path.exists() and path.resolve().is_relative_to(folder.resolve())

"""The folder that a run writes to: whether it may, and with --resume whether it would still be the same run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from perlcli import device
from perlcli import settings as definitions
from perlcli.errors import PerlError
from perlcli.redaction import hidden_in
from perlcli.run import checkpoints, claim, disk, liveness
from perlcli.run.files import CHECKPOINTS, RECORD, is_half_written
from perlcli.run.record import SEVERAL, RunRecord, package_versions, read_record

FUNCTION = "the reward function "
LENGTH = {"max_steps", "num_train_epochs"}
ERRORS = {"on_reward_error"}  # a run that stopped at one can go on with another decision
SAVING = {"save_steps", "save_minutes", "save_total_limit"}
RUNNING = SAVING | {"report_to", "output", "trust_remote_code", "strict", "recipe"}
MEMORY = {"gradient_checkpointing"}  # the same gradients
SPEED = {"rollouts", "shared_prompts"}  # the same up to rounding
SERVERS = {"vllm_server_base_url", "vllm_max_logprob_diff"}
WEIGHTS = {"importance_cap"}  # another engine may have none
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")  # their product may not change
MAY_CHANGE = LENGTH | ERRORS | RUNNING | MEMORY | SPEED | SERVERS | WEIGHTS | {"max_eval_samples", *definitions.ONCE}
# What a run had before these were options.
UNTIL_OPTIONS: dict[str, Any] = {
    "optim": "adamw_torch_fused", "stop": (), "reward_label": (), "rollouts": "transformers", "shared_prompts": False,
    "importance_cap": None,
}  # fmt: skip
EMBEDDED = "coffee"  # the embedded base in the name of an evaluation's folder
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9]+:/")  # how an address begins as a path: s3:/bucket
NEW_RUN = "start a new run with another --output"
LAST = "--resume without a value takes the last complete checkpoint"


def check_output(settings: definitions.Stage) -> None:
    """Claims the output folder, unless in a dry run, until the run or the command ends. Raises PerlError if the run
    can't write to it, if another run is in progress there, or if it would destroy its content or mix with it."""
    values = definitions.flat(settings)
    folder = Path(values["output"]).expanduser()
    _check_writable(folder)
    claim.check_free(folder)
    _check_replaceable(folder, values)  # a folder that isn't a run's is left as it is: without a claim in it, too
    if values["dry_run"]:
        _check_content(folder, definitions.command_of(settings), values)
        return
    claimed = claim.take(folder)  # what is checked now can't change
    try:
        _check_content(folder, definitions.command_of(settings), values)
    except PerlError:
        claimed.release()
        raise


def check_early(settings: definitions.Stage) -> None:
    """Raises PerlError for what `check_output` would refuse whatever the model decides. Claims nothing."""
    values = definitions.flat(settings)
    folder = Path(values["output"]).expanduser()
    _check_writable(folder)
    claim.check_free(folder)
    _check_replaceable(folder, values)
    _check_named(folder, values)
    if values.get("resume") and not _is_empty(folder):
        _check_command(folder, read_record(folder), definitions.command_of(settings))


def of_eval(model: str | None) -> str:
    """The default folder of an evaluation: next to the run that it measures, otherwise in `runs`."""
    if model is None:
        return f"runs/eval-{EMBEDDED}"
    path = Path(model).expanduser()
    folder = path.parent if (path / RECORD).exists() else Path("runs")
    return str(folder / f"eval-{path.resolve().name if path.is_dir() else path.name}")


def _check_content(folder: Path, command: str, values: Mapping[str, Any]) -> None:
    if _is_empty(folder):
        _check_named(folder, values)  # else a checkpoint of another run would be taken unchecked
        return
    _check_replaceable(folder, values)
    _check_idle(folder)
    claim.check_free_below(folder)
    if values.get("resume"):
        _check_resumable(folder, command, values)
    if values.get("overwrite"):
        _check_not_read(folder, values)


def _is_empty(folder: Path) -> bool:
    return not folder.is_dir() or all(is_half_written(path) or path.name == claim.LOCK for path in folder.iterdir())


def _check_replaceable(folder: Path, values: Mapping[str, Any]) -> None:
    """Raises PerlError for content that the run may neither continue nor replace."""
    if _is_empty(folder):
        return
    if not values.get("resume") and not values.get("overwrite"):
        resume = "--resume to continue, " if "resume" in values else ""
        raise PerlError(f"--output {folder} is not empty", f"{resume}--overwrite to replace it, or another --output")
    if not (folder / RECORD).exists():
        hint = "choose another folder, or empty this one yourself"
        raise PerlError(f"--output {folder} is not empty and not a run of perlcli", hint)


def _check_writable(folder: Path) -> None:
    if REMOTE.match(str(folder)):
        hint = "copy the run there when it is finished"
        raise PerlError(f"--output must be a folder of this machine, not {str(folder).replace(':/', '://', 1)}", hint)
    existing = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if existing.exists() and not existing.is_dir():
        raise PerlError(f"--output {folder}: {existing} is a file", "give a folder")
    if reason := disk.why_closed(folder):
        raise PerlError(f"--output {folder}: {reason}", "choose a folder that is writable and has space")


def _check_not_read(folder: Path, values: Mapping[str, Any]) -> None:
    reads = [values.get(name) for name in ("model", "data", "eval_data", "anchor", "peft")]
    models = map(str.strip, (values.get("model") or "").split(","))  # compare-full takes several
    inside = [name for name in (*reads, *values.get("reward", ()), *models) if name and is_inside(name, folder)]
    if inside:
        raise PerlError(f"--overwrite would delete {inside[0]}, which this run reads", "choose another --output")


def _check_idle(folder: Path) -> None:
    """Raises PerlError if the record says that the folder's run is in progress: on a disk without locks, a claim can't
    say it."""
    try:
        record = read_record(folder)
    except PerlError:
        return  # of another version, or damaged: --overwrite may replace it
    pid = record.process.get("pid")
    if record.status == "running" and pid != os.getpid() and liveness.life(record.process) == "alive":
        problem = f"--output {folder}: its run is still in progress (process {pid})"
        raise PerlError(problem, "stop it first, or wait until it ends")


def _check_resumable(folder: Path, command: str, values: Mapping[str, Any]) -> None:
    record, values = read_record(folder), hidden_in(dict(values))  # as the record has them
    _check_command(folder, record, command)
    is_several = record.command in SEVERAL
    if is_several and values["resume"] != definitions.LATEST:
        problem = f"--resume {values['resume']}: each run resumes from its own last checkpoint"
        raise PerlError(problem, "use --resume without a value")
    _check_named(folder, values)
    kept = hidden_in(record.settings).items()
    old: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in kept}
    _check_same_settings(folder, old, values, LENGTH if is_several else set())
    _check_length(folder, old, values)
    if is_several:
        return  # the runs in it that have not finished run again
    steps, epochs = values["max_steps"], values["num_train_epochs"]
    is_longer = (epochs or 0) > (old.get("num_train_epochs") or 0) if steps is None else steps > record.steps
    if record.status == "finished" and not is_longer:
        problem = f"The run in {folder} is complete ({record.steps} steps)"
        raise PerlError(problem, "a larger --max-steps continues it")


def _check_command(folder: Path, record: RunRecord, command: str) -> None:
    if record.command != command:
        problem = f"--resume: {folder} is a run of perl {record.command}, not of perl {command}"
        raise PerlError(problem, "choose another --output")


def _check_same_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], fixed: set[str]) -> None:
    """Raises PerlError if settings have changed that may not change, or that are `fixed` for this run."""
    old = UNTIL_OPTIONS | dict(old)
    may_change = MAY_CHANGE - fixed
    if not fixed and _has_same_batches(old, new):
        may_change |= {*BATCH}
    changed = [name for name in new if name not in may_change and old.get(name) != new[name]]
    changes = [f"--{definitions.dashed(name)} was {_shown(old.get(name))}, now {_shown(new[name])}" for name in changed]
    if changes:
        problem = f"--resume: the run in {folder} had different settings: {'; '.join(changes)}"
        raise PerlError(problem, "use the same settings")


def _has_same_batches(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether both settings learn from the same rows in each step, and sample as many at a time: the number of passes
    that a generation serves is set by name, and would be another number of rows with other passes."""
    is_apart = any(str(item).startswith("steps_per_generation") for item in new.get("set", ()))
    return not is_apart and prod(_batch(old)) == prod(_batch(new))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else value
    return "not set" if text in (None, "") else str(text)


def _check_length(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises PerlError if a run is resumed with fewer steps or epochs than it had, or without its --max-steps."""
    for name in sorted(LENGTH):
        was, now = old.get(name), new.get(name)
        if was and now and now < was:
            problem = f"--resume: --{definitions.dashed(name)} was {was:g}, now {now:g}: it can only increase"
            raise PerlError(problem, f"leave it at {was:g}, or {NEW_RUN}")
    was, now = old.get("max_steps"), new["max_steps"]
    if was is not None and now is None:
        problem = f"--resume: the run in {folder} had --max-steps {was}, and now it is missing"
        raise PerlError(problem, f"add --max-steps {was}, or more")
    planned = checkpoints.planned(folder / CHECKPOINTS) if was is None and now is not None else 0
    if planned and now < planned:
        problem = f"--resume: --max-steps {now} is less than the {planned} steps that the run's epochs take"
        raise PerlError(problem, f"leave it out, or {NEW_RUN}")


def named(folder: Path, checkpoint: str) -> Path:
    """The checkpoint that --resume names: by its path, or only by its name if it is one of the run's own."""
    path, own = Path(checkpoint).expanduser(), folder / CHECKPOINTS / checkpoint
    return own if not path.exists() and own.is_dir() else path


def _check_named(folder: Path, values: Mapping[str, Any]) -> None:
    if values.get("resume") in (None, definitions.LATEST):
        return
    checkpoint = named(folder, values["resume"])
    if (checkpoint / RECORD).exists():
        problem = f"--resume {checkpoint}: that is the folder of a run, not a checkpoint"
        raise PerlError(problem, f"--output {checkpoint} --resume continues from its last checkpoint")
    if not checkpoint.is_dir():
        raise PerlError(f"--resume {checkpoint}: no such checkpoint", LAST)
    is_own = checkpoint.parent.resolve() == (folder / CHECKPOINTS).resolve()
    if not is_own or not checkpoints.NAME.fullmatch(checkpoint.name):
        other = checkpoint.resolve().parent.parent
        is_others = (other / RECORD).exists() and other != folder.resolve()
        hint = f"--output {other}" if is_others else LAST
        raise PerlError(f"--resume {checkpoint} is not a checkpoint of the run in {folder}", hint)
    if wrong := checkpoints.fault(checkpoint):
        raise PerlError(f"--resume {checkpoint}: it {wrong}", LAST)


def check_same(old: RunRecord, now: RunRecord, note: Callable[[str], None]) -> None:
    """Raises PerlError if a resumed run reads other data or weights than before, in any role. A reward function may
    change, for example to fix it; a note says so."""
    before, inputs = (hidden_in(dict(_inputs(record))) for record in (old, now))  # named as the record has them
    changed = [name for name, mark in inputs.items() if mark and before.get(name) and mark != before[name]]
    functions = [name for name in changed if name.startswith(FUNCTION)]
    for name in functions:
        note(f"The file of {name} has changed: the steps from here on use a different reward.")
    changes = [f"{name} was {before[name]}, now {inputs[name]}" for name in changed if name not in functions]
    if changes:
        problem = f"--resume: the run in {now.settings['output']} had different inputs: {'; '.join(changes)}"
        raise PerlError(problem, f"use the same files, or {NEW_RUN}")
    for change in _other_ways(old.settings, now.settings, old.trl_settings):
        note(change)
    before, here = old.versions | old.device, package_versions() | device.identity(now.device)
    moved = [f"{name} {before[name]}, now {here[name]}" for name in here if before.get(name, here[name]) != here[name]]
    if moved:
        note(f"The steps so far ran with {'; '.join(moved)}: results may differ by rounding.")


def _other_ways(old: Mapping[str, Any], new: Mapping[str, Any], trl: Mapping[str, Any]) -> Iterator[str]:
    """What a resumed run does in another way than before, in sentences."""
    rounds = "results may differ from here on by rounding"
    if _batch(old) and _batch(old) != _batch(new):
        (rows, passes), (now_rows, now_passes) = _batch(old), _batch(new)
        yield f"The steps so far took {rows} x {passes} rows, and from here on {now_rows} x {now_passes}: {rounds}."
    wanted = new.get("gradient_checkpointing")
    was = {True: "true", False: "false"}.get(trl.get("gradient_checkpointing", ""), wanted)
    if wanted in ("true", "false") and was != wanted:
        yield f"--gradient-checkpointing was {was}, now {wanted}: {rounds}."
    old = UNTIL_OPTIONS | dict(old)
    for name in sorted((ERRORS | SPEED | WEIGHTS) & new.keys()):
        if old.get(name, new[name]) != new[name]:
            more = f": {rounds}" if name in SPEED else ""
            yield f"--{definitions.dashed(name)} was {_shown(old[name])}, now {_shown(new[name])}{more}."


def _batch(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows per pass and passes per step; empty if the command has none."""
    return tuple(int(values[name]) for name in BATCH if values.get(name))


def _inputs(record: RunRecord) -> Iterator[tuple[str, Any]]:
    model = record.model
    yield "the base", model.get("fingerprint")
    yield "tokenizer", model.get("tokenizer")
    yield f"the adapter {model.get('adapter')}", model.get("adapter_fingerprint")
    yield "the rendering of rows", model.get("rendering")
    yield "the anchor", model.get("anchor")
    yield "training data", record.data.get("train", {}).get("fingerprint")
    yield "the base's precision", record.device.get("precision")
    for name, mark in model.get("rewards", {}).items():
        is_function = ":" in name and not Path(name).exists()
        yield (FUNCTION if is_function else "the reward ") + name, mark


def is_inside(name: str, folder: Path) -> bool:
    """Whether a name is a local path inside a folder, or the folder itself."""
    path = Path(name).expanduser()
    return path.exists() and path.resolve().is_relative_to(folder.resolve())

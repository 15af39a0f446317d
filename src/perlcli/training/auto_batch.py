"""Finds the batch for `--auto-batch`: the largest split of the same effective batch that fits, by the predicted memory
and by a trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from transformers import TrainingArguments
from trl import RLOOConfig

from perlcli import settings
from perlcli.errors import PerlError, RunFailed
from perlcli.memory import plans, prediction
from perlcli.run import disk, peaks
from perlcli.run.lifecycle import Run
from perlcli.run.record import find_record
from perlcli.text import size
from perlcli.training import trial
from perlcli.training.dry_run import free_bytes
from perlcli.training.prepare import Prepared

SIZE, PASSES = "per_device_train_batch_size", "gradient_accumulation_steps"
CURES = "try --gradient-checkpointing true, a smaller --max-length or --load-in-4bit"
Given = TypeVar("Given", bound=settings.Training)
Split = tuple[int, int]  # rows per pass, passes per step
ConfigOf = Callable[[Any], TrainingArguments]


def settled(prepared: Prepared[Given], config_of: ConfigOf, longest: int) -> Prepared[Given]:
    """The run with its batch found, if --auto-batch asks for it; its record and its settings.yaml have the found one.
    `config_of` gives TRL's config for settings, and `longest` are the tokens of the longest row. Raises RunFailed if no
    batch fits, and PerlError if the run itself would fail."""
    values, run = prepared.settings, prepared.run
    if not values.batch.auto_batch or (prepared.is_dry and not values.keep.time):
        return prepared
    split = _before(values, run) or _found(values, config_of, longest, run)
    run.record.settings |= dict(zip((SIZE, PASSES), split, strict=True))
    return replace(prepared, settings=with_split(values, split))


def splits(values: settings.Training, config_of: ConfigOf) -> list[Split]:
    """The splits of the effective batch, the largest batch first. For rl those that sample as many completions at a
    time, keeping groups together, as the given one."""
    batch, passes = _split_of(settings.flat(values))
    total = batch * passes
    every = [(rows, total // rows) for rows in range(total, 0, -1) if total % rows == 0]
    wanted = config_of(values)
    return [each for each in every if _is_same(with_split(values, each), config_of, wanted)]


def with_split(values: Given, split: Split) -> Given:
    """The settings with this batch."""
    train = replace(values.train, per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1])
    return replace(values, train=train)


def _is_same(values: settings.Training, config_of: ConfigOf, wanted: TrainingArguments) -> bool:
    """Whether TRL takes these settings, and an RL run samples as in the wanted config."""
    try:
        config = config_of(values)
    except PerlError:
        return False
    return not isinstance(config, RLOOConfig) or config.generation_batch_size == getattr(
        wanted, "generation_batch_size", None
    )


def _before(values: settings.Training, run: Run) -> Split | None:
    """The split of the run that is resumed, which was found when it started; None for a new run."""
    old = find_record(str(run.folder)) if values.keep.resume else None
    if old is None:
        return None
    split = _split_of(old.settings)
    run.note(f"--auto-batch: {split[0]} x {split[1]}, as before.")
    return split


def _split_of(values: Any) -> Split:  # noqa: ANN401
    return int(values[SIZE] or 1), int(values[PASSES] or 1)


def _found(values: settings.Training, config_of: ConfigOf, longest: int, run: Run) -> Split:
    """The largest split that is predicted to fit and whose trial has enough memory. After each that has not, the batch
    is halved."""
    every = splits(values, config_of)
    left = _predicted(values, every, longest, run) or every[-1:]
    while left:
        rows, passes = left[0]
        disk.tell(f"--auto-batch: trying {rows} x {passes} on the longest rows …")
        if trial.run(with_split(values, left[0]), steps=1, longest=True).fits:
            run.note(f"--auto-batch: {rows} x {passes} fits (rows per pass x passes per step).")
            return left[0]
        run.note(f"--auto-batch: {rows} x {passes} runs out of memory.")
        left = [split for split in left if split[0] * 2 <= rows]
    rows, passes = every[-1]
    raise RunFailed(f"--auto-batch: not even {rows} x {passes} fits into memory ({size(free_bytes())} free)", CURES)


def _predicted(values: settings.Training, every: list[Split], longest: int, run: Run) -> list[Split]:
    """The splits that are predicted to fit, all if memory can't be predicted."""
    completion = int(values.sampling.max_completion_length or 0) if isinstance(values, settings.Rl) else 0
    shorter = trial.with_length(values, min(longest + completion, int(values.data.max_length or 1)))
    free, is_on_gpu = free_bytes(), prediction.device_bytes() is not None
    room = free if is_on_gpu else free - trial.reserve_bytes() - peaks.resident_mb() * 1e6  # for the libraries again
    fitting = []
    try:
        model = plans.Model(values.model.model, trust_remote_code=values.model.trust_remote_code)
        arm = model.arm_of(values)
        for split in every:
            plan = prediction.settled(model.shape, model.plan(with_split(shorter, split), arm), int(room))
            needed = prediction.takes(prediction.predict(model.shape, plan), plan)
            if needed <= room:
                fitting.append(split)
            else:
                run.note(f"--auto-batch: {split[0]} x {split[1]} would take {size(needed)}, {size(max(room, 0))} free.")
    except PerlError as error:
        run.note(f"--auto-batch: memory can't be predicted ({error.problem}).")
        return every
    return fitting

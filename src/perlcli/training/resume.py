"""Resumes a run exactly: chooses the checkpoint, and restores what transformers and TRL leave out of theirs.

They don't restore the order of the rows in a later epoch, if the sampler draws it from the global random state; TRL's
own sampler after the first epoch; and, in RL, completions that serve several steps and were not yet learned from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from trl import RLOOTrainer
from trl.trainer.utils import RepeatSampler

from perlcli import device
from perlcli.errors import PerlError
from perlcli.run import checkpoints, files, output_folder
from perlcli.run.lifecycle import Run
from perlcli.settings import LATEST

FILE = "perlcli.safetensors"  # in a checkpoint, next to what the trainer writes
EPOCH_START = "epoch_start"
Tensors = dict[str, torch.Tensor]


class Resumable(TrainerCallback):
    """Adds to every checkpoint what the trainer leaves out, and restores it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.epoch_start: torch.Tensor | None = None  # the random state before the rows of this epoch were ordered
        self.is_resuming = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: object, lr_scheduler: Any = None, **__: object
    ) -> None:
        state.save_steps = int(args.save_steps)  # transformers would continue with the checkpoint's
        if self.is_resuming:
            _replan_learning_rate(lr_scheduler)

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        if self.is_resuming and self.epoch_start is not None:
            torch.set_rng_state(self.epoch_start)  # the trainer restores that of the checkpoint's step afterwards
        self.epoch_start, self.is_resuming = torch.get_rng_state(), False

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        is_epoch_end = state.epoch is not None and state.epoch % 1 == 0  # the next epoch starts from this random state
        start = torch.get_rng_state() if is_epoch_end or self.epoch_start is None else self.epoch_start
        tensors: Tensors = {EPOCH_START: start}
        if isinstance(self.trainer, KeepsGeneration):
            tensors |= self.trainer.generation()
        save_file(tensors, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE)

    def take(self, checkpoint: Path) -> None:
        """Restore what a complete checkpoint holds, before the trainer does its part."""
        tensors = load_file(checkpoint / FILE)
        self.epoch_start, self.is_resuming = tensors.pop(EPOCH_START, None), True
        if isinstance(self.trainer, KeepsGeneration):
            self.trainer.take_generation(tensors)


class KeepsGeneration(RLOOTrainer):
    """TRL's RLOO with its order of prompts and its unused completions restored when it resumes."""

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        inner: Any = super()._get_train_sampler(dataset)
        return OfEpoch(inner)

    def generation(self) -> Tensors:
        """The trainer's step within a generation, and the completions of it that are still to be learned from."""
        args: Any = self.args
        tensors = {"step": torch.tensor(self._step)}
        is_used_up = self._step % (args.steps_per_generation * self.num_iterations) == 0
        parts = [] if is_used_up else self._buffered_inputs or []
        for index, part in enumerate(parts):
            held = {name: tensor for name, tensor in part.items() if tensor is not None}
            tensors |= {f"{index}/{name}": tensor.cpu().clone() for name, tensor in held.items()}
        return tensors

    def take_generation(self, tensors: Tensors) -> None:
        """Continue within the generation that `generation` described."""
        self._step = int(tensors.pop("step"))
        parts: dict[int, Tensors] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition("/")
            parts.setdefault(int(index), {})[name] = tensor.to(self.accelerator.device)
        self._buffered_inputs: Any = [parts[index] for index in sorted(parts)] or None


class OfEpoch(Sampler[int]):
    """TRL's sampler, which can be set to an epoch and then gives the order that an uninterrupted run has there."""

    def __init__(self, inner: RepeatSampler) -> None:
        self.inner, self.seed = inner, int(inner.seed or 0)

    def set_epoch(self, epoch: int) -> None:
        """Advance the generator past the epochs before this one: each draws one permutation from it."""
        if not self.inner.shuffle:
            return
        self.inner.generator.manual_seed(self.seed)
        for _ in range(epoch):
            torch.randperm(self.inner.num_samples, generator=self.inner.generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


def find(run: Run) -> Path | None:
    """The checkpoint that a run resumes from, or None to start from the beginning. Removes the metrics and samples of
    later steps. Raises PerlError if --resume names a checkpoint that can't be used."""
    asked = str(run.record.settings["resume"])
    folder = run.folder / files.CHECKPOINTS
    had_some = bool(checkpoints.found(folder))
    if asked == LATEST:
        checkpoint = checkpoints.last_complete(folder, _fault, run.note)
    else:
        checkpoint = output_folder.named(run.folder, asked)
        if problem := _fault(checkpoint):
            raise PerlError(
                f"--resume {checkpoint}: it {problem}", "--resume without a name takes the newest usable one"
            )
        for later in checkpoints.found(folder):
            if checkpoints.step_of(later) > checkpoints.step_of(checkpoint):
                checkpoints.discard(later)  # its steps will be taken again
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    rows = _cut_off(run.folder / files.METRICS, step)
    _cut_off(run.folder / files.SAMPLES, step)
    run.record.steps, run.record.tokens = step, int(rows[-1]["num_tokens"]) if rows else 0
    if checkpoint:
        run.note(f"Resuming from step {step} ({checkpoint.name}).")
    else:
        run.note(f"No {'complete ' if had_some else ''}checkpoint found; starting from the beginning.")
    return checkpoint


def total_steps(trainer: Trainer) -> int:
    """The number of steps that a trainer's run will have at its end."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    with device.fork_rng():  # counting the rows draws their order, which training draws again
        return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def _replan_learning_rate(scheduler: Any) -> None:
    """Set the learning rate by the run's length as it is now: the checkpoint has that of the earlier length."""
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate's wraps torch's
    if not isinstance(schedule, LambdaLR):
        return
    for group, rate, share in zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * share(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _fault(checkpoint: Path) -> str | None:
    """Why training can't resume from a complete checkpoint, or None."""
    return None if (checkpoint / FILE).exists() else "was written by another version of perlcli"


def _cut_off(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep and return a file's rows up to a step; rows without a step are from a run's end and are written again."""
    if not path.exists():
        return []
    rows = [row for row in files.read_rows(path) if row.get("step", step + 1) <= step]
    files.write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows

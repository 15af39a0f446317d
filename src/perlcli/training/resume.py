"""Resumes a run exactly: chooses the checkpoint, and restores what transformers and TRL leave out of theirs.

They don't restore the order of the rows in a later epoch, if the sampler draws it from the global random state; TRL's
own sampler after the first epoch; and, in RL, completions that serve several steps and were not yet learned from."""

from __future__ import annotations

import gc
import json
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from trl import RLOOTrainer
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from perlcli import device
from perlcli.errors import PerlError, RunFailed, line
from perlcli.run import checkpoints, files, out_of_memory, output_folder
from perlcli.run.lifecycle import Run
from perlcli.settings import LATEST

FILE = "perlcli.safetensors"  # in a checkpoint, next to what the trainer writes
EPOCH_START = "epoch_start"
Tensors = dict[str, torch.Tensor]
RandomState = tuple[Any, Any, torch.Tensor, torch.Tensor | None]
Generation = tuple[int, list[Tensors] | None]


@dataclass(frozen=True)
class Whole:
    """What a failed step changes of the last complete one before it changes a weight: random states and counts."""

    random: RandomState
    epoch_start: torch.Tensor | None
    tokens: int  # that the trainer has seen
    flops: float  # in all
    generation: Generation | None  # of RL


class Resumable(TrainerCallback):
    """Adds to every checkpoint what the trainer leaves out, and restores it. When a run fails within a step, it can
    still write the checkpoint of the step before."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.epoch_start: torch.Tensor | None = None  # the random state before the rows of this epoch were ordered
        self.is_resuming = False
        self.whole: Whole | None = None  # the last complete step; None before the first, and while weights change
        self.last = ForgetsWhole(self)  # to be added behind all callbacks

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

    def on_step_end(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        trainer: Any = self.trainer
        flops, tokens = state.total_flos + trainer.current_flos, state.num_input_tokens_seen
        generation = trainer.unused() if isinstance(trainer, KeepsGeneration) else None
        self.whole = Whole(random_state(), self.epoch_start, int(tokens), flops, generation)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        is_epoch_end = state.epoch is not None and state.epoch % 1 == 0  # the next epoch starts from this random state
        start = torch.get_rng_state() if is_epoch_end or self.epoch_start is None else self.epoch_start
        tensors: Tensors = {EPOCH_START: start}
        if isinstance(self.trainer, KeepsGeneration):
            tensors |= self.trainer.generation()
        save_file(tensors, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE)

    def save_whole_step(self, run: Run, error: BaseException) -> None:
        """Write the checkpoint of the last complete step if there is none yet, and note it. If that fails too, a note
        says why: `error`, which ended the run, comes first."""
        trainer: Any = self.trainer
        step, folder = trainer.state.global_step, run.folder / files.CHECKPOINTS
        if step == 0 or folder / f"checkpoint-{step}" in checkpoints.found(folder):
            return
        try:
            run.check_intact()
            if self.whole is None:
                raise RunFailed("the run ended while the optimiser changed the weights")
            if _last_step(run) != step:
                raise RunFailed(f"its line in {files.METRICS} could not be written")
            if out_of_memory.failure(error) is not None:
                self._make_room(error)
            self._go_back(self.whole)
            checkpoints.begin(folder)  # without what is left of a checkpoint that failed
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        except Exception as failed:  # of the disk, the memory or a library
            run.note(f"No checkpoint of step {step} could be saved: {line(failed)}")
        else:
            run.note(f"Saved checkpoint-{step}, the last complete step: {run.resume_command} continues from there.")

    def _make_room(self, error: BaseException) -> None:
        """Free what the failed step held, so that a checkpoint can be saved."""
        trainer: Any = self.trainer
        traceback.clear_frames(error.__traceback__)
        trainer.model.zero_grad()
        gc.collect()
        if device.kind() == "cuda":
            torch.cuda.empty_cache()

    def _go_back(self, whole: Whole) -> None:
        """Undo what the failed step has changed."""
        trainer: Any = self.trainer
        set_random_state(whole.random)
        self.epoch_start = whole.epoch_start
        trainer.state.num_input_tokens_seen = whole.tokens
        trainer.state.total_flos, trainer.current_flos = whole.flops, 0.0
        if whole.generation is not None:
            trainer._step, trainer._buffered_inputs = whole.generation

    def take(self, checkpoint: Path) -> None:
        """Restore what a complete checkpoint holds, before the trainer does its part."""
        tensors = load_file(checkpoint / FILE)
        self.epoch_start, self.is_resuming = tensors.pop(EPOCH_START, None), True
        if isinstance(self.trainer, KeepsGeneration):
            self.trainer.take_generation(tensors, checkpoints.state_of(checkpoint)["train_batch_size"])


class ForgetsWhole(TrainerCallback):
    """Forgets the last complete step once the optimiser is about to change its weights. A callback of its own, since
    callbacks before it check the gradients: a step that they refuse changes nothing."""

    def __init__(self, resumable: Resumable) -> None:
        self.resumable = resumable

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self.resumable.whole = None


class KeepsGeneration(RLOOTrainer):
    """TRL's RLOO with its order of prompts and its unused completions restored when it resumes."""

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        inner: Any = super()._get_train_sampler(dataset)
        return OfEpoch(inner)

    def unused(self) -> Generation:
        """The trainer's step within a generation, and the parts of it that it goes on with; None if it is used up."""
        args: Any = self.args
        is_used_up = self._step % (args.steps_per_generation * self.num_iterations) == 0
        return self._step, None if is_used_up else self._buffered_inputs

    def generation(self) -> Tensors:
        """The trainer's step within a generation, and the completions of it that are still to be learned from."""
        step, parts = self.unused()
        tensors = {"step": torch.tensor(step)}
        for index, part in enumerate(parts or []):
            held = {name: tensor for name, tensor in part.items() if tensor is not None}
            tensors |= {f"{index}/{name}": tensor.cpu().clone() for name, tensor in held.items()}
        return tensors

    def take_generation(self, tensors: Tensors, rows: int) -> None:
        """Continue within the generation that `generation` described, with passes of so many `rows`. If passes now have
        another number of rows, the generation is split again."""
        args: Any = self.args
        self._step = int(tensors.pop("step")) * rows // args.train_batch_size
        parts: dict[int, Tensors] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition("/")
            parts.setdefault(int(index), {})[name] = tensor.to(self.accelerator.device)
        held: list[Any] = [parts[index] for index in sorted(parts)]
        if held and rows != args.train_batch_size:
            joined: Any = {name: torch.cat([part[name] for part in held]) for name in held[0]}
            held = split_tensor_dict(joined, args.steps_per_generation)
        self._buffered_inputs: Any = held or None


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


def random_state() -> RandomState:
    """The random states that a checkpoint keeps: of Python, NumPy, torch, and on a GPU of CUDA."""
    on_gpu = torch.cuda.get_rng_state() if device.kind() == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu


def set_random_state(state: RandomState) -> None:
    """Go back to what `random_state` gave."""
    of_python, of_numpy, of_torch, on_gpu = state
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu)


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
    for name in (files.SAMPLES, files.REWARD_ERRORS):
        _cut_off(run.folder / name, step)
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


def _last_step(run: Run) -> int:
    """The last step with metrics; 0 without any."""
    return max((int(row.get("step", 0)) for row in files.read_rows(run.folder / files.METRICS)), default=0)


def _cut_off(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep and return a file's rows up to a step; rows without a step are from a run's end and are written again."""
    if not path.exists():
        return []
    rows = [row for row in files.read_rows(path) if row.get("step", step + 1) <= step]
    files.write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows

"""Going on with a run exactly: which checkpoint, and what transformers and TRL leave out of theirs.

Of a stopped run they don't bring back: the order of the rows in a later epoch, where the sampler draws it from the
stream of random numbers; TRL's own sampler after the first epoch; and in RL the completions that were written and not
yet learned from, where they serve several steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState
from trl import RLOOTrainer
from trl.trainer.utils import RepeatSampler

from perlcli.errors import PerlError
from perlcli.run import checkpoints, output_folder
from perlcli.run.files import CHECKPOINTS, METRICS, SAMPLES, read_rows, write_whole
from perlcli.run.lifecycle import Run
from perlcli.settings import LATEST

FILE = "perlcli.safetensors"  # in a checkpoint, beside what the trainer writes
EPOCH_START = "epoch_start"
Tensors = dict[str, torch.Tensor]


class Resumable(TrainerCallback):
    """Writes into every checkpoint what the trainer leaves out, and brings it back."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.epoch_start: torch.Tensor | None = None  # the random state before the rows of this epoch were ordered
        self.is_given = False

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        state.save_steps = args.save_steps  # transformers goes on with what the checkpoint says
        if self.is_given:
            _plan_rates(lr_scheduler)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_given and self.epoch_start is not None:
            torch.set_rng_state(self.epoch_start)  # the trainer sets that of the step behind it
        self.epoch_start, self.is_given = torch.get_rng_state(), False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_whole = state.epoch is not None and state.epoch % 1 == 0  # the next epoch begins as this one ends
        start = torch.get_rng_state() if is_whole or self.epoch_start is None else self.epoch_start
        tensors: Tensors = {EPOCH_START: start}
        if isinstance(self.trainer, KeepsGeneration):
            tensors |= self.trainer.generation()
        save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def take(self, checkpoint: Path) -> None:
        """Bring back what a whole checkpoint holds, before the trainer does its part."""
        tensors = load_file(checkpoint / FILE)
        self.epoch_start, self.is_given = tensors.pop(EPOCH_START, None), True
        if isinstance(self.trainer, KeepsGeneration):
            self.trainer.take_generation(tensors)


class KeepsGeneration(RLOOTrainer):
    """TRL's RLOO whose order of prompts and unused completions come back."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        inner: Any = super()._get_train_sampler(dataset)
        return OfEpoch(inner)

    def generation(self) -> Tensors:
        """How far the trainer is within a generation, and the completions of it that are still to be learned from."""
        args: Any = self.args
        found = {"step": torch.tensor(self._step)}
        parts = self._buffered_inputs if self._step % (args.steps_per_generation * self.num_iterations) else None
        for index, part in enumerate(parts or ()):
            held = {name: tensor for name, tensor in part.items() if tensor is not None}
            found |= {f"{index}/{name}": tensor.cpu().clone() for name, tensor in held.items()}
        return found

    def take_generation(self, tensors: Tensors) -> None:
        """Go on within the generation that `generation` told of."""
        self._step = int(tensors.pop("step"))
        parts: dict[int, Tensors] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition("/")
            parts.setdefault(int(index), {})[name] = tensor.to(self.accelerator.device)
        self._buffered_inputs: Any = [parts[index] for index in sorted(parts)] or None


class OfEpoch(Sampler[int]):
    """TRL's sampler, which can be set to an epoch: in each it gives the order that it gives without a stop."""

    def __init__(self, inner: RepeatSampler) -> None:
        self.inner, self.seed = inner, int(inner.seed or 0)

    def set_epoch(self, epoch: int) -> None:
        """Be where the epochs before leave the sampler: each takes one permutation from its generator."""
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
    """The checkpoint that a run under --resume goes on from, None to start over; metrics and samples of later steps are
    taken back. Raises PerlError where --resume names one that won't do."""
    asked = str(run.record.settings["resume"])
    folder = run.folder / CHECKPOINTS
    had = bool(checkpoints.found(folder))
    if asked == LATEST:
        found = checkpoints.last_complete(folder, _fault, run.note)
    else:
        found = _asked_for(run, output_folder.named(run.folder, asked))
    step = checkpoints.step_of(found) if found else 0
    rows = _take_back(run.folder / METRICS, step)
    _take_back(run.folder / SAMPLES, step)
    run.record.steps, run.record.tokens = step, int(rows[-1]["num_tokens"]) if rows else 0
    run.note(
        f"Going on from step {step} ({found.name})."
        if found
        else f"No checkpoint {'that is whole' if had else 'yet'}: starting over."
    )
    return found


def total_steps(trainer: Any) -> int:
    """The steps that a trainer's run is to have in the end."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    with torch.random.fork_rng():  # a look at the rows' order, which is drawn again to train
        return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def is_last(checkpoint: Path, total: int) -> bool:
    """Whether a checkpoint is of the last of so many steps: transformers would do one too many."""
    return bool(checkpoints.state_of(checkpoint)["global_step"] >= total)


def tell_longer(checkpoint: Path, run: Run, total: int, schedule: str) -> None:
    """Say so where a run goes on for longer than was planned, and its learning rate was planned by that."""
    was = checkpoints.state_of(checkpoint)["max_steps"]
    if total != was and not schedule.startswith("constant"):
        run.note(f"The run was of {was:,} steps and is now of {total:,}: its learning rate ({schedule}) follows those.")


def take_last(trainer: Any, checkpoint: Path) -> None:
    """Let a trainer be as it was when it had done its last step: its weights and its history."""
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))


def _plan_rates(given: Any) -> None:
    """Let the next step have the learning rate of the run's length as it is now: in the checkpoint it is that of the
    length before, 0 at its end."""
    plan = getattr(given, "scheduler", given)  # accelerate's holds torch's
    if not isinstance(plan, LambdaLR):
        return
    for group, rate, share in zip(plan.optimizer.param_groups, plan.base_lrs, plan.lr_lambdas, strict=True):
        group["lr"] = rate * share(plan.last_epoch)
    plan._last_lr = [group["lr"] for group in plan.optimizer.param_groups]


def _fault(checkpoint: Path) -> str | None:
    """Why a whole checkpoint can't be trained on from, or None."""
    return None if (checkpoint / FILE).exists() else "was written by another version of perlcli"


def _asked_for(run: Run, checkpoint: Path) -> Path:
    """The checkpoint that --resume names; those behind it are deleted, as their steps are taken again."""
    if wrong := _fault(checkpoint):
        raise PerlError(f"--resume {checkpoint}: it {wrong}", "--resume alone takes the last one to go on from")
    for later in checkpoints.found(run.folder / CHECKPOINTS):
        if checkpoints.step_of(later) > checkpoints.step_of(checkpoint):
            checkpoints.discard(later)
    return checkpoint


def _take_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep a file's rows up to a step, and give them; rows without a step are a run's last, and are written again."""
    if not path.exists():
        return []
    rows = [row for row in read_rows(path) if row.get("step", step + 1) <= step]
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows

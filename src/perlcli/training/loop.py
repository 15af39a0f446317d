"""What watches a TRL trainer at work: progress, metrics, tokens, memory, and a stop where nothing can be learned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import RLOOTrainer

from perlcli import device
from perlcli.errors import Interrupted, PerlError, RunFailed
from perlcli.run import checkpoints, disk, signals
from perlcli.run.files import CHECKPOINTS, METRICS, SAMPLES
from perlcli.run.lifecycle import Run
from perlcli.run.metrics import STEP, STEP_CPU
from perlcli.run.progress import Progress
from perlcli.training import resume
from perlcli.training.resume import Resumable

KEPT = 10  # rows of a trainer's own history of its figures


class Meter(TrainerCallback):
    """Keeps `metrics.jsonl` and the progress line, and stops a run whose loss or gradient is no number."""

    def __init__(self, run: Run, *, counts_on: bool = False) -> None:
        self.run, self.counts_on = run, counts_on
        self.progress: Progress | None = None
        self.interrupted = 0  # the signal that asked for the end
        self.earlier_tokens = 0  # of a resumed run, where its trainer counts from 0 again
        self.began = self.took = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = Progress(self.run.record.command, state.max_steps).__enter__()
        self.earlier_tokens = 0 if self.counts_on else self.run.record.tokens

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = clocks()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before the weights change: a gradient that is no number would spoil them."""
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not grads:
            raise RunFailed("No parameter received a gradient: nothing can be learned", "check --lora-target-modules")
        if args.fp16:
            return  # its gradient scaler finds an overflow itself, leaves the step out and lowers the scale
        if not math.isfinite(float(torch.stack([grad.detach().float().norm() for grad in grads]).sum())):
            step = state.global_step + 1
            self._fail(f"gradient is not a finite number at step {step}; the adapter of the step before is saved")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        counted = int(logs.get("num_tokens") or 0)
        self.run.record.steps, self.run.record.tokens = state.global_step, self.earlier_tokens + counted
        seconds = dict(zip((STEP, STEP_CPU), self.took, strict=True))
        self.run.append(METRICS, {"step": state.global_step, **logs, **seconds, "num_tokens": self.run.record.tokens})
        if self.progress:
            self.progress.update(state.global_step, logs)
        del state.log_history[:-KEPT]  # all of it is in metrics.jsonl; every checkpoint would hold it once more
        if not math.isfinite(logs["loss"]):
            self._fail(f"loss is not a finite number at step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer has written a checkpoint: make it one that counts."""
        self.run.check_intact()
        for path in (self.run.folder / METRICS, self.run.folder / SAMPLES):
            if path.exists():
                disk.sync(path)  # a checkpoint that outlives its machine is never ahead of them
        checkpoints.keep(self.run.folder / CHECKPOINTS, state.global_step, self.run.record.settings["save_total_limit"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.run.check_intact()  # the trainer would make folders again that were deleted
        wall, processors = clocks()
        self.took = round(wall - self.began[0], 6), round(processors - self.began[1], 6)
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        return control

    def close(self) -> None:
        """Take the progress line off the terminal."""
        if self.progress:
            self.progress.__exit__(None, None, None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """On Ctrl-C, SIGTERM or SIGUSR1 finish the step, save and end; a second one ends at once."""

        def ask(number: int) -> None:
            if self.interrupted:
                signals.stop(number)
            self.interrupted = number
            disk.tell("Finishing this step, then saving. Once more to stop at once.")

        with signals.heard(ask):
            yield

    def _fail(self, what: str) -> None:
        raise RunFailed(f"The {what}", "try a lower --learning-rate, or --dtype float32 / bfloat16")


def clocks() -> tuple[float, float]:
    """Seconds on the wall and of this process's processors, once the GPU has done what it was given."""
    if device.kind() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def train(trainer: Trainer, run: Run, save: Callable[[Any, Path], None]) -> None:
    """Train to the end, or to a stop that leaves the last good state; `save` writes a model into a folder, from where
    it comes into the run's once it is whole."""
    meter = Meter(run, counts_on=isinstance(trainer, RLOOTrainer))
    resumable = Resumable(trainer)
    trainer.remove_callback(PrinterCallback)
    for callback in (resumable, meter):  # in this order: a checkpoint is sealed when all is in it
        trainer.add_callback(callback)
    checkpoints.begin(run.folder / CHECKPOINTS)
    run.parts.append(f"{CHECKPOINTS}/{checkpoints.HERE}")
    checkpoint = resume.find(run) if run.record.settings["resume"] else None
    begun = run.record.steps
    if device.kind() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        with meter.listening():
            _train(trainer, run, resumable, checkpoint)
    except (PerlError, KeyboardInterrupt):  # also of a reward function that fails in the middle
        if run.is_intact:
            _save(trainer, run, save)
        raise
    finally:
        meter.close()
        _keep_memory(run, has_trained=trainer.state.global_step > begun)
    _save(trainer, run, save)
    if meter.interrupted:
        stopped = Interrupted(f"Stopped at step {run.record.steps} and saved", run.resume_command)
        stopped.exit_code = 128 + meter.interrupted
        raise stopped


def _keep_memory(run: Run, *, has_trained: bool) -> None:
    """Keep the most that the run held, in this process or by the record of an earlier part."""
    earlier = run.before.memory if run.before is not None else {}
    run.record.peak_memory_mb = max(device.peak_memory_mb(), run.before.peak_memory_mb if run.before is not None else 0)
    found = device.memory_of_training(run.record.memory["before_mb"]) if has_trained else {}
    for name in ("training_mb", "reserved_mb"):
        if name in found or name in earlier:
            run.record.memory[name] = max(found.get(name, 0.0), earlier.get(name, 0.0))


def _train(trainer: Trainer, run: Run, resumable: Resumable, checkpoint: Path | None) -> None:
    """Train from the start or from a checkpoint on; from one of the last step there is nothing left to train."""
    if checkpoint is None:
        trainer.train()
        return
    total = resume.total_steps(trainer)
    if resume.is_last(checkpoint, total):
        run.note("That was the last step: nothing is left to train.")
        resume.take_last(trainer, checkpoint)
    else:
        resumable.take(checkpoint)
        resume.tell_longer(checkpoint, run, total, SchedulerType(trainer.args.lr_scheduler_type).value)
        trainer.train(resume_from_checkpoint=str(checkpoint))


def _save(trainer: Trainer, run: Run, save: Callable[[Any, Path], None]) -> None:
    """Save the model as it is, and leave the one that lay there before alone until it is whole."""
    with disk.aside(run.folder) as side:
        save(trainer.model, side)

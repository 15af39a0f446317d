"""Runs a TRL trainer: progress, metrics, tokens, memory, stops by a signal, and saving whatever happens."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import RLOOTrainer

from perlcli import device
from perlcli.errors import PerlError, RunFailed
from perlcli.model import roles
from perlcli.run import checkpoints, disk, files, metrics, peaks, signals
from perlcli.run.lifecycle import Run
from perlcli.run.progress import Progress
from perlcli.text import duration, enum_value
from perlcli.training import guards, resume

KEPT = 10  # entries of the trainer's own log history
RECENT = 10  # steps from which the length of the next one is guessed


class Meter(TrainerCallback):
    """Keeps `metrics.jsonl` and the progress line, and stops a run whose loss or gradient is NaN or infinite.
    `restores_tokens` says whether the trainer continues its count of tokens when it resumes."""

    def __init__(self, run: Run, *, restores_tokens: bool = False) -> None:
        self.run, self.restores_tokens = run, restores_tokens
        self.progress: Progress | None = None
        self.interrupted = 0  # the signal that asked the run to stop
        self.earlier_tokens = 0  # of a resumed run whose trainer counts from 0 again
        self.step_start = self.step_seconds = (0.0, 0.0)
        self.is_in_step = False
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of the last steps
        self.last_save = time.monotonic()

    def on_train_begin(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        self.progress = Progress(self.run.record.command, state.max_steps).__enter__()
        self.earlier_tokens = 0 if self.restores_tokens else self.run.record.tokens
        self.last_save = time.monotonic()

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.step_start, self.is_in_step = clocks(), True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, *_: object, model: Any = None, **__: object
    ) -> None:
        """Check the gradients before they change the weights."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:
            raise RunFailed("No parameter received a gradient: nothing can be learned", "check --lora-target-modules")
        if args.fp16:
            return  # the gradient scaler finds an overflow itself, skips the step and lowers the scale
        if not math.isfinite(float(torch.stack([gradient.detach().float().norm() for gradient in gradients]).sum())):
            step = state.global_step + 1
            self._fail(f"gradient is NaN or infinite at step {step}; the weights from before that step are saved")

    def on_log(
        self, args: object, state: TrainerState, *_: object, logs: Mapping[str, float] | None = None, **__: object
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        record = self.run.record
        # TRL's RL only logs it at a step that samples; the state's count is the same, and there at every step
        tokens = logs.get("num_tokens", state.num_input_tokens_seen)
        record.steps, record.tokens = state.global_step, self.earlier_tokens + int(tokens or 0)
        seconds = dict(zip((metrics.STEP, metrics.STEP_CPU), self.step_seconds, strict=True))
        self.run.append(files.METRICS, {"step": state.global_step, **logs, **seconds, "num_tokens": record.tokens})
        if self.progress:
            self.progress.update(state.global_step, logs)
        del state.log_history[:-KEPT]  # metrics.jsonl has all of it; every checkpoint would hold it again
        if not math.isfinite(logs["loss"]):
            self._fail(f"loss is NaN or infinite at step {state.global_step}")

    def on_save(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        """The trainer has written a checkpoint: complete it and move it to its place."""
        self.run.check_intact()
        for path in (self.run.folder / name for name in (files.METRICS, *files.TEXTS)):
            if path.exists():
                disk.sync(path)  # after a power failure, no checkpoint is ahead of them
        limit = self.run.record.settings["save_total_limit"]
        checkpoints.keep(self.run.folder / files.CHECKPOINTS, state.global_step, limit)
        self.last_save = time.monotonic()

    def on_step_end(self, args: object, state: object, control: TrainerControl, **_: object) -> TrainerControl:
        self.run.check_intact()  # the trainer would recreate folders that were deleted
        wall, processors = clocks()
        self.step_seconds = round(wall - self.step_start[0], 6), round(processors - self.step_start[1], 6)
        self.recent.append(self.step_seconds[0])
        self.is_in_step = False
        minutes = self.run.record.settings["save_minutes"]
        if minutes and time.monotonic() - self.last_save >= 60 * minutes:
            control.should_save = True
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        return control

    def close(self) -> None:
        """Take the progress line off the terminal."""
        if self.progress:
            self.progress.__exit__(None, None, None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """On Ctrl-C, SIGTERM or SIGUSR1 finish the step, save and stop; on a second signal stop at once. Both are
        answered at once."""

        def ask(number: int) -> None:
            if self.interrupted:
                signals.stop(number)
            self.interrupted = number

        def end(number: int) -> None:
            self.close()
            self.run.end_now(number)

        with signals.heard(ask), signals.answered_at_once(self._answer, end):
            yield

    def _answer(self, count: int) -> None:
        if count == 1:
            disk.tell(f"Interrupted: {self.until_saved()}; interrupt again to stop now.")
        elif count == 2:
            disk.tell("Stopping now.")

    def until_saved(self) -> str:
        """What has to happen until the run is saved and stops, with the time that is left of the step."""
        if not self.is_in_step:
            return "saving"
        if not self.recent:
            return "finishing the first step, then saving"
        left = sum(self.recent) / len(self.recent) - (time.perf_counter() - self.step_start[0])
        return f"finishing the step, about {duration(max(left, 1.0))} left, then saving"

    def _fail(self, what: str) -> None:
        raise RunFailed(f"The {what}", "try a lower --learning-rate, or --dtype float32 / bfloat16")


def clocks() -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds of this process, once the GPU has finished its work."""
    if device.kind() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def describe(trainer: Any, run: Run) -> None:
    """Keep in the record the trainer's settings and how many parameters it trains."""
    run.record.trl_settings = trainer.args.to_dict()
    run.record.trainable_parameters, run.record.total_parameters = roles.count_parameters(trainer.model)


def has_loaded(run: Run) -> None:
    """Keep the peak of loading; on a GPU the peak counts anew from here on. A later call changes nothing: `perl rl`
    samples before it trains, which isn't loading."""
    if "loading_mb" not in run.record.memory:
        run.record.memory["loading_mb"] = peaks.loaded_mb(run.record.memory["before_mb"])


def train(trainer: Trainer, run: Run, save: guards.Save) -> None:
    """Train to the end, or until a signal or an error, and save the model in either case. `save` writes the model, with
    the state that it had before it was lent to the trainer (`trainer.lent`), into a folder, from which its files move
    into the run's once all are complete. Raises Signalled after a signal, RunFailed at a NaN or infinite loss or
    gradient, and PerlError from a reward function."""
    meter = Meter(run, restores_tokens=isinstance(trainer, RLOOTrainer))
    resumable = resume.Resumable(trainer)
    trainer.remove_callback(PrinterCallback)
    skipped = guards.SkippedSteps(run)
    # in this order: a checkpoint is sealed once everything is in it; gradients are checked before weights may change
    for callback in (skipped, resumable, meter, resumable.last):
        trainer.add_callback(callback)
    checkpoints.begin(run.folder / files.CHECKPOINTS)
    run.parts.append(f"{files.CHECKPOINTS}/{checkpoints.HERE}")
    checkpoint = resume.find(run) if run.record.settings["resume"] else None
    first_step = run.record.steps
    has_loaded(run)
    try:
        with meter.listening(), without_casts(trainer):
            _train(trainer, run, resumable, checkpoint)
    except BaseException as error:  # whatever ends a run leaves its last complete step
        resumable.save_whole_step(run, error)
        if isinstance(error, PerlError | KeyboardInterrupt) and run.is_intact:  # PerlError also from a reward function
            _save(trainer, run, save)
        raise
    finally:
        meter.close()
        _keep_memory(run, has_trained=trainer.state.global_step > first_step)
    _save(trainer, run, save)
    if meter.interrupted:
        signals.stop(meter.interrupted)
    skipped.check()


def without_casts(trainer: Any) -> AbstractContextManager[None]:
    """Lets adapters leave their input as it is while the trainer computes in mixed precision (see `roles.casting`)."""
    return roles.casting(trainer.model, on=not (trainer.args.bf16 or trainer.args.fp16))


def _keep_memory(run: Run, *, has_trained: bool) -> None:
    """Keep the peak memory of the run, in this process or, if it was resumed, in an earlier one."""
    record, before = run.record, run.before
    earlier = before.memory if before is not None else {}
    before_peak = before.peak_memory_mb if before is not None else 0.0
    record.peak_memory_mb = max(peaks.peak_mb(), record.memory["loading_mb"], before_peak)
    now = peaks.of_training(record.memory["before_mb"]) if has_trained else {}
    for name in ("training_mb", "reserved_mb"):
        if name in now or name in earlier:
            record.memory[name] = max(now.get(name, 0.0), earlier.get(name, 0.0))


def _train(trainer: Trainer, run: Run, resumable: resume.Resumable, checkpoint: Path | None) -> None:
    """Train from the start or from a checkpoint; after the checkpoint of the last step nothing is left to train."""
    if checkpoint is None:
        trainer.train()
        return
    state, total = checkpoints.state_of(checkpoint), resume.total_steps(trainer)
    if state["global_step"] >= total:  # transformers would take one step too many
        run.note("That was the last step; nothing is left to train.")
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
        return
    resumable.take(checkpoint)
    planned, schedule = state["max_steps"], enum_value(trainer.args.lr_scheduler_type)
    if total != planned and not schedule.startswith("constant"):
        change = f"The run was planned for {planned:,} steps and now has {total:,}"
        run.note(f"{change}: the learning rate schedule ({schedule}) follows the new length.")
    trainer.train(resume_from_checkpoint=str(checkpoint))


def _save(trainer: Trainer, run: Run, save: guards.Save) -> None:
    """Save the model; files of the same names are replaced only once the new ones are complete."""
    held: Any = trainer
    with held.lent.given_back(), disk.aside(run.folder) as side:
        save(held.model, side)

"""What watches a TRL trainer at work: progress, metrics, tokens, memory, and a stop where nothing can be learned."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from perlcli import device
from perlcli.errors import Interrupted, PerlError, RunFailed
from perlcli.progress import Progress
from perlcli.record import CHECKPOINTS, METRICS, SAMPLES, STEP, STEP_CPU, Run


class Meter(TrainerCallback):
    """Keeps `metrics.jsonl` and the progress line, and stops a run whose loss or gradient is no number."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.progress: Progress | None = None
        self.interrupted = 0  # the signal that asked for the end
        self.earlier_tokens: int | None = None  # of a resumed run, where its trainer counts from 0 again
        self.began = self.took = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = Progress(self.run.record.command, state.max_steps).__enter__()

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
        if self.earlier_tokens is None:
            self.earlier_tokens = self.run.record.tokens if counted < self.run.record.tokens else 0
        self.run.record.steps, self.run.record.tokens = state.global_step, self.earlier_tokens + counted
        seconds = dict(zip((STEP, STEP_CPU), self.took, strict=True))
        self.run.append(METRICS, {"step": state.global_step, **logs, **seconds, "num_tokens": self.run.record.tokens})
        if self.progress:
            self.progress.update(state.global_step, logs)
        if not math.isfinite(logs["loss"]):
            self._fail(f"loss is not a finite number at step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
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
        """On Ctrl-C or SIGTERM finish the step, save and end; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = number
            print("Finishing this step, then saving. Once more to stop at once.", flush=True)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _fail(self, what: str) -> None:
        raise RunFailed(f"The {what}", "try a lower --learning-rate, or --dtype float32 / bfloat16")


def clocks() -> tuple[float, float]:
    """Seconds on the wall and of this process's processors, once the GPU has done what it was given."""
    if device.kind() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def train(trainer: Trainer, run: Run, save: Callable[[Any], None]) -> None:
    """Train to the end, or to a stop that leaves the last good state; `save` writes a model into the run's folder."""
    meter = Meter(run)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(meter)
    checkpoint = _checkpoint(run) if run.record.settings["resume"] else None
    if device.kind() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        with meter.listening():
            trainer.train(resume_from_checkpoint=checkpoint)
    except (PerlError, KeyboardInterrupt):  # also of a reward function that fails in the middle
        save(trainer.model)
        raise
    finally:
        meter.close()
        run.record.peak_memory_mb = device.peak_memory_mb()
        run.record.memory |= device.memory_of_training(run.record.memory["before_mb"])
    save(trainer.model)
    if meter.interrupted:
        stopped = Interrupted(f"Stopped at step {run.record.steps} and saved", go_on(run))
        stopped.exit_code = 128 + meter.interrupted
        raise stopped


def go_on(run: Run) -> str:
    """The command that goes on with a run."""
    return f"perl {run.record.command} --config {run.folder}/settings.yaml --resume"


def _last_whole(run: Run, folder: Path) -> str | None:
    """The newest checkpoint to train on from: written to its end, and before the run's last step."""
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))):
        fault = _fault(run, Path(found) / TRAINER_STATE_NAME)
        if fault is None:
            return str(found)
        run.note(f"{Path(found).name} {fault}: taking the one before.")
        shutil.rmtree(found)
    return None


def _fault(run: Run, state_file: Path) -> str | None:
    """Why a checkpoint can't be trained on from, or None."""
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is the last file that transformers writes
        return "was only half written"
    steps, epochs = run.record.settings["max_steps"], run.record.settings["num_train_epochs"]
    total = steps if steps is not None else state["max_steps"] * max(1.0, epochs / state["num_train_epochs"])
    if state["global_step"] >= total:  # transformers would do a step too many
        return "is of the last step"
    return None


def _take_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep a file's rows up to a step, and give them; rows without a step are a run's last, and are written again."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(_row, lines) if row is not None and row.get("step", step + 1) <= step]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows


def _row(line: str) -> dict[str, Any] | None:
    """A line of metrics; None for one that a killed run left half-written."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _checkpoint(run: Run) -> str | None:
    """The last checkpoint to go on from; metrics and samples of later steps are taken back."""
    folder = run.folder / CHECKPOINTS
    found = _last_whole(run, folder)
    if found is None:
        run.note("No checkpoint yet: starting over.")
    step = int(found.rsplit("-", 1)[1]) if found else 0
    rows = _take_back(run.folder / METRICS, step)
    _take_back(run.folder / SAMPLES, step)
    run.record.tokens = int(rows[-1]["num_tokens"]) if rows else 0
    if found:
        run.note(f"Going on from step {step} ({Path(found).name}).")
    return found

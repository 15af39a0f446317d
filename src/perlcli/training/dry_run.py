"""What `--dry-run` prints: the length of a run, its data in tokens, its memory as predicted, its files; on request its
time, after a trial of two steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import TrainingArguments
from trl import RLOOConfig

from perlcli import settings
from perlcli.doctor.checks import memory_sizes
from perlcli.errors import PerlError, line
from perlcli.memory import plans, prediction
from perlcli.model import adapters, sources
from perlcli.run import files
from perlcli.terminal import say
from perlcli.text import counted, duration, enum_value, number, size
from perlcli.training import origin, trial
from perlcli.training.prepare import Prepared

IDS = ("input_ids", "chosen_ids", "rejected_ids")  # columns of tokens


@dataclass(frozen=True)
class Lengths:
    """The tokens of each training row; of a pair, those of both texts. `longest` is the longest text."""

    rows: Sequence[int]
    longest: int

    @classmethod
    def of(cls, *columns: Sequence[Sequence[int]]) -> Lengths:
        """The lengths of rows by their columns of token ids."""
        counts = [[len(ids) for ids in column] for column in columns]
        return cls([sum(row) for row in zip(*counts, strict=True)], max(map(max, counts)))


def lengths_of(table: Dataset) -> Lengths:
    """The lengths of a table of tokens."""
    return Lengths.of(*(table[name] for name in IDS if name in table.column_names))


def preview(
    prepared: Prepared[settings.Training | settings.Eval],
    config: TrainingArguments | None = None,
    lengths: Lengths | None = None,
) -> None:
    """Print what a run would do; `config` is TRL's and `lengths` are those of the training data if it would train."""
    source, values = prepared.source, prepared.settings
    if values.recipe.recipe is not None:
        say(f"recipe: {values.recipe.recipe}")
    say(f"model: {source.name} (base {source.base_name})")
    if isinstance(values, settings.Eval) or config is None or lengths is None:
        say(f"output: {values.run.output}\nDry run: nothing was loaded, trained or written.")
        return
    say(_adapter_line(prepared, values))
    say(_training_line(values, config, lengths))
    say(_data_line(values, lengths))
    say(f"memory: {memory_line(values, lengths.longest)}")
    say(_output_line(values))
    if not values.keep.time:
        say("Dry run: nothing was loaded, trained or written.")
        return
    say(_time_line(trial.run(values, steps=trial.TIMED_STEPS), steps_of(config, len(lengths.rows))))
    say("Dry run: nothing was written.")


def steps_of(config: TrainingArguments, rows: int) -> int | None:
    """The optimiser steps of a run on so many rows, as transformers counts them (`set_initial_training_values`); None
    if TRL packs the rows, and so decides later how many there are."""
    if config.max_steps > 0:
        return int(config.max_steps)
    if getattr(config, "packing", False):
        return None
    passes = config.gradient_accumulation_steps
    batches = math.ceil(rows / config.per_device_train_batch_size)
    if isinstance(config, RLOOConfig):  # whole generations only
        per_generation = int(config.steps_per_generation or passes)
        prompts = int(config.generation_batch_size or 1) // int(config.num_generations or 1)
        batches = rows // prompts * config.num_iterations * per_generation
    return math.ceil(config.num_train_epochs * max(math.ceil(batches / passes), 1))


def _training_line(values: settings.Training, config: TrainingArguments, lengths: Lengths) -> str:
    steps, epochs = steps_of(config, len(lengths.rows)), f"{config.num_train_epochs:g} epoch(s)"
    batch, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
    length = epochs if steps is None else counted(steps, "step")
    if steps is not None and config.max_steps <= 0:
        length = f"{epochs}, {length},"
    split = f" ({batch} x {passes})" if passes > 1 else ""
    chosen = "; --auto-batch chooses the split" if values.batch.auto_batch and not values.keep.time else ""
    rate = f"learning rate {config.learning_rate:g} ({enum_value(config.lr_scheduler_type)})"
    what = "completions" if isinstance(values, settings.Rl) else "rows"
    return f"training: {length} of {batch * passes} {what}{split}, {rate}{chosen}"


def _data_line(values: settings.Training, lengths: Lengths) -> str:
    count, total = len(lengths.rows), sum(lengths.rows)
    mean = f"{number(total / count)} each, {max(lengths.rows):,} at most"
    if isinstance(values, settings.Rl):
        most = values.sampling.max_completion_length
        return f"data: {counted(count, 'prompt')}, {total:,} tokens ({mean}), and up to {most:,} per completion"
    return f"data: {counted(count, 'row')}, {total:,} tokens ({mean})"


def memory_line(values: settings.Training, longest: int) -> str:
    """The peak that `perl estimate` predicts for rows of --max-length, and for the longest that there are (`longest`
    tokens); whether that fits into the memory that is free."""
    completion = int(values.sampling.max_completion_length or 0) if isinstance(values, settings.Rl) else 0
    length, most = longest + completion, int(values.data.max_length or 1)
    try:
        model = plans.Model(values.model.model, trust_remote_code=values.model.trust_remote_code)
        row = model.row(values)
        plan = model.plan(trial.with_length(values, min(length, most)), model.arm_of(values))
        plan = prediction.settled(model.shape, plan, prediction.device_bytes())
        needed = prediction.takes(prediction.predict(model.shape, plan), plan)
    except PerlError as error:
        return f"not predicted ({line(error)})"
    free = free_bytes()
    verdict = "fits" if needed <= free else "does not fit"
    words = f"{size(row.peak)} predicted for rows of {most:,} tokens"
    if length < most:
        words += f", {size(needed)} for the longest here ({length:,})"
    rewards = values.sampling.reward if isinstance(values, settings.Rl) else ()
    others = [name for name in rewards if not model.counts(name)]
    left_out = f"; without {', '.join(others)}, which has a base of its own" if others else ""
    return f"{words}; {size(free)} free: {verdict}{left_out}"


def free_bytes() -> float:
    """The memory that is free for a run: of the GPU, or of this machine without one."""
    on_gpu = prediction.free_bytes()
    return memory_sizes()[0] if on_gpu is None else on_gpu


def _output_line(values: settings.Training) -> str:
    kept = "the model" if values.lora.full else "the adapter"
    minutes = values.keep.save_minutes
    often = f"every {values.keep.save_steps:,} steps" + (f" or {minutes:g} minutes" if minutes else "")
    checkpoints = f"checkpoints {often}, the last {values.keep.save_total_limit} kept"
    names = ", ".join((kept, files.RECORD, files.SETTINGS, files.METRICS, "plots"))
    return f"output: {values.run.output}\nfiles: {names}; {checkpoints}"


def _time_line(found: trial.Trial, steps: int | None) -> str:
    low, high = min(found.seconds), max(found.seconds)
    line = f"time: {number(low)} to {number(high)} s per step ({counted(len(found.seconds), 'step')} timed)"
    if steps is None:
        return line
    total = f"{duration(low * steps)} to {duration(high * steps)} for {counted(steps, 'step')}"
    return f"{line}: {total}, and {duration(found.loading_seconds)} to load; evaluation comes on top"


def _adapter_line(prepared: Prepared[settings.Training | settings.Eval], values: settings.Training) -> str:
    lora, source = values.lora, prepared.source
    model = sources.skeleton(source, trust_remote_code=values.model.trust_remote_code)
    total = sum(parameter.numel() for parameter in model.parameters()) if model is not None else 0
    if prepared.adapter is None:
        return f"full tuning: all {f'{total:,} ' if total else ''}parameters train"
    line = f"adapter: {adapters.words(prepared.adapter)}"
    if source.adapter or model is None:
        return line
    modules = getattr(adapters.on_model(lora, model, origin.task_of(values)), "target_modules", "")
    names = modules if isinstance(modules, str) else ", ".join(modules)
    trained = adapters.try_on(lora, model, origin.task_of(values))
    return f"{line} on {names}; {trained:,} parameters train, {total:,} stay frozen"

"""What runs cost and how good they are: the figures of one run from its folder, and of an arm over its runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, TypeGuard

from perlcli.comparison.results import ArmResult, RunFigures, Spread
from perlcli.run import lineage, metrics, out_of_memory, setup, summary
from perlcli.run.files import METRICS, SAMPLES, read_rows
from perlcli.run.metrics import STEP, STEP_CPU
from perlcli.run.record import RunRecord, read_record
from perlcli.text import clip

SAMPLED, LONGEST = 3, 2000  # samples of a run that a report shows, and characters of each text
WARM_UP = 2  # steps that don't count: caches fill, a GPU picks its kernels


def of_run(folder: Path, command: str = "", *, shown: str = "", repeat: int = 1) -> RunFigures:
    """The figures of a folder's run; `shown` is the folder as the report names it. Raises PerlError without a run."""
    record = read_record(folder)
    steps = _steps(folder / METRICS)
    counted = steps[min(WARM_UP, max(0, len(steps) - 1)) :]
    return RunFigures(
        folder=shown or str(folder),
        command=command or f"perl {record.command} --config {folder}/settings.yaml",
        status=outcome(record),
        failure=record.failure,
        seed=record.seed,
        repeat=repeat,
        steps=record.steps,
        trainable_parameters=record.trainable_parameters,
        total_parameters=record.total_parameters,
        memory_mb=_megabytes(record, "training_mb"),
        reserved_mb=_megabytes(record, "reserved_mb"),
        step_seconds=[row[STEP] for row in counted],
        step_cpu_seconds=[row[STEP_CPU] for row in counted],
        step_tokens=[row["tokens"] for row in counted],
        phases={k.removeprefix("seconds_"): v for k, v in record.metrics.items() if k.startswith("seconds_")},
        weights_bytes=record.files.get("weights"),
        optimizer_bytes=record.files.get("optimizer"),
        metrics=record.metrics,
        setup=setup.described(record),
        eval_rows=_eval_rows(record),
        verdicts=verdicts(record),
        notes=record.notes,
        samples=_samples(folder / SAMPLES, record.command),
    )


def verdicts(record: RunRecord) -> list[str]:
    """What a run's figures show, in sentences; with what is known of the rewards that it used."""
    found = list(record.verdicts)
    for name, reward in lineage.rewards_unsaid(record).items():
        found += [f"The reward {name}: {line}" for line in summary.judged(reward)]
    return found


def _eval_rows(record: RunRecord) -> int | None:
    """The held-out rows that a run's figures come from."""
    counted = record.metrics.get("rows", record.metrics.get("prompts", record.data.get("eval", {}).get("kept")))
    return counted if isinstance(counted, int) and record.command != "rl" else None


def _samples(path: Path, stage: str) -> list[dict[str, Any]]:
    """Some samples of a run, of RL the last ones, with long texts cut."""
    rows = read_rows(path)
    chosen = rows[-SAMPLED:] if stage == "rl" else rows[:SAMPLED]
    return [
        {key: clip(value, LONGEST) if isinstance(value, str) else value for key, value in row.items()} for row in chosen
    ]


def outcome(record: RunRecord) -> str:
    """How a run ended, in words."""
    if record.status == "failed" and out_of_memory.is_named_in(record.failure or ""):
        return "out of memory"
    return record.status


def _megabytes(record: RunRecord, name: str) -> float | None:
    value = record.memory.get(name)
    return value if _is_number(value) else None


def _steps(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that are steps, each with its own tokens."""
    steps, before = [], 0
    for row in read_rows(path):
        tokens = row.get("num_tokens", before)  # since the start
        if all(_is_number(value) for value in (row.get(STEP), row.get(STEP_CPU), tokens)):
            steps.append({**row, "tokens": tokens - before})
            before = tokens
    return steps


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def summarise(arm: ArmResult, stage: str) -> ArmResult:
    """The arm with the figures of its finished runs; if none finished, with the reason."""
    done = arm.finished
    if not done:
        arm.failure = "; ".join(dict.fromkeys(map(_ending, arm.runs))) or "not run yet"
        return arm
    if len(done) < len(arm.runs):
        endings = "; ".join(dict.fromkeys(_ending(run) for run in arm.runs if run.status != "finished"))
        missing = f"{len(arm.runs) - len(done)} of {len(arm.runs)} runs have no figures: {endings}"
        arm.remarks = [*arm.remarks, missing]
    arm.trainable_parameters, arm.total_parameters = done[0].trainable_parameters, done[0].total_parameters
    arm.memory_mb = over_runs([run.memory_mb for run in done])
    arm.reserved_mb = over_runs([run.reserved_mb for run in done])
    steps = [step for run in done for step in zip(run.step_tokens, run.step_seconds, strict=True)]
    arm.steps_per_second = _quartiles([1 / seconds for _, seconds in steps if seconds])
    arm.tokens_per_second = _quartiles([tokens / seconds for tokens, seconds in steps if seconds])
    first = [run for run in done if run.repeat == 1] or done
    qualities = {metric.name: _quality(first, metric.name) for metric in metrics.compared(stage)}
    arm.quality = {name: spread for name, spread in qualities.items() if spread is not None}
    return arm


def _ending(run: RunFigures) -> str:
    """How a run ended early, with the memory that it held if it ran out."""
    if run.status == "out of memory":
        return f"out of memory at {run.memory_mb / 1000:.1f} GB" if run.memory_mb else "out of memory"
    return f"{run.status}: {run.failure}" if run.failure else run.status


def over_runs(values: Iterable[float | None]) -> Spread | None:
    """Mean, lowest and highest of the values that are known; None without any."""
    known = [value for value in values if value is not None]
    return Spread(fmean(known), min(known), max(known), len(known)) if known else None


def _quartiles(values: Sequence[float]) -> Spread | None:
    """Median and quartiles; None without values."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0]) if values else None
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def _quality(runs: Sequence[RunFigures], name: str) -> Spread | None:
    """A metric over seeds; for a single run, with the metric's own interval if it has one."""
    if len(runs) > 1:
        return over_runs(run.metrics.get(name) for run in runs)
    measured = runs[0].metrics
    value = measured.get(name)
    if value is None:
        return None
    rows = int(measured.get("rows", measured.get("prompts", 1)))
    return Spread(value, measured.get(f"{name}_low", value), measured.get(f"{name}_high", value), rows)

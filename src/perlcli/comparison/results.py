"""What finished runs tell of cost and quality, held against each other: the content of a report. Pure: no model."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from perlcli import settings
from perlcli.errors import PerlError
from perlcli.redaction import hidden_in
from perlcli.run.files import METRICS, read_rows
from perlcli.run.metrics import METRICS as METRICS_OF
from perlcli.run.metrics import STEP, STEP_CPU, compared
from perlcli.run.record import RunRecord, field_table, read_record, said
from perlcli.settings.types import fits
from perlcli.stats import Z95
from perlcli.text import clip, one_line, shorten

SCHEMA_VERSION = 1
REPORT = "report.json"
UNEVEN = 1.1  # between two ways to count a speed, where the machine wasn't shared with others alike
WARM_UP = 2  # steps that don't count: caches fill, a GPU picks its kernels
FULL = "full"
# What arms differ in by their nature, by the names of settings and of TRL's.
ARMS = {
    "full", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "peft", "load_in_4bit",
    "load_in_8bit", "learning_rate", "value_learning_rate", "seed", "data_seed", "output", "output_dir", "logging_dir",
    "run_name", "bf16", "fp16", *settings.ONCE,
}  # fmt: skip
# As torch's error for a GPU is called and worded, Python's own, and torch's for main memory.
NO_MEMORY = ("outofmemoryerror", "out of memory", "memoryerror", "can't allocate memory")


# Table 1 of the paper (arXiv 2403.10704): LoRA against full tuning on its six tasks, memory as a share of full
# tuning's peak, speed as a multiple of it.
PAPER: dict[str, dict[str, tuple[float | None, ...]]] = {
    "reward": {"memory": (0.431, 0.48, 0.50, None, 0.56, 0.74), "speed": (1.6, 1.5, 1.7, None, 1.9, 1.15)},
    "rl": {"memory": (0.80, 0.75, 0.75, 0.80, 0.74, 0.74), "speed": (1.3, 1.15, 1.15, 1.05, 1.20, 1.24)},
}
PAPER_TASKS = ("Harmless", "SHP", "TL;DR", "BOLT", "UI", "VQA")


@dataclass(frozen=True)
class Spread:
    """A figure with how far it spreads: over runs the mean with lowest and highest, of one run's steps the quartiles
    about the median, of a share its 95 % interval."""

    value: float
    low: float
    high: float
    n: int = 1  # what it comes from: runs, steps or rows


@dataclass
class RunFigures:
    """What one run tells."""

    folder: str = said("The run's folder, as seen from the report's.")
    command: str = said("The command that ran it, to run it again.")
    status: str = said("finished, failed, interrupted or out of memory.")
    failure: str | None = said("Why it ended early, in one line.", None)
    seed: int = said("Its seed.", 0)
    repeat: int = said("Which repeat it is, from 1: repeats are timed again, with the same seed.", 1)
    steps: int = said("Optimiser steps.", 0)
    trainable_parameters: int = said("Parameters that train.", 0)
    total_parameters: int = said("Parameters in memory.", 0)
    memory_mb: float | None = said("Peak memory of training, MB: of tensors on a GPU, above the process's start on a "
                                   "CPU.", None)  # fmt: skip
    reserved_mb: float | None = said("Peak memory that torch reserved on a GPU, MB.", None)
    step_seconds: list[float] = said("Wall-clock seconds of each step after the warm-up.", factory=list)
    step_cpu_seconds: list[float] = said("The process's CPU seconds of each step after the warm-up.", factory=list)
    step_tokens: list[int] = said("Tokens of each step after the warm-up.", factory=list)
    phases: dict[str, float] = said("`rl`: median seconds a step of sampling, scoring, anchor, learning.", factory=dict)
    weights_bytes: int | None = said("Bytes on disk of what was trained.", None)
    optimizer_bytes: int | None = said("Bytes on disk of the optimiser's state.", None)
    metrics: dict[str, Any] = said("Final metrics, as the run's record has them.", factory=dict)


@dataclass
class Arm:
    """One way to train, over its runs."""

    name: str = said("What the report calls it.")
    model: str = said("The model that it trains.")
    kind: str = said("full, lora, dora or the type of a --peft file.")
    precision: str = said("How the base is held: float32, bfloat16, float16, 8-bit or 4-bit.")
    rank: int | None = said("LoRA rank.", None)
    learning_rate: float | None = said("Peak learning rate.", None)
    is_baseline: bool = said("Whether the others of this model are held against it.", False)
    failure: str | None = said("Why there is no figure, where every run of it ended early.", None)
    trainable_parameters: int = said("Parameters that train.", 0)
    total_parameters: int = said("Parameters in memory.", 0)
    memory_mb: Spread | None = said("Peak memory, MB.", None)
    reserved_mb: Spread | None = said("Peak memory that torch reserved, MB.", None)
    steps_per_second: Spread | None = said("Optimiser steps a second.", None)
    tokens_per_second: Spread | None = said("Tokens a second.", None)
    quality: dict[str, Spread] = said("The stage's figures of quality.", factory=dict)
    ratios: dict[str, float] = said(
        "To the baseline: memory, reserved, speed, cpu_speed, tokens_per_second, trainable, weights, optimizer. Speed "
        "is the baseline's step time over this arm's, the median over steps of the same number.", factory=dict,
    )  # fmt: skip
    may_be_chance: bool = said("Whether its first figure of quality may differ from the baseline's by chance.", False)
    remarks: list[str] = said("What a reader must know: differences that may be chance, rows it lacks.", factory=list)
    predicted_mb: float | None = said("Peak memory as `perl estimate` predicts it.", None)
    runs: list[RunFigures] = said("Each run.", factory=list)


@dataclass
class Comparison:
    """Arms of one stage side by side."""

    stage: str = said("sft, reward, rl or eval.")
    arms: list[Arm] = said("The arms, each model's baseline first.", factory=list)
    warnings: list[str] = said("What makes the comparison less than fair, or its figures less than sure.", factory=list)
    paper: dict[str, dict[str, float]] = said(
        "The paper's ratios of LoRA to full tuning for this stage: memory and speed by task.", factory=dict
    )


@dataclass
class Report:
    """Comparisons, with what they were made by."""

    schema_version: int = said("Version of this schema.", SCHEMA_VERSION)
    title: str = said("One line.", "")
    command: str = said("The command that makes it again.", "")
    status: str = said("running, finished or interrupted.", "running")
    started: str = said("Start, UTC, ISO 8601.", "")
    elapsed_seconds: float = said("Wall-clock seconds.", 0.0)
    device: dict[str, Any] = said("Device name, type and threads.", factory=dict)
    versions: dict[str, str] = said("Versions of Python and the packages that decide the result.", factory=dict)
    git_commit: str | None = said("Commit of the working directory, where it is a git checkout.", None)
    comparisons: list[Comparison] = said("A comparison for each stage.", factory=list)


def write(report: Report) -> str:
    """The report as JSON, without the user's home and secrets."""
    return json.dumps(dataclasses.asdict(hidden_in(report)), indent=2, ensure_ascii=False) + "\n"


def read(path: Path) -> Report:
    """A report from its JSON; raises PerlError where it is none of this version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PerlError(f"Can't read {path}: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise PerlError(f"{path} has schema version {version}; this perlcli reads version {SCHEMA_VERSION}")
    try:
        found = _built(Report, content)
        if strange := [
            each.stage for each in found.comparisons if each.stage not in METRICS_OF
        ]:  # they name its pictures
            raise TypeError(f"there is no stage {shorten(strange[0])}")
        return found
    except (TypeError, KeyError, AttributeError) as error:
        raise PerlError(f"{path} is not a report of perlcli: {error}") from error


def _built(kind: Any, content: Any) -> Any:
    """The value of a type from what JSON made of it."""
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if content is None else _built(inner[0], content)
    if typing.get_origin(kind) is list:
        return [_built(inner[0], item) for item in content]
    if typing.get_origin(kind) is dict:
        return {name: _built(inner[1], item) for name, item in content.items()}
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        if kind is not Any and not fits(content, kind):
            raise TypeError(f"{shorten(content)} where {kind.__name__} is expected")
        return content
    types_of = typing.get_type_hints(kind)
    return kind(**{name: _built(types_of[name], item) for name, item in content.items()})


def schema_tables() -> str:
    """The fields of a report as Markdown tables, for the documentation."""
    tables = []
    for kind in (Report, Comparison, Arm, RunFigures, Spread):
        tables.append(f"**{kind.__name__}.** {one_line(str(kind.__doc__))}\n\n{field_table(kind)}")
    return "\n\n".join(tables)


def of_run(folder: Path, command: str = "", *, shown: str = "", repeat: int = 1) -> RunFigures:
    """What the run in this folder tells; raises PerlError where there is no run. `shown` is the folder's name."""
    record = read_record(folder)
    steps = _steps(folder / METRICS)
    counted = steps[min(WARM_UP, max(0, len(steps) - 1)) :]
    return RunFigures(
        folder=shown or str(folder), command=command or f"perl {record.command} --config {folder}/settings.yaml",
        status=outcome(record), failure=record.failure, seed=record.seed, repeat=repeat, steps=record.steps,
        trainable_parameters=record.trainable_parameters, total_parameters=record.total_parameters,
        memory_mb=_megabytes(record, "training_mb"), reserved_mb=_megabytes(record, "reserved_mb"),
        step_seconds=[row[STEP] for row in counted], step_cpu_seconds=[row[STEP_CPU] for row in counted],
        step_tokens=[row["tokens"] for row in counted],
        phases={k.removeprefix("seconds_"): v for k, v in record.metrics.items() if k.startswith("seconds_")},
        weights_bytes=record.files.get("weights"), optimizer_bytes=record.files.get("optimizer"),
        metrics=record.metrics,
    )  # fmt: skip


def _megabytes(record: RunRecord, name: str) -> float | None:
    """A figure of a run's memory; None where the record has none."""
    found = record.memory.get(name)
    return found if _is_number(found) else None


def outcome(record: RunRecord) -> str:
    """How a run ended, in words."""
    failure = (record.failure or "").lower()
    if record.status == "failed" and any(mark in failure for mark in NO_MEMORY):
        return "out of memory"
    return record.status


def _steps(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that are steps, each with its own tokens."""
    steps, before = [], 0
    for row in read_rows(path):
        if all(_is_number(row.get(name)) for name in (STEP, STEP_CPU)) and _is_number(row.get("num_tokens", before)):
            counted = row.get("num_tokens", before)
            steps.append({**row, "tokens": counted - before})
            before = counted
    return steps


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def summarise(arm: Arm, stage: str) -> Arm:
    """The arm with the figures of its runs that came to their end; where none did, with the reason."""
    done = [run for run in arm.runs if run.status == "finished"]
    if not done:
        arm.failure = next((_ending(run) for run in arm.runs), "not run yet")
        return arm
    if len(done) < len(arm.runs):
        ended = "; ".join(dict.fromkeys(_ending(run) for run in arm.runs if run.status != "finished"))
        arm.remarks = [*arm.remarks, f"{len(arm.runs) - len(done)} of {len(arm.runs)} runs have no figures: {ended}"]
    arm.trainable_parameters, arm.total_parameters = done[0].trainable_parameters, done[0].total_parameters
    arm.memory_mb = over_runs([run.memory_mb for run in done])
    arm.reserved_mb = over_runs([run.reserved_mb for run in done])
    arm.steps_per_second = _rate(done, [[1 / s for s in run.step_seconds if s] for run in done])
    arm.tokens_per_second = _rate(
        done, [[t / s for t, s in zip(run.step_tokens, run.step_seconds, strict=True) if s] for run in done]
    )
    first = [run for run in done if run.repeat == 1] or done
    arm.quality = {
        metric.name: found for metric in compared(stage) if (found := _quality(first, metric.name)) is not None
    }
    return arm


def _ending(run: RunFigures) -> str:
    """How a run ended early, with what it had taken."""
    at = f" at {run.memory_mb / 1000:.1f} GB" if run.memory_mb else ""
    if run.status == "out of memory":
        return f"out of memory{at}"
    return f"{run.status}: {run.failure}" if run.failure else run.status


def over_runs(values: Iterable[float | None]) -> Spread | None:
    """Mean, lowest and highest of what there is; None of nothing."""
    known = [value for value in values if value is not None]
    return Spread(fmean(known), min(known), max(known), len(known)) if known else None


def _rate(runs: Sequence[RunFigures], rates: Sequence[Sequence[float]]) -> Spread | None:
    """Median and quartiles over the steps of all runs."""
    values = [value for run in rates for value in run]
    if not values:
        return None
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Spread(middle, low, high, len(values))


def _quality(runs: Sequence[RunFigures], name: str) -> Spread | None:
    """A figure over seeds; of one run with its own interval, where it has one."""
    if len(runs) > 1:
        return over_runs(run.metrics.get(name) for run in runs)
    metrics = runs[0].metrics
    value = metrics.get(name)
    if value is None:
        return None
    rows = int(metrics.get("rows", metrics.get("prompts", 1)))
    return Spread(value, metrics.get(f"{name}_low", value), metrics.get(f"{name}_high", value), rows)


def compare(stage: str, arms: Sequence[Arm], warnings: Sequence[str] = ()) -> Comparison:
    """The arms summarised, each held against its model's baseline."""
    done = [summarise(arm, stage) for arm in arms]
    for arm in done:
        baseline = next((other for other in done if other.is_baseline and other.model == arm.model), None)
        if baseline is not None and baseline is not arm:
            arm.ratios = ratios(arm, baseline)
            chance = remarks(arm, baseline, stage)
            arm.may_be_chance, arm.remarks = bool(chance), [*arm.remarks, *chance, *beside(arm)]
    models = list(dict.fromkeys(arm.model for arm in done))
    done.sort(key=lambda arm: (models.index(arm.model), not arm.is_baseline))
    return Comparison(stage, done, [*warnings, *same_rates(done)], paper(stage))


def speed_of(arm: Arm) -> float | None:
    """The arm's speed as a multiple of the baseline's: by the clock; where other work on the machine disturbed that, by
    the processors' own seconds."""
    return arm.ratios.get("cpu_speed" if _is_disturbed(arm) else "speed")


def _is_disturbed(arm: Arm) -> bool:
    """Whether clock and processors disagree about an arm's speed. On a GPU processors only wait."""
    by_clock, by_cpu = arm.ratios.get("speed"), arm.ratios.get("cpu_speed")
    if not by_clock or not by_cpu or arm.reserved_mb is not None:
        return False
    return max(by_clock / by_cpu, by_cpu / by_clock) >= UNEVEN


def beside(arm: Arm) -> list[str]:
    """A remark where an arm's speed is told by the processors' seconds, as the machine was shared unevenly."""
    if not _is_disturbed(arm):
        return []
    return [
        f"speed by the processors' own seconds; by the clock {arm.ratios['speed']:.2f}x, as something else ran beside"
    ]


def same_rates(arms: Sequence[Arm]) -> list[str]:
    """A warning where full tuning and adapters train at one learning rate: it suits one of them at most."""
    rates = {arm.learning_rate for arm in arms if arm.kind == FULL} - {None}
    same = [arm for arm in arms if arm.kind != FULL and arm.learning_rate in rates]
    if not same:
        return []
    names = ", ".join(dict.fromkeys(arm.name for arm in same))
    return [f"The learning rate of {names} is that of full tuning, {same[0].learning_rate:g}: adapters are commonly "
            "trained at ten times the rate"]  # fmt: skip


def paper(stage: str) -> dict[str, dict[str, float]]:
    """The paper's ratios for a stage, by task; empty where it has none."""
    return {
        what: {task: value for task, value in zip(PAPER_TASKS, values, strict=True) if value is not None}
        for what, values in PAPER.get(stage, {}).items()
    }


def ratios(arm: Arm, baseline: Arm) -> dict[str, float]:
    """The arm's figures as multiples of the baseline's, as far as both have them."""
    ours, theirs = _first(arm), _first(baseline)
    pairs: dict[str, tuple[float | None, float | None]] = {
        "memory": (_value(arm.memory_mb), _value(baseline.memory_mb)),
        "reserved": (_value(arm.reserved_mb), _value(baseline.reserved_mb)),
        "tokens_per_second": (_value(arm.tokens_per_second), _value(baseline.tokens_per_second)),
        "trainable": (arm.trainable_parameters or None, baseline.trainable_parameters or None),
    }
    if ours is not None and theirs is not None:
        pairs["weights"] = (ours.weights_bytes, theirs.weights_bytes)
        pairs["optimizer"] = (ours.optimizer_bytes, theirs.optimizer_bytes)
    found = {name: one / other for name, (one, other) in pairs.items() if one is not None and other}
    speeds = {"speed": "step_seconds", "cpu_speed": "step_cpu_seconds"}
    return found | {
        name: speed for name, field in speeds.items() if (speed := _speed(arm.runs, baseline.runs, field)) is not None
    }


def _first(arm: Arm) -> RunFigures | None:
    return next((run for run in arm.runs if run.status == "finished"), None)


def _value(spread: Spread | None) -> float | None:
    return None if spread is None else spread.value


def _speed(ours: Sequence[RunFigures], theirs: Sequence[RunFigures], field: str) -> float | None:
    """How many times faster our steps are: the median over steps of the same number in runs of the same seed and
    repeat, which train on the same rows."""
    partners = {(run.seed, run.repeat): getattr(run, field) for run in theirs if run.status == "finished"}
    found = [
        other / own
        for run in ours
        if run.status == "finished"
        for own, other in zip(getattr(run, field), partners.get((run.seed, run.repeat), []), strict=False)
        if own and other
    ]
    return median(found) if found else None


def remarks(arm: Arm, baseline: Arm, stage: str) -> list[str]:
    """What may be chance in the difference of the first figure of quality that both arms have."""
    name = next((m.name for m in compared(stage) if m.name in arm.quality and m.name in baseline.quality), None)
    if name is None:
        return []
    ours, theirs = arm.quality[name], baseline.quality[name]
    words = name.replace("_", " ")
    if max(len(_seeds(arm)), len(_seeds(baseline))) > 1:
        apart = ours.low > theirs.high or ours.high < theirs.low
        return [] if apart else [f"{words}: the ranges of both arms overlap, so the difference may be chance"]
    if ours.low == ours.high:
        return [f"{words}: one seed, so the difference may be chance"]
    gap, noise = ours.value - theirs.value, math.hypot(_error(ours), _error(theirs)) * Z95
    if abs(gap) > noise:
        return []
    return [f"{words}: {gap * 100:+.1f} points, within the ±{noise * 100:.1f} that {ours.n:,} rows leave to chance"]


def _seeds(arm: Arm) -> set[int]:
    return {run.seed for run in arm.runs if run.status == "finished"}


def _error(share: Spread) -> float:
    """The standard error of a share."""
    return math.sqrt(max(share.value * (1 - share.value), 1e-9) / share.n)


def differences(records: Mapping[str, RunRecord], meant: Iterable[str] = ()) -> list[str]:
    """In what else than arms by their nature, or than `meant`, the runs of one comparison differ: settings, TRL's
    settings, data, device, versions."""
    views = {name: _view(record) for name, record in records.items()}
    allowed = ARMS | set(meant)
    found = []
    for key in dict.fromkeys(key for view in views.values() for key in view):
        groups: dict[str, list[str]] = {}
        for name, view in views.items():
            groups.setdefault(json.dumps(view.get(key), default=str, ensure_ascii=False), []).append(name)
        if key.rpartition(".")[2] not in allowed and len(groups) > 1:
            told = "; ".join(f"{_shown(value)} in {', '.join(names)}" for value, names in groups.items())
            found.append(f"The runs differ in {key}: {told}")
    return found


def _shown(value: str, limit: int = 60) -> str:
    """A value in JSON as a person reads it."""
    text = "not set" if value == "null" else value.strip('"')
    return clip(text, limit)


def _view(record: RunRecord) -> dict[str, Any]:
    """What must be the same in each arm, by name."""
    view: dict[str, Any] = dict(record.settings)
    view |= {f"trl.{name}": value for name, value in record.trl_settings.items() if name not in record.settings}
    for role, found in record.data.items():
        view |= {f"{role} data.{key}": found.get(key) for key in ("fingerprint", "kept", "tokens")}
    view |= {f"version.{name}": value for name, value in record.versions.items()}
    return view | {"steps": record.steps, "device.name": record.device.get("name"),
                   "device.threads": record.device.get("threads")}  # fmt: skip

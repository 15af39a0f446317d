"""A comparison report as CSV: a row per arm, and a row per run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from perlcli.comparison.render import words
from perlcli.comparison.results import ArmResult, Report, RunFigures
from perlcli.text import one_line

ARM_FIELDS = (
    "model",
    "kind",
    "precision",
    "rank",
    "learning_rate",
    "is_baseline",
    "failure",
    "trainable_parameters",
    "total_parameters",
    "predicted_mb",
)
RUN_FIELDS = (
    "folder",
    "status",
    "failure",
    "seed",
    "repeat",
    "steps",
    "trainable_parameters",
    "total_parameters",
    "memory_mb",
    "reserved_mb",
    "weights_bytes",
    "optimizer_bytes",
    "command",
)
SPREADS = ("memory_mb", "reserved_mb", "steps_per_second", "tokens_per_second")
RATIOS = ("memory", "reserved", "speed", "cpu_speed", "tokens_per_second", "trainable", "weights", "optimizer")
FORMULA = ("=", "+", "-", "@")  # what a formula starts with in a spreadsheet

Cell = str | float | None
Row = dict[str, Cell]


def arms_csv(report: Report) -> str:
    """A row per arm, its figures as plain numbers."""
    arms = [(comparison.stage, arm) for comparison in report.comparisons for arm in comparison.arms]
    names = list(dict.fromkeys(name for _, arm in arms for name in arm.quality))
    return _csv([_arm_row(stage, arm, names) for stage, arm in arms])


def _arm_row(stage: str, arm: ArmResult, qualities: Iterable[str]) -> Row:
    row: Row = {"stage": stage, "arm": arm.name}
    row |= {name: getattr(arm, name) for name in ARM_FIELDS}
    spreads = {name: getattr(arm, name) for name in SPREADS}
    spreads |= {name: arm.quality.get(name) for name in qualities}
    for name, spread in spreads.items():
        row[name] = None if spread is None else spread.value
        row[f"{name}_low"] = None if spread is None else spread.low
        row[f"{name}_high"] = None if spread is None else spread.high
    row |= {f"ratio_{name}": arm.ratios.get(name) for name in RATIOS}
    return row | {"may_be_chance": arm.may_be_chance, "runs": len(arm.runs), "remarks": "; ".join(arm.remarks)}


def runs_csv(report: Report) -> str:
    """A row per run, its figures as plain numbers."""
    runs = [(c.stage, arm, run) for c in report.comparisons for arm in c.arms for run in arm.runs]
    names = list(dict.fromkeys(name for _, _, run in runs for name in run.metrics))
    return _csv([_run_row(stage, arm, run, names) for stage, arm, run in runs])


def _run_row(stage: str, arm: ArmResult, run: RunFigures, names: Iterable[str]) -> Row:
    row: Row = {"stage": stage, "arm": arm.name, "model": arm.model}
    row |= {name: getattr(run, name) for name in RUN_FIELDS}
    row["median_step_seconds"] = median(run.step_seconds) if run.step_seconds else None
    row |= {f"seconds_{name}": run.phases.get(name) for name in words.PHASES}
    return row | {f"metric_{name}": run.metrics.get(name) for name in names}


def _csv(rows: Sequence[Mapping[str, Cell]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _no_formula(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _no_formula(value: Cell) -> Cell:
    """A cell that a spreadsheet takes as it is: text in one line, after an apostrophe if it would be a formula."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.startswith(FORMULA) else text

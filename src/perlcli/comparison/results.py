"""The content of a report: runs, the arms that they belong to and their comparison; to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlcli.arms import FULL
from perlcli.errors import PerlError
from perlcli.redaction import hidden_in
from perlcli.run.metrics import METRICS
from perlcli.run.record import field_table, said
from perlcli.settings.types import fits
from perlcli.text import one_line, shorten

SCHEMA_VERSION = 2
READ = (1, 2)  # version 1 has no setup, verdicts, samples and pipeline
REPORT = "report.json"


@dataclass(frozen=True)
class Spread:
    """A figure and how far it spreads: over runs, the mean with the lowest and the highest; over the steps of one run,
    the median with the quartiles; for a share of rows, its 95 % interval."""

    value: float
    low: float
    high: float
    n: int = 1  # how many runs, steps or rows it comes from


@dataclass
class RunFigures:
    """The figures of one run."""

    folder: str = said("The run's folder, relative to the report's.")
    command: str = said("The command that repeats it.")
    status: str = said("finished, failed, interrupted or out of memory.")
    failure: str | None = said("Why it ended early, in one line.", None)
    seed: int = said("Its seed.", 0)
    repeat: int = said("Which repeat it is, from 1: repeats have the same seed and are timed again.", 1)
    steps: int = said("Optimiser steps.", 0)
    trainable_parameters: int = said("Parameters that train.", 0)
    total_parameters: int = said("Parameters in memory.", 0)
    memory_mb: float | None = said(
        "Peak memory of training, MB: of tensors on a GPU; on a CPU, above the memory at the process's start.", None
    )
    reserved_mb: float | None = said("Peak memory that torch reserved on a GPU, MB.", None)
    step_seconds: list[float] = said("Wall-clock seconds of each step after the warm-up.", factory=list)
    step_cpu_seconds: list[float] = said("The process's CPU seconds of each step after the warm-up.", factory=list)
    step_tokens: list[int] = said("Tokens of each step after the warm-up.", factory=list)
    phases: dict[str, float] = said(
        "`rl`: median seconds per step of sampling, scoring, anchor and learning.", factory=dict
    )
    weights_bytes: int | None = said("Bytes on disk of what was trained.", None)
    optimizer_bytes: int | None = said("Bytes on disk of the optimiser's state.", None)
    metrics: dict[str, Any] = said("Final metrics, as in the run's record.", factory=dict)
    setup: dict[str, str] = said(
        "How it ran, in words: data with row counts, rendering, batch, lengths, device; of a policy what judges it "
        "and what it is compared with.",
        factory=dict,
    )
    eval_rows: int | None = said("Held-out rows or prompts that the figures come from.", None)
    verdicts: list[str] = said("What the figures show, in sentences; for `rl` also those of its rewards.", factory=list)
    notes: list[str] = said("The notes of the run.", factory=list)
    samples: list[dict[str, Any]] = said("Some of the run's samples, as in `samples.jsonl`.", factory=list)


@dataclass
class ArmResult:
    """One way to train, summarised over its runs."""

    name: str = said("Its name in the report.")
    model: str = said("The model that it trains.")
    kind: str = said("full; lora or dora, also with -8bit or -4bit; or the type of a --peft file.")
    precision: str = said("Precision of the base: float32, bfloat16, float16, 8-bit or 4-bit.")
    rank: int | None = said("LoRA rank.", None)
    learning_rate: float | None = said("Peak learning rate.", None)
    is_baseline: bool = said("Whether the model's other arms are compared with it.", False)
    failure: str | None = said("Why it has no figures: every run of it ended early.", None)
    trainable_parameters: int = said("Parameters that train.", 0)
    total_parameters: int = said("Parameters in memory.", 0)
    memory_mb: Spread | None = said("Peak memory, MB.", None)
    reserved_mb: Spread | None = said("Peak memory that torch reserved, MB.", None)
    steps_per_second: Spread | None = said("Optimiser steps per second.", None)
    tokens_per_second: Spread | None = said("Tokens per second.", None)
    quality: dict[str, Spread] = said("The stage's quality metrics.", factory=dict)
    ratios: dict[str, float] = said(
        "To the baseline: memory, reserved, speed, cpu_speed, tokens_per_second, trainable, weights, optimizer. Speed "
        "is the baseline's step time over this arm's: the median over steps of the same number.",
        factory=dict,
    )
    may_be_chance: bool = said("Whether its first quality metric may differ from the baseline's by chance.", False)
    remarks: list[str] = said(
        "What a reader should know: differences that may be chance, runs without figures.", factory=list
    )
    predicted_mb: float | None = said("Peak memory of training, MB, as `perl estimate` predicts it.", None)
    runs: list[RunFigures] = said("Each run.", factory=list)

    @property
    def is_full(self) -> bool:
        """Whether it trains every parameter."""
        return self.kind == FULL

    @property
    def finished(self) -> list[RunFigures]:
        return [run for run in self.runs if run.status == "finished"]


@dataclass
class PolicyFigures:
    """The figures of one policy of a pipeline."""

    name: str = said("base, SFT or RL.")
    run: str = said("The run that measured it.", "")
    prompts: int | None = said("How many held-out prompts it answered; null for figures of training.", None)
    figures: dict[str, float] = said("gold, mean_reward, mean_length, … with the bounds of intervals.", factory=dict)
    kl: float | None = said("KL to its anchor per completion.", None)
    opponent: str = said("The anchor.", "")


@dataclass
class Comparison:
    """Arms of one stage side by side."""

    stage: str = said("sft, reward, rl or eval.")
    arms: list[ArmResult] = said("The arms, each model's baseline first.", factory=list)
    warnings: list[str] = said("What makes the comparison less fair, or its figures less certain.", factory=list)
    paper: dict[str, dict[str, float]] = said(
        "The paper's ratios of LoRA to full tuning for this stage: memory and speed by task.", factory=dict
    )


@dataclass
class Report:
    """Comparisons, and how they were made."""

    schema_version: int = said("Version of this schema.", SCHEMA_VERSION)
    title: str = said("One line.", "")
    command: str = said("The command that repeats it.", "")
    status: str = said("running, finished or interrupted.", "running")
    started: str = said("Start, UTC, ISO 8601.", "")
    elapsed_seconds: float = said("Wall-clock seconds.", 0.0)
    device: dict[str, Any] = said("Device name, type and threads.", factory=dict)
    versions: dict[str, str] = said("Versions of Python and the packages that affect the result.", factory=dict)
    git_commit: str | None = said("Commit of the working directory if it is a git checkout.", None)
    comparisons: list[Comparison] = said("A comparison for each stage.", factory=list)
    pipeline: list[PolicyFigures] = said("Base, SFT and RL next to each other, if runs measured them.", factory=list)


def write(report: Report) -> str:
    """The report as JSON, without the user's home and secrets."""
    return json.dumps(dataclasses.asdict(hidden_in(report)), indent=2, ensure_ascii=False) + "\n"


def read(path: Path) -> Report:
    """A report from its JSON. Raises PerlError for anything that is not a report of this version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PerlError(f"Can't read {path}: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in READ:
        raise PerlError(f"{path} has schema version {version}; this perlcli reads version {SCHEMA_VERSION}")
    try:
        report: Report = _built(Report, content)
    except (TypeError, KeyError, AttributeError) as error:
        raise PerlError(f"{path} is not a report of perlcli: {error}") from error
    report.schema_version = SCHEMA_VERSION  # as it would be written again
    for comparison in report.comparisons:
        if comparison.stage not in METRICS:  # it becomes part of file names
            raise PerlError(f"{path} is not a report of perlcli: unknown stage {shorten(comparison.stage)}")
    return report


def _built(kind: Any, content: Any) -> Any:
    """The value of a type from what JSON made of it. Raises TypeError if it doesn't fit."""
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if content is None else _built(inner[0], content)
    if typing.get_origin(kind) is list:
        return [_built(inner[0], item) for item in content]
    if typing.get_origin(kind) is dict:
        return {name: _built(inner[1], item) for name, item in content.items()}
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        if kind is not Any and not fits(content, kind):
            raise TypeError(f"expected {kind.__name__}, got {shorten(content)}")
        return content
    types_of = typing.get_type_hints(kind)
    return kind(**{name: _built(types_of[name], item) for name, item in content.items()})


def schema_tables() -> str:
    """The fields of a report as Markdown tables, for the documentation."""
    kinds = (Report, PolicyFigures, Comparison, ArmResult, RunFigures, Spread)
    return "\n\n".join(f"**{kind.__name__}.** {one_line(str(kind.__doc__))}\n\n{field_table(kind)}" for kind in kinds)

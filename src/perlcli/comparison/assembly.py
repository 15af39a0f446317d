"""A comparison in progress, and its runs put together into the figures of its report, as far as they have run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perlcli import settings
from perlcli.coffee import NAME
from perlcli.comparison import contrasts, figures, jobs, preview, processes
from perlcli.comparison.jobs import Job, Planned
from perlcli.comparison.results import ArmResult, Comparison, Report, RunFigures
from perlcli.run.files import RECORD
from perlcli.run.lifecycle import Run
from perlcli.run.record import RunRecord, find_record

OF_FULL_RL = {"model", "reward"}  # merged: the same policy and reward without adapters


@dataclass
class State:
    """A comparison in progress: its settings, runs, folder and report."""

    given: settings.CompareFull
    run: Run
    report: Report
    plans: Mapping[str, Sequence[Planned]]  # by stage
    measures_memory: bool  # in separate processes, as freed memory may stay resident on a CPU
    done: int = 0

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def total(self) -> int:
        """How many runs the comparison takes."""
        return sum(len(self.jobs(stage)) for stage in self.plans)

    def jobs(self, stage: str) -> list[Job]:
        """The runs of a stage, in order."""
        return list(jobs.jobs(self.given, stage, self.plans[stage], memory=self.measures_memory))

    def run_folder(self, job: Job) -> Path:
        """The folder of a job's run."""
        return self.folder / job.stage / job.folder

    def log_of(self, job: Job) -> Path:
        """The file with what a job's process printed."""
        return self.run_folder(job).with_suffix(".log")


def comparison(state: State, stage: str) -> Comparison:
    """The stage's arms as far as they have run."""
    arms = []
    for planned in state.plans[stage]:
        begun = [job for job in state.jobs(stage) if planned.is_same(job) and state.log_of(job).exists()]
        timed = [run_figures(state, job) for job in begun if not job.for_memory]
        apart = [run_figures(state, job) for job in begun if job.for_memory]
        if state.measures_memory:
            for run in timed:
                run.memory_mb = None
        if timed and apart:
            timed[0].memory_mb = apart[0].memory_mb
        for run in apart:  # quality and speed of the few steps for memory don't count
            run.metrics, run.phases = {}, {}
            run.eval_rows, run.verdicts, run.samples = None, [], []
            run.step_seconds, run.step_cpu_seconds, run.step_tokens = [], [], []
        arms.append(_arm_result(state, stage, planned, timed or apart))
    return contrasts.compare(stage, arms, _warnings(state, stage))


def run_figures(state: State, job: Job) -> RunFigures:
    """The figures of a job's run."""
    folder, shown = state.run_folder(job), f"{job.stage}/{job.folder}"
    command = f"perl {job.stage} --config {folder.with_suffix('.yaml')} --output DIR"
    if not (folder / RECORD).exists():
        return RunFigures(shown, command, "failed", processes.last_error(state.log_of(job)), job.seed, job.repeat)
    return figures.of_run(folder, command, shown=shown, repeat=job.repeat)


def _arm_result(state: State, stage: str, planned: Planned, runs: list[RunFigures]) -> ArmResult:
    """An arm as the report has it, before its runs are summarised."""
    arm = planned.arm
    record = next(filter(None, (find_record(str(state.folder / run.folder)) for run in runs)), None)
    rank = arm.rank
    if rank is None and record is not None and not arm.is_full:
        rank = record.settings.get("lora_r")  # the adapter's own
    has_full = any(other.arm.is_full for other in state.plans[stage])
    first = next(other for other in state.plans[stage] if other.model == planned.model)
    return ArmResult(
        name=arm.name,
        model=planned.model or NAME,
        kind=arm.kind,
        precision=str(record.device.get("precision", "")) if record is not None else "",
        rank=rank,
        learning_rate=planned.values["learning_rate"],
        is_baseline=arm.is_full if has_full else planned.is_same(first),
        runs=runs,
    )


def _warnings(state: State, stage: str) -> list[str]:
    lines: list[str] = []
    for model in dict.fromkeys(planned.model for planned in state.plans[stage]):
        records = _finished(state, stage, model)
        lines += contrasts.differences(records, OF_FULL_RL if stage == "rl" else ())
        if records and stage != "rl" and not any("eval" in record.data for record in records.values()):
            lines.append("No rows were held out, so quality is not compared: give --eval-data or --eval-fraction")
    return lines


def _finished(state: State, stage: str, model: str | None) -> dict[str, RunRecord]:
    """The records of a model's finished runs with the first seed, by arm."""
    records = {}
    for job in state.jobs(stage):
        is_first = job.seed == state.given.run.seed[0] and job.repeat == 1 and not job.for_memory
        record = find_record(str(state.run_folder(job)))
        if is_first and job.model == model and record is not None and record.status == "finished":
            records[job.arm.name] = record
    return records


def predict(state: State) -> None:
    """Put next to each measured peak the one that is predicted for rows as long as the longest."""
    for each in state.report.comparisons:
        plans = {(planned.model or NAME, planned.arm.name): planned for planned in state.plans[each.stage]}
        for arm in each.arms:
            found = [find_record(str(state.folder / run.folder)) for run in arm.runs]
            records = [record for record in found if record is not None]
            longest = max(map(_longest_row, records), default=0)
            chosen = next((record.trl_settings.get(preview.CHECKPOINTING) for record in records), None)
            planned = plans[arm.model, arm.name]
            arm.predicted_mb = preview.training_mb(each.stage, planned, longest or None, checkpointing=chosen)


def _longest_row(record: RunRecord) -> int:
    """Tokens of the longest training row, including an RL completion yet to be sampled; 0 if the record has none."""
    tokens = int(record.data.get("train", {}).get("tokens", {}).get("max", 0))
    if tokens and record.command == "rl":
        tokens += record.settings["max_completion_length"]
    return min(tokens, record.settings["max_length"] or tokens)

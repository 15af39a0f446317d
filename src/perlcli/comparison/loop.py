"""Runs the jobs of a comparison one after another, and keeps its report up to date."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median

from perlcli import device, settings
from perlcli.comparison import assembly, figures, jobs, processes, results
from perlcli.comparison.assembly import State
from perlcli.comparison.jobs import Job, is_adapter
from perlcli.comparison.processes import Stopped
from perlcli.comparison.render import files, terminal
from perlcli.comparison.results import Comparison
from perlcli.data import COFFEE
from perlcli.errors import PerlError, RunFailed
from perlcli.run import out_of_memory
from perlcli.run.files import CHECKPOINTS, RECORD, write_whole
from perlcli.run.lifecycle import write_settings
from perlcli.run.record import RunRecord, command_line, find_record, write_record
from perlcli.terminal import say
from perlcli.text import counted

MERGED = "merged"
KILLED = "killed by signal 9, as the system does when it is out of memory"  # records keep it: don't reword it
# glibc keeps most of what is freed, some hundred MB more in one process than in its twin. With these it returns blocks
# of 128 kB and more at once, so that resident memory is what is in use. Steps take longer: such runs aren't timed.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def show_plan(state: State) -> None:
    """Print what will run, and on which device; it goes into the report, without a precision: each arm has its own."""
    values, run = settings.ModelSettings(dtype=state.given.model.dtype), state.run
    if state.given.model.model is None:  # the embedded base: as its runs do
        device.spare_threads()
    # not its memory: measuring it would take some of it away from the runs
    run.record.device = device.describe(values, measures_memory=False)
    state.report.device = {name: value for name, value in run.record.device.items() if name != "precision"}
    say(device.line(state.report.device))
    for remark in device.remarks(values):
        run.note(remark)
    for stage, of_stage in state.plans.items():
        names = ", ".join(dict.fromkeys(planned.arm.name for planned in of_stage))
        rates = jobs.learning_rates(state.given, stage, jobs.given_values(state.given, stage))
        say(f"{stage}: {names}; learning rate {rates[0]:g}, full tuning {rates[1]:g}")
        chosen = {str(planned.values.get("gradient_checkpointing", "auto")) for planned in of_stage}
        if chosen != {"auto"}:
            say(f"gradient checkpointing: {', '.join(sorted(chosen))}, the same for all arms of a model")
    seeds = counted(len(state.given.run.seed), "seed")
    say(f"{state.total} runs, each in its own process ({seeds}), into {state.folder}")


def run(state: State) -> None:
    """Run every arm of every stage, and write the report. Raises RunFailed if a run failed, Stopped at a signal."""
    begin(state)
    try:
        for stage in state.plans:
            compare(state, stage)
    except Stopped as stopped:
        state.report.status = "interrupted"
        write_report(state)
        stopped.hint = f"{state.report.command} --resume"
        raise
    finish(state)


def begin(state: State) -> None:
    """Put into the report what is known from the start."""
    record, report = state.run.record, state.report
    report.title = f"LoRA against full tuning: {', '.join(state.plans)}"
    report.command, report.started = command_line(state.folder, "compare-full"), record.started
    report.versions, report.git_commit = record.versions, record.git_commit


def compare(state: State, stage: str) -> None:
    """Run a stage's arms, and update the report's JSON after each run."""
    state.report.comparisons.append(Comparison(stage))
    for job in state.jobs(stage):
        state.done += 1
        perform(state, with_inputs(state, job))
        state.report.comparisons[-1] = assembly.comparison(state, stage)
        state.report.elapsed_seconds = state.run.elapsed
        write_whole(state.folder / results.REPORT, [results.write(state.report)])


def with_inputs(state: State, job: Job) -> Job:
    """The job with what earlier stages made: in a comparison of all stages, reward model and RL build on SFT."""
    values = dict(job.values)
    if len(state.plans) > 1 and job.stage != "sft":
        values |= {"model": merged(state, str(first_run(state, "sft", job))), "data": values.get("data", COFFEE)}
    if len(state.plans) > 1 and job.stage == "rl":
        values["reward"] = (str(first_run(state, "reward", job)),)
    if job.stage == "rl" and job.arm.is_full:
        if "model" in values:
            values["model"] = merged(state, values["model"])
        values["reward"] = tuple(merged(state, name) for name in values.get("reward", ()))
    return replace(job, values=values)


def first_run(state: State, stage: str, job: Job) -> Path:
    """The run of an earlier stage that a job builds on: the first adapter's. Raises RunFailed if it did not finish."""
    of_model = [other for other in state.jobs(stage) if other.model == job.model and not other.for_memory]
    first = next((other for other in of_model if not other.arm.is_full), of_model[0])
    folder = state.run_folder(first)
    record = find_record(str(folder))
    if record is None or record.status != "finished":
        raise RunFailed(f"{first.words} did not finish, and the next stage builds on it: see {state.log_of(first)}")
    return folder


def merged(state: State, adapter: str) -> str:
    """The folder of an adapter's merged model, made if needed; any other model as it is. Raises RunFailed."""
    if not is_adapter(adapter):
        return adapter
    place = hashlib.sha256(str(Path(adapter).expanduser().resolve()).encode()).hexdigest()[:8]
    folder = state.folder / MERGED / f"{jobs.slug(adapter)}-{place}"
    record = find_record(str(folder))
    if record is not None and record.status == "finished":
        return str(folder)
    log = folder.with_suffix(".log")
    words = ["merge", adapter, "--output", str(folder)]
    if folder.exists():
        words.append("--overwrite")
    code = processes.run(words, log)
    if code and device.kind() == "cuda" and out_of_memory.is_named_in(processes.last_error(log)):
        code = processes.run([*words, "--overwrite"], log, {device.VISIBLE: ""})  # on the CPU
    if code:
        raise RunFailed(f"perl merge {adapter}: {processes.last_error(log)}", f"see {log}")
    return str(folder)


def perform(state: State, job: Job) -> None:
    """Run a job in a fresh process unless an earlier call did. Raises PerlError if the very first one is refused."""
    folder, log = state.run_folder(job), state.log_of(job)
    before = find_record(str(folder))
    if before is not None and is_result(before):
        return
    config = folder.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    write_settings(config, job.values)
    words = [job.stage, "--config", str(config), "--output", str(folder), *resuming(folder, job, before)]
    say(f"[{state.done}/{state.total}] {job.words} …")
    code = processes.run(words, log, GIVE_BACK if job.for_memory else None)
    settle(folder, code, log)
    if code == PerlError.exit_code and not state.report.comparisons[0].arms:
        raise PerlError(f"{job.words}: {processes.last_error(log)}", f"see {log}")
    clean(folder, job)
    say(f"    {outcome(folder)}")


def is_result(record: RunRecord) -> bool:
    """Whether running again would end the same way: finished, or out of memory unless a signal 9 only suggests it."""
    return figures.outcome(record) in ("finished", "out of memory") and record.failure != KILLED


def resuming(folder: Path, job: Job, before: RunRecord | None) -> list[str]:
    """The options for a folder that an earlier call left: a run resumes, one that measures memory starts over."""
    if before is None:
        if folder.exists():
            shutil.rmtree(folder)  # without even a record
        return []
    return ["--overwrite"] if job.for_memory or before.status == "finished" else ["--resume"]


def settle(folder: Path, code: int, log: Path) -> None:
    """Record how a process ended if it could not do so itself."""
    record = find_record(str(folder))
    if record is not None and record.status == "running":
        record.status = "failed"
        record.failure = KILLED if code == -9 else processes.last_error(log)
        write_record(folder, record)


def clean(folder: Path, job: Job) -> None:
    """Delete a finished run's checkpoints, and of one that measured memory also the weights."""
    record = find_record(str(folder))
    if record is None or record.status != "finished":
        return
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if job.for_memory:
        for path in folder.glob("*.safetensors"):
            path.unlink()


def outcome(folder: Path) -> str:
    """How a run ended, in one line."""
    if not (folder / RECORD).exists():
        return f"failed: {processes.last_error(folder.with_suffix('.log'))}"
    run = figures.of_run(folder)
    if run.status != "finished":
        return f"{run.status}: {run.failure}{' (--resume tries again)' if run.failure == KILLED else ''}"
    pace = f", {median(run.step_seconds):.3g} s per step" if run.step_seconds else ""
    peak = f", peak {run.memory_mb:,.0f} MB" if run.memory_mb is not None else ""
    return f"{run.steps} steps{pace}{peak}"


def write_report(state: State) -> None:
    """Bring every file of the report up to date."""
    state.report.elapsed_seconds = state.run.elapsed
    files.write_all(state.report, state.folder)


def finish(state: State) -> None:
    """Write and print the complete report. Raises RunFailed if a run failed for any reason but lack of memory."""
    state.report.status = "finished"
    assembly.predict(state)
    write_report(state)
    for comparison in state.report.comparisons:
        has_models = len({arm.model for arm in comparison.arms}) > 1
        for arm in comparison.arms:
            name = f"{comparison.stage}/{arm.model}/{arm.name}" if has_models else f"{comparison.stage}/{arm.name}"
            state.run.record.metrics |= {f"{name}/{ratio}": value for ratio, value in arm.ratios.items()}
    say(f"\n{terminal.text(state.report)}\n\nReport: {state.folder}/report.html (also .md, .csv, .json)")
    runs = [assembly.run_figures(state, job) for stage in state.plans for job in state.jobs(stage)]
    failed = [run for run in runs if run.status == "failed"]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {state.total} runs failed: {failed[0].folder}: {failed[0].failure}",
            f"{state.report.command} --resume runs them again",
        )

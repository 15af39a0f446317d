"""`perl compare-full`: the same stage under several arms, each in a fresh process, and what each cost and gave."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from perlcli import device, settings
from perlcli.coffee import NAME
from perlcli.comparison import arms, predictions, processes, results
from perlcli.comparison.arms import Job, Values, Way
from perlcli.comparison.processes import Stopped
from perlcli.comparison.render import files, tables
from perlcli.comparison.results import Arm, Comparison, Report, RunFigures
from perlcli.data import COFFEE
from perlcli.errors import PerlError, RunFailed
from perlcli.model.weights import ADAPTER_CONFIG
from perlcli.run.files import CHECKPOINTS, RECORD, write_whole
from perlcli.run.lifecycle import Run, recording, write_settings
from perlcli.run.output_folder import check_output
from perlcli.run.record import RunRecord, command_line, find_record, read_record, resume_command, write_record
from perlcli.terminal import say
from perlcli.text import counted

MERGED = "merged"
KILLED = "killed by signal 9, as the system does when it is out of memory"
# glibc keeps most of what is freed, some hundred MB more in one process than in its twin. So told, it gives blocks from
# 128 kB back at once: what is resident is what is held. A step takes longer, so that such a process isn't timed.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
OF_FULL_RL = {"model", "reward"}  # merged: the same policy and reward without adapters


@dataclass
class State:
    """A comparison at work."""

    given: settings.CompareFull
    run: Run
    report: Report
    plans: dict[str, list[tuple[Way, Values]]]
    measures_memory: bool  # in processes apart: on a CPU
    total: int = 0
    done: int = 0

    @property
    def folder(self) -> Path:
        """The comparison's folder."""
        return self.run.folder


def run(given: settings.CompareFull) -> RunRecord | None:
    """Run every arm and report what each cost and gave; None for a dry run, and where memory is only predicted."""
    wanted = arms.stages(given)
    output = given.run.output or f"runs/compare-{given.compare.stage}"
    given = replace(given, run=replace(given.run, output=output, seed=given.run.seed or (0,)))
    plans = {stage: plan(given, stage) for stage in wanted}
    check(given, plans)
    if given.compare.estimate:
        say(predictions.text(plans, given.compare.gpu))
        return None
    check_output(given)
    state = State(given, Run(given), Report(), plans, measures_memory())
    state.total = sum(len(list(jobs(state, stage))) for stage in wanted)
    tell_plan(state)
    if given.run.dry_run:
        say("Dry run: nothing was loaded, trained or written.")
        return None
    with recording(state.run):
        begin(state)
        try:
            for stage in wanted:
                compare(state, stage)
        except Stopped as stopped:
            state.report.status = "interrupted"
            tell_report(state)
            stopped.hint = resume_command(state.folder, "compare-full")
            raise
        finish(state)
    return state.run.record


def measures_memory() -> bool:
    """Whether memory takes processes of its own: on a CPU, where what is resident depends on what is given back."""
    return device.kind() == "cpu" and sys.platform == "linux"


def plan(given: settings.CompareFull, stage: str) -> list[tuple[Way, Values]]:
    """Every arm of a stage with the settings of its run. Raises PerlError."""
    shared = arms.given_values(given, stage)
    seed = given.run.seed[0]
    found = []
    for model in arms.models(given):
        name = model or shared.get("model")
        ranks = ranks_for(given, name, shared)
        for way in arms.ways(given, name, ranks):
            found.append((way, arms.job_values(given, stage, way, seed, shared)))
    return found


def ranks_for(given: settings.CompareFull, model: str | None, shared: Values) -> list[int | None]:
    """The ranks to compare on a model; that of an adapter is its own. Raises PerlError where others are asked."""
    if not is_adapter(model):
        return arms.ranks(given, shared)
    if given.lora.lora_r:
        problem = f"--lora-r {','.join(map(str, given.lora.lora_r))}: {model} is an adapter already, of its own rank"
        raise PerlError(problem, f"perl merge {model} --output DIR, then --model DIR")
    return [None]


def is_adapter(model: str | None) -> bool:
    """Whether a model is a local adapter's folder."""
    return model is not None and (Path(model).expanduser() / ADAPTER_CONFIG).exists()


def check(given: settings.CompareFull, plans: Mapping[str, Sequence[tuple[Way, Values]]]) -> None:
    """Raise PerlError for what each arm's own command would refuse before it loads anything."""
    faults = settings.limit_faults(settings.options(type(given)), settings.flat(given))
    if given.compare.gpu is not None and not given.compare.estimate:
        faults.append("--gpu is for --estimate: a run takes the GPU at hand")
    if "-" in (given.data.data, given.held_out.eval_data):
        faults.append("Standard input can be read once, and every run reads the data: give a file")
    if faults:
        raise PerlError("\n".join(faults), "perl compare-full --help lists the options")
    for stage, found in plans.items():
        for way, values in found:
            kind = settings.COMMANDS[stage]
            try:
                resolved = settings.resolve(settings.build(kind, values), {})
                settings.check(resolved)
                device.check(resolved.model)
            except PerlError as error:
                problem = "\n".join(f"{stage}, {way.name}: {line}" for line in error.problem.splitlines())
                raise PerlError(problem, error.hint) from error


def tell_plan(state: State) -> None:
    """Print what will run."""
    for stage, found in state.plans.items():
        names = ", ".join(way.name for way, _ in found)
        rates = arms.learning_rates(state.given, stage, arms.given_values(state.given, stage))
        say(f"{stage}: {names}; learning rate {rates[0]:g}, full tuning {rates[1]:g}")
    seeds = len(state.given.run.seed)
    say(f"{state.total} runs, each in a process of its own ({counted(seeds, 'seed')}), into {state.folder}")


def jobs(state: State, stage: str) -> list[Job]:
    """The runs of a stage, in their order."""
    return list(arms.jobs(state.given, stage, state.plans[stage], memory=state.measures_memory))


def begin(state: State) -> None:
    """Put into the report what is known from the start."""
    record, report = state.run.record, state.report
    record.device = device.describe(settings.ModelSettings(dtype=state.given.model.dtype))
    report.title = f"LoRA against full tuning: {', '.join(state.plans)}"
    report.command, report.started = command_line(state.folder, "compare-full"), record.started
    report.device = {name: value for name, value in record.device.items() if name != "precision"}
    report.versions, report.git_commit = record.versions, record.git_commit


def compare(state: State, stage: str) -> None:
    """Run a stage's arms, and bring the report up to date after each."""
    state.report.comparisons.append(Comparison(stage))
    for job in jobs(state, stage):
        state.done += 1
        perform(state, with_inputs(state, job))
        state.report.comparisons[-1] = comparison(state, stage)
        keep_figures(state)


def with_inputs(state: State, job: Job) -> Job:
    """The job with what earlier stages leave: under `all`, RL and reward build on the SFT policy."""
    values = dict(job.values)
    if len(state.plans) > 1 and job.stage != "sft":
        values |= {"model": sft_model(state, job.way), "data": values.get("data", COFFEE)}
    if len(state.plans) > 1 and job.stage == "rl":
        values["reward"] = (str(first_run(state, "reward", job.way)),)
    if job.stage == "rl" and job.way.is_full:
        if is_adapter(values.get("model")):
            values["model"] = merged(state, str(values["model"]))
        rewards = values.get("reward", ())
        values["reward"] = tuple(merged(state, name) if is_adapter(name) else name for name in rewards)
    return replace(job, values=values)


def sft_model(state: State, way: Way) -> str:
    """The policy that reward model and RL begin with: that of the first arm, its adapter merged."""
    folder = first_run(state, "sft", way)
    return merged(state, str(folder)) if is_adapter(str(folder)) else str(folder)


def first_run(state: State, stage: str, way: Way) -> Path:
    """The run of a stage that later ones build on: the first adapter's, of the first seed. Raises RunFailed."""
    found = [job for job in jobs(state, stage) if job.way.model == way.model and not job.for_memory]
    job = next((job for job in found if not job.way.is_full), found[0])
    folder = run_folder(state, job)
    if (record := find_record(str(folder))) is None or record.status != "finished":
        raise RunFailed(f"{job.words} did not finish, and the next stage builds on it: see {log_of(state, job)}")
    return folder


def merged(state: State, adapter: str) -> str:
    """The folder of an adapter's merged model, made where it isn't there. Raises RunFailed."""
    place = hashlib.sha256(str(Path(adapter).expanduser().resolve()).encode()).hexdigest()[:8]
    folder = state.folder / MERGED / f"{arms.slug(adapter)}-{place}"
    record = find_record(str(folder))
    if record is None or record.status != "finished":
        log = folder.with_suffix(".log")
        words = ["merge", adapter, "--output", str(folder), *(["--overwrite"] if folder.exists() else [])]
        if processes.run(words, log):
            raise RunFailed(f"perl merge {adapter}: {processes.last_error(log)}", f"see {log}")
    return str(folder)


def run_folder(state: State, job: Job) -> Path:
    """Where a job's run goes."""
    return state.folder / job.stage / job.folder


def log_of(state: State, job: Job) -> Path:
    """What a job's process printed."""
    return run_folder(state, job).with_suffix(".log")


def perform(state: State, job: Job) -> None:
    """Run a job in a fresh process, unless it has run before. Raises PerlError where it is the first, and refused."""
    folder = run_folder(state, job)
    before = find_record(str(folder))
    if before is not None and is_result(before):
        return
    config = folder.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    write_settings(config, job.values)
    words = [job.stage, "--config", str(config), "--output", str(folder), *again(folder, job, before)]
    say(f"[{state.done}/{state.total}] {job.words} …")
    log = log_of(state, job)
    code = processes.run(words, log, GIVE_BACK if job.for_memory else None)
    settle(folder, code, log)
    if code == PerlError.exit_code and not state.report.comparisons[0].arms:
        raise PerlError(f"{job.words}: {processes.last_error(log)}", f"see {log}")
    clean(folder, job)
    say(f"    {told(folder)}")


def is_result(record: RunRecord) -> bool:
    """Whether a run would end so again: it finished, or said that memory ran out; signal 9 may have been another's."""
    return results.outcome(record) in ("finished", "out of memory") and record.failure != KILLED


def again(folder: Path, job: Job, before: RunRecord | None) -> list[str]:
    """How to run where an earlier call left something: a run goes on, one for its memory starts over."""
    if before is None:
        if folder.exists():
            shutil.rmtree(folder)  # not even a record was written
        return []
    return ["--overwrite"] if job.for_memory or before.status == "finished" else ["--resume"]


def settle(folder: Path, code: int, log: Path) -> None:
    """Keep in a run's record how its process ended, where it could not say so itself."""
    if not (folder / RECORD).exists():
        return
    record = read_record(folder)
    if record.status != "running":
        return
    record.status = "failed"
    record.failure = processes.last_error(log)
    if code == -9:
        record.failure = KILLED
    write_record(folder, record)


def clean(folder: Path, job: Job) -> None:
    """Delete what a finished run leaves for going on, and all but the figures of one that ran for its memory."""
    record = find_record(str(folder))
    if record is None or record.status != "finished":
        return
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if job.for_memory:
        for path in folder.glob("*.safetensors"):
            path.unlink()


def told(folder: Path) -> str:
    """What came of a run, in a line."""
    if not (folder / RECORD).exists():
        return f"failed: {processes.last_error(folder.with_suffix('.log'))}"
    found = results.of_run(folder)
    if found.status != "finished":
        return f"{found.status}: {found.failure}{' (--resume goes on)' if found.failure == KILLED else ''}"
    pace = f", {median(found.step_seconds):.3g} s a step" if found.step_seconds else ""
    return f"{found.steps} steps{pace}, peak {found.memory_mb:,.0f} MB"


def comparison(state: State, stage: str) -> Comparison:
    """The stage's arms as far as they have run."""
    found = []
    for way, _ in state.plans[stage]:
        begun = [job for job in jobs(state, stage) if job.way == way and log_of(state, job).exists()]
        timed = [run_figures(state, job) for job in begun if not job.for_memory]
        apart = [run_figures(state, job) for job in begun if job.for_memory]
        for run in timed if state.measures_memory else ():
            run.memory_mb = None
        if timed and apart:
            timed[0].memory_mb = apart[0].memory_mb
        found.append(arm(state, stage, way, timed or [memory_alone(run) for run in apart]))
    return results.compare(stage, found, warnings(state, stage))


def memory_alone(run: RunFigures) -> RunFigures:
    """The run that was for memory, without what its few steps gave and took."""
    return replace(run, metrics={}, phases={}, step_seconds=[], step_cpu_seconds=[], step_tokens=[])


def run_figures(state: State, job: Job) -> RunFigures:
    """What a job's run tells."""
    folder, shown = run_folder(state, job), f"{job.stage}/{job.folder}"
    command = f"perl {job.stage} --config {folder.with_suffix('.yaml')} --output DIR"
    if not (folder / RECORD).exists():
        failure = processes.last_error(log_of(state, job))
        return RunFigures(shown, command, "failed", failure, seed=job.seed, repeat=job.repeat)
    return results.of_run(folder, command, shown=shown, repeat=job.repeat)


def arm(state: State, stage: str, way: Way, runs: list[RunFigures]) -> Arm:
    """An arm as the report has it, before its runs are summarised."""
    records = [record for run in runs if (record := find_record(str(state.folder / run.folder))) is not None]
    values = next(values for other, values in state.plans[stage] if other == way)
    has_full = any(other.is_full for other, _ in state.plans[stage])
    first = next(other for other, _ in state.plans[stage] if other.model == way.model)
    return Arm(
        way.name, way.model or NAME, way.kind, records[0].device.get("precision", "") if records else "",
        rank=None if way.is_full else way.rank or (records[0].settings.get("lora_r") if records else None),
        learning_rate=values["learning_rate"], is_baseline=way.is_full if has_full else way == first, runs=runs,
    )  # fmt: skip


def warnings(state: State, stage: str) -> list[str]:
    """What makes the comparison less than fair."""
    found = []
    for model in dict.fromkeys(way.model for way, _ in state.plans[stage]):
        records = finished(state, stage, model)
        found += results.differences(records, OF_FULL_RL if stage == "rl" else ())
        if records and not any("eval" in record.data for record in records.values()) and stage != "rl":
            found.append("No rows were held out, so that quality is not compared: give --eval-data or --eval-fraction")
    return found


def finished(state: State, stage: str, model: str | None) -> dict[str, RunRecord]:
    """The records of a model's finished runs of the first seed, by their arm."""
    found = {}
    for job in jobs(state, stage):
        is_first = job.seed == state.given.run.seed[0] and job.repeat == 1 and not job.for_memory
        record = find_record(str(run_folder(state, job)))
        if is_first and job.way.model == model and record is not None and record.status == "finished":
            found[job.way.name] = record
    return found


def keep_figures(state: State) -> None:
    """Bring the report's JSON up to date."""
    state.report.elapsed_seconds = state.run.elapsed
    write_whole(state.folder / results.REPORT, [results.write(state.report)])


def tell_report(state: State) -> None:
    """Bring every file of the report up to date."""
    keep_figures(state)
    files.render(state.report, state.folder)


def predict(state: State) -> None:
    """Put beside each measured peak the one that is predicted for rows as long as the longest."""
    for each in state.report.comparisons:
        for one, (way, values) in zip(each.arms, sorted_as(each.arms, state.plans[each.stage]), strict=True):
            records = [find_record(str(state.folder / run.folder)) for run in one.runs]
            longest = max((longest_row(record) for record in records if record is not None), default=0) or None
            one.predicted_mb = predictions.peak_mb(each.stage, way, values, longest)


def finish(state: State) -> None:
    """Write and print the whole report. Raises RunFailed where a run failed otherwise than by a want of memory."""
    state.report.status = "finished"
    predict(state)
    tell_report(state)
    for each in state.report.comparisons:
        for one in each.arms:
            prefix = f"{each.stage}/{one.model + '/' if len(models_of(each)) > 1 else ''}{one.name}"
            state.run.record.metrics |= {f"{prefix}/{name}": value for name, value in one.ratios.items()}
    say(f"\n{tables.terminal(state.report)}\n\nReport: {state.folder}/report.html (also .md, .csv, .json)")
    runs = [run_figures(state, job) for stage in state.plans for job in jobs(state, stage)]
    failed = [run for run in runs if run.status == "failed"]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {state.total} runs failed: {failed[0].folder}: {failed[0].failure}",
            f"{state.report.command} --resume runs them again",
        )


def sorted_as(found: Sequence[Arm], plans: Sequence[tuple[Way, Values]]) -> list[tuple[Way, Values]]:
    """The plans in the order of their arms."""
    by_name = {(way.model or NAME, way.name): (way, values) for way, values in plans}
    return [by_name[one.model, one.name] for one in found]


def longest_row(record: RunRecord) -> int:
    """Tokens of the longest training row that was kept, its completion counted where it is still to be written; 0 where
    the record doesn't tell."""
    tokens = int(record.data.get("train", {}).get("tokens", {}).get("max", 0))
    if tokens and record.command == "rl":
        tokens += record.settings["max_completion_length"]
    return min(tokens, record.settings["max_length"] or tokens)


def models_of(each: Comparison) -> list[str]:
    """The models of a comparison."""
    return list(dict.fromkeys(one.model for one in each.arms))

"""`perl report`: runs of any stage side by side, a folder of them as a pipeline, or a comparison from its JSON."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perlcli import settings
from perlcli.arms import DORA, FULL, LORA
from perlcli.comparison import contrasts, figures, pipeline, results
from perlcli.comparison.render import files, terminal, words
from perlcli.comparison.results import ArmResult, Comparison, Report
from perlcli.errors import PerlError
from perlcli.redaction import homes
from perlcli.run import lineage, metrics, summary
from perlcli.run.files import RECORD
from perlcli.run.lineage import origin
from perlcli.run.record import RunRecord, read_record
from perlcli.terminal import say

COMMAND, COMPARISON = "perl report", "compare-full"
STAGES = ("sft", "reward", "rl", "eval")
UNFINISHED = "still running, or killed"
Runs = Mapping[str, RunRecord]  # by the folder as it was given
# What steers a call or names a place: runs that differ only in these are runs of one arm.
SAME = {"seed", "output", *settings.ONCE, "save_steps", "save_minutes", "report_to", "recipe", "strict"}


def run(given: settings.Report) -> None:
    """Print the runs side by side, and write the report's files if a folder is named for them. Raises PerlError."""
    folders = [folder.rstrip("/") or "/" for folder in given.runs.run]
    output = given.run.output
    if not folders:
        raise PerlError("perl report needs the folder of at least one run", "perl report runs/reward")
    comparisons = [folder for folder in folders if is_comparison(folder)]
    if comparisons and len(folders) > 1:
        hint = f"perl report {comparisons[0]}, or name the folders of its runs"
        raise PerlError(f"{comparisons[0]} is the folder of a comparison, which can only be shown on its own", hint)
    if comparisons:
        show_again(Path(comparisons[0]).expanduser(), output)
    else:
        side_by_side([run for folder in folders for run in expanded(folder)], output)


def expanded(folder: str) -> list[str]:
    """A run's own folder; of any other folder, such as that of a quickstart, the runs one level below, in the order of
    the pipeline. What is left out there is said."""
    path = Path(folder).expanduser()
    own = lineage.record_of(folder)
    is_run = own is not None and own.command in STAGES
    below = [] if is_run else sorted(path.glob(f"*/{RECORD}"))
    found: dict[str, tuple[int, int]] = {}
    for each in below:
        name, record = f"{folder}/{each.parent.name}", lineage.record_of(str(each.parent))
        if record is not None and record.command in STAGES:
            policy = pipeline.ORDER.index(lineage.policy_of(record)) if record.command == "eval" else 0
            found[name] = (STAGES.index(record.command), policy)
        else:
            why = f"perl {record.command}" if record is not None else "its record can't be read"
            say(f"Left out: {name} ({why})")
    return sorted(found, key=lambda name: found[name]) or [folder]


def is_comparison(folder: str) -> bool:
    """Whether a folder holds a comparison, not a run."""
    path = Path(folder).expanduser()
    if not (path / results.REPORT).exists():
        return False
    return not (path / RECORD).exists() or read_record(path).command == COMPARISON


def show_again(folder: Path, output: str | None) -> None:
    """Print a comparison and write its files again: into another folder, or its own, where the JSON stays as it is."""
    report = results.read(folder / results.REPORT)
    target = folder if output is None else Path(output).expanduser()
    show(report)
    if target.resolve() == folder.resolve():
        files.render(report, folder)
    else:
        check_output(target)
        for arm in [arm for comparison in report.comparisons for arm in comparison.arms]:
            for run_figures in arm.runs:
                run_figures.folder = seen_from(target, folder / Path(run_figures.folder).expanduser())
        files.write_all(report, target)
    say(written(target))


def side_by_side(folders: Sequence[str], output: str | None) -> None:
    """Print runs side by side; a single finished run first repeats its summary."""
    runs = read_runs(folders)
    target = None if output is None else Path(output).expanduser()
    if target is not None:
        check_output(target)
    report = of_runs(runs, target)
    first = next(iter(runs.values()))
    if len(runs) == 1 and first.status == "finished":
        say(summary.text(first, Path(next(iter(runs)))) + "\n")
    show(report)
    if target is not None:
        files.write_all(report, target)
        say(written(target))


def written(folder: Path) -> str:
    """What was written into a report's folder, in a line."""
    names = [files.PAGE, files.MARKDOWN, results.REPORT, files.ARMS, files.RUNS]
    names += ["plots"] if any((folder / "plots").glob("*.png")) else []
    return f"\nWritten to {folder}: {', '.join(names)}"


def show(report: Report) -> None:
    """Print a report as wide as the terminal, from 80 to 100 columns."""
    width = shutil.get_terminal_size(fallback=(terminal.WIDTH, 24)).columns
    say(terminal.text(report, min(terminal.WIDTH, max(80, width))))


def check_output(folder: Path) -> None:
    """Raises PerlError for a folder that holds anything but an earlier report of this command."""
    if folder.exists() and not folder.is_dir():
        raise PerlError(f"--output {folder} is a file", "name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    path = folder / results.REPORT
    is_ours = path.exists() and not (folder / RECORD).exists() and results.read(path).command.startswith(COMMAND)
    if not is_ours:
        raise PerlError(f"--output {folder} is not empty, and not a report of perl report", "name another folder")


def read_runs(folders: Sequence[str]) -> Runs:
    """The runs in the folders; raises one PerlError that names every folder without one."""
    runs, faults = {}, []
    for folder in dict.fromkeys(folders):
        path = Path(folder).expanduser()
        try:
            runs[folder] = read_record(path)
        except PerlError as error:
            faults.append(error.problem if path.is_dir() else f"There is no folder {folder}")
            continue
        if runs[folder].command not in STAGES:
            faults.append(f"{folder} is a run of perl {runs[folder].command}, which perl report can't compare")
    if faults:
        hint = _inside(folders) or "name the folders of perl sft, reward, rl or eval runs"
        raise PerlError("\n".join(faults), hint)
    return runs


def _inside(folders: Sequence[str]) -> str:
    """A hint at runs one level below the folders; empty if there are none."""
    paths = [Path(folder).expanduser() for folder in folders]
    runs = [str(below.parent) for path in paths for below in sorted(path.glob(f"*/{RECORD}"))]
    are_runs = all((path / RECORD).exists() for path in paths)
    return f"{COMMAND} {shlex.join(runs[:6])}" if runs and not are_runs else ""


def seen_from(report: Path, run: Path) -> str:
    """A run's folder relative to a report's, but absolute if a relative path would lead through the user's home."""
    is_private = [any(place.resolve().is_relative_to(home) for home in homes()) for place in (report, run)]
    return str(run.resolve()) if is_private == [False, True] else os.path.relpath(run, report)


def of_runs(runs: Runs, target: Path | None) -> Report:
    """The runs as a report, grouped by stage; their folders are shown relative to `target`."""
    stages: dict[str, dict[str, RunRecord]] = {}
    for folder, record in runs.items():
        stages.setdefault(record.command, {})[folder] = record
    first = min(runs.values(), key=lambda record: record.started)
    shown = words.shortest(runs)
    policies = pipeline.policies({shown[folder]: record for folder, record in runs.items()})
    command = [*COMMAND.split(), *runs]
    if target is not None:
        command += ["--output", str(target)]
    return Report(
        title=title_of(runs, policies),
        command=shlex.join(command),
        status="finished",
        started=first.started,
        elapsed_seconds=round(sum(record.elapsed_seconds for record in runs.values()), 1),
        device=first.device,
        versions=first.versions,
        git_commit=first.git_commit,
        comparisons=[compare(stage, stages[stage], target) for stage in STAGES if stage in stages],
        pipeline=policies if len(policies) > 1 else [],
    )


def title_of(runs: Runs, policies: Sequence[results.PolicyFigures]) -> str:
    """A report's title: the policies' key figure, or else what it shows."""
    for name in ("gold", "mean_reward"):
        known = [policy for policy in policies if name in policy.figures]
        if len(known) > 1:
            figures = ", ".join(f"{policy.name} {words.quality(name, policy.figures[name])}" for policy in known)
            return f"{metrics.words(name).capitalize()}: {figures}"
    name, record = next(iter(runs.items()))
    return f"{len(runs)} runs side by side" if len(runs) > 1 else f"perl {record.command}: {name}"


def compare(stage: str, runs: Runs, target: Path | None) -> Comparison:
    """Runs of one stage as arms; runs that only differ in the seed are one arm."""
    groups: dict[str, dict[str, RunRecord]] = {}
    for folder, record in runs.items():
        same = [(name, value) for name, value in sorted(record.settings.items()) if name not in SAME]
        groups.setdefault(repr((origin(record), same)), {})[folder] = record
    names = arm_names([list(group) for group in groups.values()])
    arms = [arm_of(name, group, target) for name, group in zip(names, groups.values(), strict=True)]
    for model in dict.fromkeys(arm.model for arm in arms):
        of_model = [arm for arm in arms if arm.model == model]
        baseline = next((arm for arm in of_model if arm.is_full), of_model[0])
        baseline.is_baseline = True
    return contrasts.compare(stage, arms, differing(runs))


def arm_names(groups: Sequence[Sequence[str]]) -> list[str]:
    """A unique name for each group of folders: as few of their last parts as needed, without the seed."""
    known = words.shortest(str(Path(folder).absolute()) for group in groups for folder in group)
    names = []
    for group in groups:
        shown = [known[str(Path(folder).absolute())] for folder in group]
        last = {Path(name).name for name in shown}
        name = last.pop() if len(last) == 1 else _shared(shown)
        names.append(shown[0] if len(shown) == 1 else name)
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def _shared(names: Sequence[str]) -> str:
    """What all names start with, without the mark of a seed: lora-s0 and lora-s1 become lora."""
    start = os.path.commonprefix(list(names))  # noqa: RUF071 - by letters, not by folders
    return re.sub(r"([-_. ]+(s|seed)?)?[-_. /]*$", "", start) or names[0]


def arm_of(name: str, group: Runs, target: Path | None) -> ArmResult:
    """Runs that only differ in the seed as an arm; an evaluation is described by the run that it evaluates."""
    record = next(iter(group.values()))
    source = record.settings
    if record.command == "eval":
        evaluated = lineage.record_of(record.settings.get("model"))
        source = evaluated.settings if evaluated else {}  # perlcli didn't train it
    runs: list[results.RunFigures] = []
    for folder, each in group.items():
        path = Path(folder).expanduser()
        shown = folder if target is None else seen_from(target, path)
        repeat = 1 + sum(earlier.seed == each.seed for earlier in runs)
        run = figures.of_run(path, shown=shown, repeat=repeat)
        if run.status == "running":
            run.status = UNFINISHED
        runs.append(run)
    return ArmResult(
        name=name,
        model=origin(record),
        kind=kind_of(source),
        precision=str(record.device.get("precision") or words.NONE),
        rank=source.get("lora_r"),
        learning_rate=record.settings.get("learning_rate"),
        runs=runs,
    )


def kind_of(values: Mapping[str, Any]) -> str:
    """How a run trained: full, dora, lora, or its --peft file."""
    if not values:
        return words.NONE
    if values.get("full"):
        return FULL
    return str(values.get("peft") or (DORA if values.get("use_dora") else LORA))


def differing(runs: Runs) -> list[str]:
    """What finished runs of one stage and model differ in, other than what makes them different arms."""
    finished: dict[str, dict[str, RunRecord]] = {origin(record): {} for record in runs.values()}
    for folder, record in runs.items():
        if record.status == "finished":
            finished[origin(record)][folder] = record
    warnings: list[str] = []
    for model, records in finished.items():
        shown = words.shortest(records)
        place = f"{model}: " if len(finished) > 1 else ""
        intended = SAME | ({"model"} if any(record.command == "eval" for record in records.values()) else set())
        lines = contrasts.differences({shown[name]: record for name, record in records.items()}, intended)
        warnings += [f"{place}{line}" for line in lines]
    return warnings

"""`perl report`: finished runs of any stage rendered again, side by side; or a comparison's own files from its JSON."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlcli import settings
from perlcli.comparison import results
from perlcli.comparison.render import files, tables, words
from perlcli.comparison.results import FULL, Arm, Comparison, Report
from perlcli.errors import PerlError
from perlcli.redaction import homes
from perlcli.run import summary
from perlcli.run.files import RECORD
from perlcli.run.record import RunRecord, find_record, read_record
from perlcli.terminal import say

COMMAND, COMPARISON = "perl report", "compare-full"
STAGES = ("sft", "reward", "rl", "eval")
UNFINISHED = "still running, or it was killed"

# What steers a call or names a place, and makes no other run.
SAME = {"seed", "output", *settings.ONCE, "save_steps", "report_to", "recipe", "strict"}


@dataclass(frozen=True)
class Found:
    """A run that was found: its folder as given, and its record."""

    folder: str
    record: RunRecord


def run(given: settings.Report) -> None:
    """Print the runs side by side, and write the report's files where a folder is named for them."""
    folders = [folder.rstrip("/") or "/" for folder in given.runs.run]
    output = given.run.output
    if not folders:
        raise PerlError("perl report needs the folder of at least one run", "perl report runs/reward")
    comparisons = [folder for folder in folders if is_comparison(folder)]
    if comparisons and len(folders) > 1:
        hint = f"perl report {comparisons[0]}, or name the folders of its runs"
        raise PerlError(f"{comparisons[0]} is the folder of a comparison: it is rendered by itself", hint)
    if comparisons:
        again(Path(comparisons[0]).expanduser(), output)
    else:
        side_by_side(folders, output)


def is_comparison(folder: str) -> bool:
    """Whether a folder holds a comparison, not a run."""
    path = Path(folder).expanduser()
    if not (path / results.REPORT).exists():
        return False
    return not (path / RECORD).exists() or read_record(path).command == COMPARISON


def again(folder: Path, output: str | None) -> None:
    """Print a comparison and write its files again: in its folder, where its JSON stays as it is, or in another."""
    found = results.read(folder / results.REPORT)
    target = folder if output is None else Path(output).expanduser()
    show(found)
    if target.resolve() == folder.resolve():
        files.render(found, folder)
    else:
        check_output(target)
        for run in _runs(found):
            run.folder = seen_from(target, folder / Path(run.folder).expanduser())
        files.write_all(found, target)
    say(f"\nWritten to {target}: {files.PAGE}, {files.MARKDOWN}, {files.ARMS}, {files.RUNS}, plots")


def _runs(found: Report) -> Iterator[results.RunFigures]:
    for comparison in found.comparisons:
        for arm in comparison.arms:
            yield from arm.runs


def side_by_side(folders: Sequence[str], output: str | None) -> None:
    """Print runs beside each other; of one that is finished, first what it said at its end."""
    found = read_runs(folders)
    target = None if output is None else Path(output).expanduser()
    if target is not None:
        check_output(target)
    made = of_runs(found, target)
    if len(found) == 1 and found[0].record.status == "finished":
        say(summary.text(found[0].record) + "\n")
    show(made)
    if target is not None:
        files.write_all(made, target)
        say(f"\nWritten to {target}: {files.PAGE}, {files.MARKDOWN}, {results.REPORT}, {files.ARMS}, plots")


def show(found: Report) -> None:
    """Print a report as wide as the terminal, from 80 to 100 columns."""
    width = shutil.get_terminal_size(fallback=(tables.WIDTH, 24)).columns
    say(tables.terminal(found, min(tables.WIDTH, max(80, width))))


def check_output(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier report of this command."""
    if folder.is_dir() and any(folder.iterdir()):
        path = folder / results.REPORT
        is_ours = path.exists() and not (folder / RECORD).exists() and results.read(path).command.startswith(COMMAND)
        if not is_ours:
            raise PerlError(f"--output {folder} is not empty, and not a report of perl report", "name another folder")
    elif folder.exists() and not folder.is_dir():
        raise PerlError(f"--output {folder} is a file", "name a folder")


def read_runs(folders: Sequence[str]) -> list[Found]:
    """The runs in the folders; raises one PerlError that tells every folder that holds none."""
    found, faults = [], []
    for folder in dict.fromkeys(folders):
        try:
            record = read_record(Path(folder).expanduser())
        except PerlError as error:
            faults.append(_fault(folder, error))
            continue
        if record.command not in STAGES:
            faults.append(f"{folder} is of perl {record.command}, which is no stage that can be held against others")
        found.append(Found(folder, record))
    if faults:
        raise PerlError(
            "\n".join(faults), _inside(folders) or "name the folders that perl sft, reward, rl or eval left"
        )
    return found


def _fault(folder: str, error: PerlError) -> str:
    return error.problem if Path(folder).expanduser().is_dir() else f"There is no folder {folder}"


def _inside(folders: Sequence[str]) -> str:
    """A hint at runs that lie one level inside the folders; empty where there are none."""
    found = [str(path.parent) for folder in folders for path in sorted(Path(folder).expanduser().glob(f"*/{RECORD}"))]
    return f"{COMMAND} {shlex.join(found[:6])}" if found and not all(map(_is_run, folders)) else ""


def _is_run(folder: str) -> bool:
    path = Path(folder).expanduser() / RECORD
    return path.exists()


def seen_from(report: Path, run: Path) -> str:
    """A run's folder as seen from a report's; in full where the way there would lead through the user's home."""
    is_private = [any(place.resolve().is_relative_to(home) for home in homes()) for place in (report, run)]
    return str(run.resolve()) if is_private == [False, True] else os.path.relpath(run, report)


def of_runs(found: Sequence[Found], target: Path | None) -> Report:
    """The runs as a report, grouped by stage, whose folders are told as seen from `target`."""
    stages = list(dict.fromkeys(item.record.command for item in found))
    first = min((item.record for item in found), key=lambda record: record.started)
    place = [] if target is None else ["--output", str(target)]
    return Report(
        title=f"{len(found)} runs side by side" if len(found) > 1 else f"perl {stages[0]}: {found[0].folder}",
        command=shlex.join([*COMMAND.split(), *(item.folder for item in found), *place]), status="finished",
        started=first.started, elapsed_seconds=round(sum(item.record.elapsed_seconds for item in found), 1),
        device=first.device, versions=first.versions, git_commit=first.git_commit,
        comparisons=[compare(stage, [item for item in found if item.record.command == stage], target)
                     for stage in stages],
    )  # fmt: skip


def compare(stage: str, found: Sequence[Found], target: Path | None) -> Comparison:
    """Runs of one stage as arms; those that are equal in all but the seed are one."""
    groups: dict[str, list[Found]] = {}
    for item in found:
        groups.setdefault(_sameness(item.record), []).append(item)
    names = arm_names([[item.folder for item in group] for group in groups.values()])
    arms = [arm_of(name, group, target) for name, group in zip(names, groups.values(), strict=True)]
    for model in dict.fromkeys(arm.model for arm in arms):
        mine = [arm for arm in arms if arm.model == model]
        next((arm for arm in mine if arm.kind == FULL), mine[0]).is_baseline = True
    return results.compare(stage, arms, differing(found))


def _sameness(record: RunRecord) -> str:
    """What is the same in runs of one arm."""
    return repr((origin(record), [(k, v) for k, v in sorted(record.settings.items()) if k not in SAME]))


def arm_names(groups: Sequence[Sequence[str]]) -> list[str]:
    """A name for each group of folders: their own, as long as they must be to be unique, without what tells seeds."""
    known = words.shortest(str(Path(folder).absolute()) for group in groups for folder in group)
    names = []
    for group in groups:
        shown = [known[str(Path(folder).absolute())] for folder in group]
        last = {Path(name).name for name in shown}
        names.append(shown[0] if len(shown) == 1 else last.pop() if len(last) == 1 else _shared(shown))
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def _shared(names: Sequence[str]) -> str:
    """What names begin with in common, without the seed's mark: lora-s0 and lora-s1 are lora."""
    start = os.path.commonprefix(list(names))  # noqa: RUF071 - letters are meant, not folders
    return re.sub(r"([-_. ]+(s|seed)?)?[-_. /]*$", "", start) or names[0]


def arm_of(name: str, group: Sequence[Found], target: Path | None) -> Arm:
    """Runs that differ in the seed alone as an arm; of an evaluation, told by the run that it evaluates."""
    record = group[0].record
    source = record.settings if record.command != "eval" else _evaluated(record)
    runs, seeds = [], []
    for item in group:
        seeds.append(item.record.seed)
        path = Path(item.folder).expanduser()
        shown = item.folder if target is None else seen_from(target, path)
        made = results.of_run(path, shown=shown, repeat=seeds.count(item.record.seed))
        if made.status == "running":
            made.status = UNFINISHED
        runs.append(made)
    return Arm(
        name=name, model=origin(record), kind=kind_of(source),
        precision=str(record.device.get("precision") or words.NONE), rank=source.get("lora_r"),
        learning_rate=record.settings.get("learning_rate"), runs=runs,
    )  # fmt: skip


def origin(record: RunRecord, depth: int = 8) -> str:
    """The model that a run goes back to: behind a base that full tuning left, the one that was tuned."""
    base = str(record.model.get("base") or record.settings.get("model") or "")
    earlier = _record_of(base)
    return base if earlier is None or not depth else origin(earlier, depth - 1)


def _record_of(folder: str | None) -> RunRecord | None:
    """The record of a folder, where it is a run's and can be read."""
    try:
        return find_record(folder)
    except PerlError:
        return None


def _evaluated(record: RunRecord) -> Mapping[str, Any]:
    """The settings of the run that left the model which was evaluated; empty where it was no run of ours."""
    found = _record_of(record.settings.get("model"))
    return found.settings if found else {}


def kind_of(values: Mapping[str, Any]) -> str:
    """How a run trained: full, dora, the file of its peft config, or lora."""
    if not values:
        return words.NONE
    if values.get("full"):
        return FULL
    return str(values.get("peft") or ("dora" if values.get("use_dora") else "lora"))


def differing(found: Sequence[Found]) -> list[str]:
    """In what runs of one stage and one model differ beyond what they are meant to."""
    warnings = []
    models = dict.fromkeys(origin(item.record) for item in found)
    for model in models:
        mine = {item.folder: item.record for item in found
                if origin(item.record) == model and item.record.status == "finished"}  # fmt: skip
        shown = words.shortest(mine)
        place = f"{model}: " if len(models) > 1 else ""
        meant = SAME | ({"model", "data"} if found[0].record.command == "eval" else set())
        for line in results.differences({shown[name]: record for name, record in mine.items()}, meant):
            warnings.append(f"{place}{line}")
    return warnings

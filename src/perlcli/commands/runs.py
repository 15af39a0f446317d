"""`perl runs`: the runs below a folder as a table; of those at work, how far they are by their last line of metrics."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perlcli import coffee, settings
from perlcli.errors import PerlError
from perlcli.run import liveness, metrics, summary
from perlcli.run.files import CHECKPOINTS, METRICS, RECORD
from perlcli.run.record import SCHEMA_VERSION, SEVERAL, RunRecord, read_record, resume_command
from perlcli.terminal import say
from perlcli.text import clip, one_line, plain_table, size

DEFAULT = "runs"
DEPTH = 8  # folders below the one that is asked for: a comparison's runs lie three deep
TAIL_BYTES = 65536  # of metrics.jsonl, whose lines have some 2,000
REFRESH_SECONDS = 2.0
NOTES = 5  # lines beneath the table, of the newest runs that have something to tell
RUNNING, KILLED, ELSEWHERE, UNREADABLE = "running", "killed", "running?", "unreadable"
STATUS: dict[liveness.Life, str] = {"alive": RUNNING, "gone": KILLED, "unknown": ELSEWHERE}
HEADER = ("run", "stage", "status", "model", "steps", "key figure", "age", "size")
LEFT = 4  # columns of words
CUT = ((3, 12), (0, 20), (3, 6), (0, 10))  # what gives way on a narrow terminal: a column, and down to which width
FIRST = datetime(2020, 1, 1, tzinfo=UTC).timestamp()  # no run is older: a machine's clock that was never set says 1970
AGES = ((86400 * 2, 86400, "d"), (3600 * 2, 3600, "h"), (60 * 2, 60, "min"), (0, 1, "s"))


@dataclass(frozen=True)
class Row:
    """A run as the table has it."""

    folder: Path
    stamp: int  # when its record was written, in ns: what tells whether to read it again
    status: str
    note: str  # what there is to tell beneath the table
    started: float  # seconds since 1970
    size: int  # bytes of its folder
    stage: str = ""
    model: str = ""
    steps: int | None = None
    total: int | None = None
    metric: tuple[str, float] | None = None


@dataclass(frozen=True)
class Line:
    """A row in its place: beneath the run that it lies in."""

    row: Row
    name: str  # as seen from the folder that was asked for, or from the run that it lies in
    depth: int


def run(given: settings.Runs) -> None:
    """Print the runs below a folder: once, or again and again as long as one is at work and a terminal shows it."""
    asked, watch = given.runs.dir or DEFAULT, given.runs.watch
    top = Path(asked).expanduser()
    if not top.is_dir():
        hint = "perl runs DIR" if given.runs.dir is None else "name the folder of a run, or one that holds runs"
        raise PerlError(f"{asked} is a file" if top.exists() else f"There is no folder {asked}", hint)
    if watch and (given.runs.json or not is_terminal()):
        raise PerlError("--watch needs a terminal, and prints no JSON", "call perl runs --json as often as you like")
    rows = read(top, {})
    if given.runs.json:
        print(json.dumps([as_dict(line, time.time()) for line in arranged(rows, top)], indent=2, ensure_ascii=False))
    elif watch or (watch is None and is_terminal() and is_live(rows)):
        follow(top, rows, for_ever=bool(watch))
    else:
        say(text(rows, top, time.time(), width_of_terminal()))


def is_terminal() -> bool:
    """Whether someone looks at what is printed."""
    return sys.stdout.isatty()


def is_live(rows: Sequence[Row]) -> bool:
    """Whether a run is at work on this machine."""
    return any(row.status == RUNNING for row in rows)


def width_of_terminal() -> int | None:
    """Columns that a line can have; None for a pipe or file, which take any."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def follow(top: Path, rows: list[Row], *, for_ever: bool) -> None:
    """Show the table, brought up to date every two seconds, until Ctrl-C or until no run is at work any more."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def shown() -> Text:
        size = shutil.get_terminal_size()
        return Text(fitting(text(rows, top, time.time(), size.columns), size.lines - 1), no_wrap=True)

    with suppress(KeyboardInterrupt), Live(shown(), console=Console(), auto_refresh=False, transient=True) as live:
        while for_ever or is_live(rows):
            time.sleep(REFRESH_SECONDS)
            rows = read(top, {row.folder: row for row in rows})
            live.update(shown(), refresh=True)
    say(text(rows, top, time.time(), width_of_terminal()))  # all of it, as nothing is cut to the terminal's height


def fitting(table: str, height: int) -> str:
    """The table's head and as many of its last lines as the terminal has room for."""
    lines = table.splitlines()
    return table if len(lines) <= height else "\n".join([*lines[:2], *lines[2:][-max(1, height - 2) :]])


def find(top: Path) -> Iterator[Path]:
    """Folders with a record: the one itself and those below, each once, also where links lead in a circle."""
    seen: set[tuple[int, int]] = set()
    near, links = [(top, 0)], list[tuple[Path, int]]()
    while near or links:
        folder, depth = near.pop() if near else links.pop()  # links last: a run goes by its own name
        try:
            status = folder.stat()
            inside = [entry for entry in os.scandir(folder) if depth < DEPTH and is_place(entry)]
        except OSError:
            continue  # not ours to read, or deleted just now
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if (folder / RECORD).is_file():
            yield folder
        for entry in inside:
            (links if entry.is_symlink() else near).append((folder / entry.name, depth + 1))


def is_place(entry: os.DirEntry[str]) -> bool:
    """Whether a run can lie in an entry of a folder: nothing hidden, no checkpoint."""
    return entry.is_dir() and not entry.name.startswith((".", "checkpoint-")) and entry.name != CHECKPOINTS


def read(top: Path, known: Mapping[Path, Row]) -> list[Row]:
    """A row for each run; those that have ended are taken from `known` where their record is as it was."""
    rows = []
    for folder in find(top):
        before = known.get(folder)
        try:
            stamp = (folder / RECORD).stat().st_mtime_ns
        except OSError:
            continue  # deleted just now
        is_same = before is not None and before.stamp == stamp and before.status not in (RUNNING, ELSEWHERE)
        rows.append(before if before is not None and is_same else row_of(folder, stamp))
    return rows


def row_of(folder: Path, stamp: int) -> Row:
    """The row of a run; of a record that can't be read, one that says so."""
    bytes_in = size_of(folder)
    try:
        return row_of_record(folder, read_record(folder), stamp, bytes_in)
    except PerlError as error:
        status, note = unreadable(folder), error.problem
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        status, note = UNREADABLE, f"{folder / RECORD} holds values that no run writes ({type(error).__name__})"
    return Row(folder, stamp, status, printable(note), stamp / 1e9, bytes_in)


def unreadable(folder: Path) -> str:
    """In a word why a record can't be read: it is of another version, or broken."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return UNREADABLE
    version = content.get("schema_version") if isinstance(content, dict) else None
    is_other = isinstance(version, int) and version != SCHEMA_VERSION
    return f"schema {version}" if is_other else UNREADABLE


def row_of_record(folder: Path, record: RunRecord, stamp: int, size: int) -> Row:
    """The row of a record. Raises AttributeError and the like for one whose values are of other types."""
    status = STATUS[liveness.life(record.process)] if record.status == RUNNING else record.status
    last = {} if status == "finished" else last_row(folder / METRICS)
    steps = record.steps if status == "finished" else max(record.steps, last.get("step", 0))
    return Row(
        folder, stamp, printable(str(status)), printable(note_of(folder, record, status)),
        datetime.fromisoformat(record.started).timestamp(), size, printable(record.command),
        model_of(record), steps, total_of(record, steps, last), metric_of(record.command, record.metrics or last),
    )  # fmt: skip


def note_of(folder: Path, record: RunRecord, status: str) -> str:
    """What a run has to tell beyond its row."""
    if status in ("failed", "interrupted"):
        return "; ".join(filter(None, [record.failure, way_on(folder, record)]))
    if status == ELSEWHERE:
        wrote = max(path.stat().st_mtime for path in (folder / RECORD, folder / METRICS) if path.exists())
        return f"on another machine, which can't be asked; it last wrote {age(time.time() - wrote)} ago"
    if status != KILLED:
        return ""
    return "; ".join(filter(None, ["its process is gone", way_on(folder, record)]))


def way_on(folder: Path, record: RunRecord) -> str:
    """The command that goes on with a run, in words; empty for one of a command that can't."""
    if "resume" not in settings.names(settings.COMMANDS[record.command]):
        return ""
    return "to continue: " + resume_command(folder, record.command)


def last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a step in a run's metrics, from the file's end alone; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # being written, or cut by where reading began
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return {}


def total_of(record: RunRecord, steps: int, last: Mapping[str, Any]) -> int | None:
    """Steps that a run will have done at its end; None where nothing tells it, or where its settings are of others."""
    if record.command in SEVERAL:
        return None
    if record.status == "finished":
        return steps
    asked, epochs, epoch = record.settings.get("max_steps"), record.settings.get("num_train_epochs"), last.get("epoch")
    if asked is not None:
        return int(asked)
    return round(last["step"] * epochs / epoch) if epochs and epoch else None


def metric_of(stage: str, found: Mapping[str, Any]) -> tuple[str, float] | None:
    """The figure that a stage is judged by, as far as the run has one."""
    known = (
        name
        for name in metrics.judged_by(stage)
        if isinstance(found.get(name), int | float) and not isinstance(found[name], bool)
    )
    name = next(known, None)
    return None if name is None else (name, float(found[name]))


def model_of(record: RunRecord) -> str:
    """The base's name without the folders or the organisation before it."""
    name = str(record.model.get("base") or record.settings.get("model") or coffee.NAME)
    return printable("coffee" if name == coffee.NAME else Path(name).name or name)


def size_of(folder: Path) -> int:
    """Bytes of all that lies in a folder, each file counted once; links aren't followed."""
    sizes: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except OSError:
                continue  # a file at the side, renamed just now
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def arranged(rows: Sequence[Row], top: Path) -> list[Line]:
    """The rows, newest last, each run that lies in another one beneath it."""
    folders = {row.folder for row in rows}
    inside: dict[Path | None, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.started, str(row.folder))):
        holder = next((place for place in row.folder.parents if place in folders), None)
        inside.setdefault(holder, []).append(row)

    def below(holder: Path | None, depth: int) -> Iterator[Line]:
        for row in inside.get(holder, ()):
            yield Line(row, name_of(row.folder, holder or top), depth)
            yield from below(row.folder, depth + 1)

    return list(below(None, 0))


def name_of(folder: Path, place: Path) -> str:
    """A folder as seen from another; its own name where it is that one."""
    return printable(str(folder.relative_to(place)) if folder != place else folder.resolve().name or str(folder))


def text(rows: Sequence[Row], top: Path, now: float, width: int | None) -> str:
    """The runs as a table, no wider than `width`, and beneath it what some of them have to tell."""
    if not rows:
        return f"No runs in {top}."
    lines = arranged(rows, top)
    cells = fitted([cells_of(line, now) for line in lines], width)
    found = [f"{line.row.folder}: {line.row.status}: {line.row.note}" for line in lines if line.row.note]
    more = [f"… and {len(found) - NOTES} more: --json tells of all"] if len(found) > NOTES else []
    notes = [*more, *found[-NOTES:]]
    return "\n".join([plain_table(HEADER, cells, LEFT), *[""][: len(notes)], *notes])


def cells_of(line: Line, now: float) -> list[str]:
    """A line of the table."""
    row = line.row
    metric = "-" if row.metric is None else f"{metrics.words(row.metric[0])} {summary.figure(*row.metric)}"
    return [
        "  " * line.depth + line.name, row.stage or "-", row.status, row.model or "-", steps_of(row), metric,
        "?" if row.started < FIRST else age(now - row.started), size(row.size),
    ]  # fmt: skip


def steps_of(row: Row) -> str:
    """Steps done, of how many."""
    if not row.steps and not row.total:
        return "-"
    return f"{row.steps or 0:,}/{'?' if row.total is None else f'{row.total:,}'}"


def fitted(rows: list[list[str]], width: int | None) -> list[list[str]]:
    """The cells cut so that the table is no wider than `width`, as far as can be."""
    for column, least in CUT:
        widths = [max(len(row[place]) for row in [HEADER, *rows]) for place in range(len(HEADER))]
        over = sum(widths) + 2 * (len(widths) - 1) - (width or math.inf)
        if over > 0:
            limit = int(max(least, widths[column] - over))
            rows = [[*row[:column], clip(row[column], limit), *row[column + 1 :]] for row in rows]
    return rows


def printable(value: str) -> str:
    """Text of one line without what would move a terminal's cursor: a record can come from anywhere."""
    return one_line("".join(letter if letter.isprintable() else " " for letter in value))[:300]


def age(seconds: float) -> str:
    """A time span in one unit: `40 s`, `3 h`; of a start that lies ahead, as a clock that was set tells it, `0 s`."""
    span = max(0.0, seconds)
    return next(f"{span // unit:.0f} {word}" for least, unit, word in AGES if span >= least)


def as_dict(line: Line, now: float) -> dict[str, Any]:
    """A run for programs."""
    row = line.row
    value = None if row.metric is None or not math.isfinite(row.metric[1]) else row.metric[1]
    return {
        "folder": str(row.folder), "name": line.name, "depth": line.depth, "stage": row.stage or None,
        "status": row.status, "note": row.note or None, "model": row.model or None, "steps": row.steps,
        "total_steps": row.total, "metric": row.metric[0] if row.metric else None, "value": value,
        "started": row.started, "bytes": row.size,
        "age_seconds": None if row.started < FIRST else round(max(0.0, now - row.started), 1),
    }  # fmt: skip

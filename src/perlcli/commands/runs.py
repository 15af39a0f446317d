"""`perl runs`: a table of the runs below a folder, with the progress of those that are running."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perlcli import coffee, settings
from perlcli.errors import PerlError
from perlcli.run import checkpoints, liveness, metrics, summary
from perlcli.run.files import CHECKPOINTS, METRICS, RECORD, valid_rows
from perlcli.run.record import SCHEMA_VERSION, SEVERAL, RunRecord, command_line, read_record
from perlcli.terminal import say
from perlcli.text import clip, one_line, plain_table, size

DEFAULT = "runs"
DEPTH = 8  # levels of folders that are searched: the runs of a comparison are three levels deep
TAIL_BYTES = 65536  # read from the end of metrics.jsonl, whose lines have about 2,000
REFRESH_SECONDS = 2.0
NOTES = 5  # lines below the table, about the newest runs that need one
RUNNING, KILLED, ELSEWHERE, UNREADABLE = "running", "killed", "running?", "unreadable"
STATUS: dict[liveness.Life, str] = {"alive": RUNNING, "gone": KILLED, "unknown": ELSEWHERE}
HEADER = ("run", "stage", "status", "model", "steps", "key figure", "age", "size")
LEFT = 4  # columns of words, aligned left
CUT = ((3, 12), (0, 20), (3, 6), (0, 10))  # on a narrow terminal: the columns that are cut, and to how many letters
FIRST = datetime(2020, 1, 1, tzinfo=UTC).timestamp()  # no run is older: a clock that was never set says 1970
AGES = ((86400 * 2, 86400, "d"), (3600 * 2, 3600, "h"), (60 * 2, 60, "min"), (0, 1, "s"))


@dataclass(frozen=True)
class Row:
    """A run as a row of the table."""

    folder: Path
    stamp: int  # when its record was written, in ns; an unchanged record isn't read again
    status: str
    note: str  # for below the table
    started: float  # seconds since 1970
    size: int  # bytes in its folder
    stage: str = ""
    model: str = ""
    steps: int | None = None
    total: int | None = None
    metric: tuple[str, float] | None = None


@dataclass(frozen=True)
class Line:
    """A row in its place: below the run that contains it."""

    row: Row
    name: str  # relative to the folder that was asked for, or to the run that contains it
    depth: int


def run(given: settings.Runs) -> None:
    """Print the runs below a folder; on a terminal, keep the table up to date while a run is in progress."""
    asked, watch = given.runs.dir or DEFAULT, given.runs.watch
    top = Path(asked).expanduser()
    if not top.is_dir():
        hint = "perl runs DIR" if given.runs.dir is None else "give the folder of a run, or one that contains runs"
        raise PerlError(f"{asked} is a file" if top.exists() else f"No such folder: {asked}", hint)
    if watch and (given.runs.json or not is_terminal()):
        problem = "--watch needs a terminal and does not work with --json"
        raise PerlError(problem, "run perl runs --json repeatedly instead")
    rows = read(top, {})
    if given.runs.json:
        print(json.dumps([as_dict(line, time.time()) for line in arranged(rows, top)], indent=2, ensure_ascii=False))
    elif watch or (watch is None and is_terminal() and is_live(rows)):
        follow(top, rows, for_ever=bool(watch))
    else:
        say(text(rows, top, time.time(), width_of_terminal()))


def is_terminal() -> bool:
    return sys.stdout.isatty()


def is_live(rows: Sequence[Row]) -> bool:
    """Whether a run is in progress on this machine."""
    return any(row.status == RUNNING for row in rows)


def width_of_terminal() -> int | None:
    """Columns of the terminal; None for a pipe or file, which take lines of any length."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def follow(top: Path, rows: list[Row], *, for_ever: bool) -> None:
    """Show the table and refresh it every two seconds, until Ctrl-C or, if not `for_ever`, until no run is running."""
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
    say(text(rows, top, time.time(), width_of_terminal()))  # all of it, not only what fits the terminal's height


def fitting(table: str, height: int) -> str:
    """The table's head and as many of its last lines as fit; rich's Live would show the first ones."""
    lines = table.splitlines()
    return table if len(lines) <= height else "\n".join([*lines[:2], *lines[2:][-max(1, height - 2) :]])


def find(top: Path) -> Iterator[Path]:
    """The folders with a record, from `top` itself downwards, each once even if links form a circle."""
    seen: set[tuple[int, int]] = set()
    near, links = [(top, 0)], list[tuple[Path, int]]()
    while near or links:
        folder, depth = near.pop() if near else links.pop()  # links last, so that a run is found by its own name
        try:
            status = folder.stat()
            inside = [entry for entry in os.scandir(folder) if depth < DEPTH and is_place(entry)]
        except OSError:
            continue  # not readable, or just deleted
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if (folder / RECORD).is_file():
            yield folder
        for entry in inside:
            (links if entry.is_symlink() else near).append((folder / entry.name, depth + 1))


def is_place(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder that may contain runs."""
    return entry.is_dir() and not entry.name.startswith((".", "checkpoint-")) and entry.name != CHECKPOINTS


def read(top: Path, known: Mapping[Path, Row]) -> list[Row]:
    """A row for each run; rows of ended runs come from `known` if their record has not changed."""
    rows = []
    for folder in find(top):
        row = known.get(folder)
        try:
            stamp = (folder / RECORD).stat().st_mtime_ns
        except OSError:
            continue  # just deleted
        if row is None or row.stamp != stamp or row.status in (RUNNING, ELSEWHERE):
            row = row_of(folder, stamp)
        rows.append(row)
    return rows


def row_of(folder: Path, stamp: int) -> Row:
    """The row of a run; if its record can't be read, the row says why."""
    bytes_in = size_of(folder)
    try:
        return row_of_record(folder, read_record(folder), stamp, bytes_in)
    except PerlError as error:
        status, note = unreadable(folder), error.problem
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        status, note = UNREADABLE, f"{folder / RECORD} is damaged: unexpected values ({type(error).__name__})"
    return Row(folder, stamp, status, printable(note), stamp / 1e9, bytes_in)


def unreadable(folder: Path) -> str:
    """Why a record can't be read, as a status: another version, or damaged."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return UNREADABLE
    version = content.get("schema_version") if isinstance(content, dict) else None
    is_other = isinstance(version, int) and version != SCHEMA_VERSION
    return f"schema {version}" if is_other else UNREADABLE


def row_of_record(folder: Path, record: RunRecord, stamp: int, size: int) -> Row:
    """The row of a record. Raises AttributeError, TypeError and the like if its values have the wrong types."""
    status = STATUS[liveness.life(record.process)] if record.status == RUNNING else record.status
    last = {} if status == "finished" else last_row(folder / METRICS)
    steps = record.steps if status == "finished" else max(record.steps, last.get("step", 0))
    started = datetime.fromisoformat(record.started).timestamp()
    total, metric = total_of(record, steps, last), metric_of(record.command, record.metrics or last)
    row = Row(folder, stamp, status, printable(note_of(folder, record, status)), started, size)
    return replace(
        row, stage=printable(record.command), model=model_of(record), steps=steps, total=total, metric=metric
    )


def note_of(folder: Path, record: RunRecord, status: str) -> str:
    """What to say about a run below the table: why it ended and how to continue."""
    if status == ELSEWHERE:
        written = max(path.stat().st_mtime for path in (folder / RECORD, folder / METRICS) if path.exists())
        return f"on another machine, so it may be running or not; last written {age(time.time() - written)} ago"
    if status not in ("failed", "interrupted", KILLED):
        return ""
    notes = ["its process is gone" if status == KILLED else record.failure]
    if "resume" in settings.names(settings.COMMANDS[record.command]):
        is_saved = record.command in SEVERAL or checkpoints.last_step(folder / CHECKPOINTS) is not None
        command = command_line(folder, record.command, "--resume")
        notes.append(f"to continue: {command}" if is_saved else "nothing saved yet")
    return "; ".join(filter(None, notes))


def last_row(path: Path) -> dict[str, Any]:
    """The last complete row of a step in `metrics.jsonl`, by reading only the file's end; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    rows = valid_rows(reversed(lines))  # without lines that are still being written or cut off where reading began
    return next((row for row in rows if isinstance(row.get("step"), int)), {})


def total_of(record: RunRecord, steps: int, last: Mapping[str, Any]) -> int | None:
    """Steps that a run will have at its end; None if unknown, or if the command consists of several runs."""
    if record.command in SEVERAL:
        return None
    if record.status == "finished":
        return steps
    asked, epochs, epoch = record.settings.get("max_steps"), record.settings.get("num_train_epochs"), last.get("epoch")
    if asked is not None:
        return int(asked)
    return round(last["step"] * epochs / epoch) if epochs and epoch else None


def metric_of(stage: str, values: Mapping[str, Any]) -> tuple[str, float] | None:
    """The key figure of a stage, if the run has one yet."""
    for name in metrics.judged_by(stage):
        value = values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return name, float(value)
    return None


def model_of(record: RunRecord) -> str:
    """The base's name without its folder or organisation."""
    name = str(record.model.get("base") or record.settings.get("model") or coffee.NAME)
    return printable("coffee" if name == coffee.NAME else Path(name).name or name)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, each counted once; links are not followed."""
    sizes: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(place, name))
            except OSError:
                continue  # just deleted or renamed
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def arranged(rows: Sequence[Row], top: Path) -> list[Line]:
    """The rows, newest last; runs inside another run come below it."""
    folders = {row.folder for row in rows}
    inside: dict[Path | None, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.started, str(row.folder))):
        holder = next((place for place in row.folder.parents if place in folders), None)
        inside.setdefault(holder, []).append(row)

    def below(holder: Path | None, depth: int) -> Iterator[Line]:
        for row in inside.get(holder, ()):
            path, above = row.folder, holder or top
            name = str(path.relative_to(above)) if path != above else path.resolve().name or str(path)
            yield Line(row, printable(name), depth)
            yield from below(row.folder, depth + 1)

    return list(below(None, 0))


def text(rows: Sequence[Row], top: Path, now: float, width: int | None) -> str:
    """The runs as a table, cut to `width` if given, and below it notes about some of them."""
    if not rows:
        return f"No runs in {top}."
    lines = arranged(rows, top)
    cells = [cells_of(line, now) for line in lines]
    table = plain_table(HEADER, cells if width is None else fitted(cells, width), LEFT)
    notes = [f"{line.row.folder}: {line.row.status}: {line.row.note}" for line in lines if line.row.note]
    if not notes:
        return table
    if len(notes) > NOTES:
        notes = [f"… and {len(notes) - NOTES} more: see --json", *notes[-NOTES:]]
    return "\n".join([table, "", *notes])


def cells_of(line: Line, now: float) -> list[str]:
    row = line.row
    metric = "-" if row.metric is None else f"{metrics.words(row.metric[0])} {summary.figure(*row.metric)}"
    started = "?" if row.started < FIRST else age(now - row.started)
    name = "  " * line.depth + line.name
    return [name, row.stage or "-", row.status, row.model or "-", steps_of(row), metric, started, size(row.size)]


def steps_of(row: Row) -> str:
    """Steps done and in total: `12/40`."""
    if not row.steps and not row.total:
        return "-"
    return f"{row.steps or 0:,}/{'?' if row.total is None else f'{row.total:,}'}"


def fitted(rows: list[list[str]], width: int) -> list[list[str]]:
    """The cells with long names cut so that the table fits `width` columns, if possible. rich's Table would drop the
    last columns on a narrow terminal: it applies minimum widths only after shrinking."""
    for column, least in CUT:
        widths = [max(map(len, cells)) for cells in zip(HEADER, *rows, strict=True)]
        excess = sum(widths) + 2 * (len(widths) - 1) - width
        if excess > 0:
            limit = max(least, widths[column] - excess)
            rows = [[*row[:column], clip(row[column], limit), *row[column + 1 :]] for row in rows]
    return rows


def printable(value: str) -> str:
    """Text in one line without control characters: a record can come from anywhere."""
    return one_line("".join(letter if letter.isprintable() else " " for letter in value))[:300]


def age(seconds: float) -> str:
    """A time span in one unit: `40 s`, `3 h`; `0 s` if it is negative because the clock was set."""
    span = max(0.0, seconds)
    return next(f"{span // unit:.0f} {word}" for least, unit, word in AGES if span >= least)


def as_dict(line: Line, now: float) -> dict[str, object]:
    """A run as `--json` prints it."""
    row = line.row
    value = None if row.metric is None or not math.isfinite(row.metric[1]) else row.metric[1]
    age_seconds = None if row.started < FIRST else round(max(0.0, now - row.started), 1)
    place = {"folder": str(row.folder), "name": line.name, "depth": line.depth, "stage": row.stage or None}
    state = {"status": row.status, "note": row.note or None, "model": row.model or None}
    figures = {"steps": row.steps, "total_steps": row.total, "metric": row.metric and row.metric[0], "value": value}
    return place | state | figures | {"started": row.started, "bytes": row.size, "age_seconds": age_seconds}

"""Writes a comparison report in all its forms: JSON, Markdown, CSV, pictures and one HTML page."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from perlcli.comparison import results
from perlcli.comparison.render import pictures, tables, words
from perlcli.comparison.render.pictures import Picture
from perlcli.comparison.results import ArmResult, Comparison, Report, RunFigures
from perlcli.redaction import hidden_in
from perlcli.run.files import write_whole
from perlcli.text import inline, markdown_table, one_line

MARKDOWN, PAGE, ARMS, RUNS = "report.md", "report.html", "report.csv", "report-runs.csv"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
PARAMETERS = ("trainable_parameters", "total_parameters")
OF_ARMS = ("model", "kind", "precision", "rank", "learning_rate", "is_baseline", "failure", *PARAMETERS, "predicted_mb")
OF_RUNS = ("folder", "status", "failure", "seed", "repeat", "steps", *PARAMETERS)
SIZES = ("memory_mb", "reserved_mb", "weights_bytes", "optimizer_bytes")
SPREADS = ("memory_mb", "reserved_mb", "steps_per_second", "tokens_per_second")
RATIOS = ("memory", "reserved", "speed", "cpu_speed", "tokens_per_second", "trainable", "weights", "optimizer")
FORMULA = ("=", "+", "-", "@")  # what a formula starts with in a spreadsheet

Cell = str | float | None
Row = dict[str, Cell]


def write_all(report: Report, folder: Path) -> None:
    """Write every form of the report into the folder that its runs' folders are relative to."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / results.REPORT, [results.write(report)])
    render(report, folder)


def render(report: Report, folder: Path) -> None:
    """Write every form but the JSON, which the report was read from."""
    report = hidden_in(report)
    drawn = pictures.draw(report, folder)
    write_whole(folder / MARKDOWN, [markdown(report, drawn)])
    write_whole(folder / ARMS, [arms_csv(report)])
    write_whole(folder / RUNS, [runs_csv(report)])
    write_whole(folder / PAGE, [page(report, folder, drawn)])


def markdown(report: Report, drawn: Sequence[Picture] = ()) -> str:
    """The report as Markdown, with links to the pictures."""
    return "\n".join(_lines(report, drawn)) + "\n"


def _lines(report: Report, drawn: Sequence[Picture]) -> Iterator[str]:
    yield from (f"# {inline(words.title(report))}", "")
    state = words.state(report)
    if state:
        yield from (f"**{inline(state)}**", "")
    yield from _table(tables.pipeline(report), tables.PIPELINE_LINE + "\n")
    for comparison in report.comparisons:
        yield from _chapter(comparison, [picture for picture in drawn if picture.stage == comparison.stage])
    yield from ("## How it was measured", "", *(f"- {inline(line)}" for line in words.method(report)), "")
    yield from (f"- {name}: {inline(value)}" for name, value in words.facts(report))
    yield from ("", "## How to repeat it", "", "```console")
    commands = [command.replace("```", "'''") for command in words.commands(report)]  # none ends the block of code
    yield from (f"$ {one_line(command)}" for command in commands)
    yield "```"


def _chapter(comparison: Comparison, drawn: Sequence[Picture]) -> Iterator[str]:
    notes, _ = tables.footnotes(comparison)
    further = tables.further_columns(comparison)
    yield from (f"## {words.STAGES.get(comparison.stage, comparison.stage)}", "")
    yield from (inline(words.headline(comparison)), "")
    yield from (f"- {inline(line)}" for line in tables.verdicts(comparison))
    yield ""
    yield from _table(tables.grid(comparison, tables.main_columns(comparison)))
    yield from (f"{number}. {inline(note)}" for number, note in enumerate(notes, 1))
    if notes:
        yield ""
    if further:
        yield from _table(tables.grid(comparison, further))
    yield from _table(tables.phases(comparison))
    yield from _table(tables.paper(comparison), tables.PAPER_LINE)
    yield from (f"> **Warning.** {inline(warning)}\n" for warning in comparison.warnings)
    for picture in drawn:
        yield from (f"![{inline(picture.caption)}]({picture.path})", "")
    common = tables.common(comparison)
    if common:
        yield from (
            f"### {words.how_title(comparison)}",
            "",
            *(f"- {inline(name)}: {inline(value)}" for name, value in common),
            "",
        )
    yield from _table(tables.how(comparison))
    yield from _markdown_samples(comparison)
    yield from _list("Notes of the runs", tables.notes(comparison))


def _list(title: str, lines: Sequence[str]) -> Iterator[str]:
    """Sentences as a list below a heading; nothing without any."""
    if lines:
        yield from (f"### {title}", "", *(f"- {inline(line)}" for line in lines), "")


def _markdown_samples(comparison: Comparison) -> Iterator[str]:
    """Samples side by side: a table of who wrote what, with the score, for each prompt."""
    samples = tables.samples(comparison)
    if samples:
        yield from ("### Samples", "")
    for sample in samples:
        if sample.prompt:
            yield from (f"Prompt: {inline(sample.prompt)}", "")
        yield from _table(sample.table)


def _table(table: tables.Table, title: str = "") -> Iterator[str]:
    """A table below its title, the first column left and the others right aligned; nothing without rows."""
    header, rows = table
    if rows and title:
        yield from (title, "")
    if rows:
        yield from (markdown_table([*map(inline, header)], [[*map(inline, row)] for row in rows], left=1), "")


@dataclass(frozen=True)
class ArmRow:
    """A row of the arms' tables in HTML."""

    label: str
    arm: ArmResult
    notes: list[int]  # the numbers of its remarks
    style: str  # the class of the row: failed, best or none


def page(report: Report, folder: Path, drawn: Sequence[Picture]) -> str:
    """The report as a page that needs nothing else, no script, no font, no picture from outside: the pictures of the
    folder are inside. Every text of its content is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        pictures=drawn,
        words=words,
        tables=tables,
        arm_rows=_arm_rows,
        encoded=lambda picture: base64.b64encode((folder / picture.path).read_bytes()).decode("ascii"),
    )


def _arm_rows(comparison: Comparison) -> list[ArmRow]:
    """The arms, with the headline's marked as the best if there are others."""
    _, marks = tables.footnotes(comparison)
    best = words.chosen(comparison) if len(marks) > 1 else None
    rows = []
    for label, arm, notes in zip(words.labels(comparison.arms), comparison.arms, marks, strict=True):
        style = "best" if arm is best else ""
        rows.append(ArmRow(label, arm, notes, "failed" if arm.failure else style))
    return rows


def arms_csv(report: Report) -> str:
    """A row per arm, its figures as plain numbers."""
    arms = [(comparison.stage, arm) for comparison in report.comparisons for arm in comparison.arms]
    names = list(dict.fromkeys(name for _, arm in arms for name in arm.quality))
    return _csv([_arm_row(stage, arm, names) for stage, arm in arms])


def _arm_row(stage: str, arm: ArmResult, qualities: Iterable[str]) -> Row:
    row: Row = {"stage": stage, "arm": arm.name} | {name: getattr(arm, name) for name in OF_ARMS}
    spreads = {name: getattr(arm, name) for name in SPREADS} | {name: arm.quality.get(name) for name in qualities}
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
    row |= {name: getattr(run, name) for name in (*OF_RUNS, *SIZES, "command")}
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

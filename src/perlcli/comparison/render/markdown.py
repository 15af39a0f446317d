"""A comparison report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from perlcli.comparison.render import tables, words
from perlcli.comparison.render.pictures import Picture
from perlcli.comparison.results import Comparison, Report
from perlcli.text import inline, markdown_table, one_line


def text(report: Report, pictures: Sequence[Picture] = ()) -> str:
    """The report as Markdown, with links to the pictures."""
    return "\n".join(_lines(report, pictures)) + "\n"


def _lines(report: Report, pictures: Sequence[Picture]) -> Iterator[str]:
    yield from (f"# {inline(words.title(report))}", "")
    state = words.state(report)
    if state:
        yield from (f"**{inline(state)}**", "")
    for comparison in report.comparisons:
        yield from _chapter(comparison, [picture for picture in pictures if picture.stage == comparison.stage])
    yield from ("## How it was measured", "", *(f"- {inline(line)}" for line in words.method(report)), "")
    yield from (f"- {name}: {inline(value)}" for name, value in words.facts(report))
    yield from ("", "## How to repeat it", "", "```console")
    yield from (f"$ {command}" for command in _fenced(words.commands(report)))
    yield "```"


def _chapter(comparison: Comparison, pictures: Sequence[Picture]) -> Iterator[str]:
    """The part about one comparison, line by line."""
    notes, _ = tables.footnotes(comparison)
    further = tables.further_columns(comparison)
    yield from (f"## {words.STAGES.get(comparison.stage, comparison.stage)}", "")
    yield from (inline(words.headline(comparison)), "")
    yield from _table(tables.grid(comparison, tables.main_columns(comparison)))
    yield from (f"{number}. {inline(note)}" for number, note in enumerate(notes, 1))
    if notes:
        yield ""
    if further:
        yield from _table(tables.grid(comparison, further))
    yield from _table(tables.phases(comparison))
    yield from _table(tables.paper(comparison), tables.PAPER_LINE)
    yield from (f"> **Warning.** {inline(warning)}\n" for warning in comparison.warnings)
    for picture in pictures:
        yield from (f"![{inline(picture.caption)}]({picture.path})", "")
    common = tables.common(comparison)
    if common:
        yield from (inline(common), "")
    yield from _table(tables.how(comparison))


def _table(table: tables.Table, title: str = "") -> Iterator[str]:
    """A table below its title, the first column left and the others right aligned; nothing without rows."""
    header, rows = table
    if not rows:
        return
    if title:
        yield from (title, "")
    yield from (markdown_table([*map(inline, header)], [[*map(inline, row)] for row in rows], left=1), "")


def _fenced(lines: Iterable[str]) -> list[str]:
    """Lines that can't end the block of code that they are in."""
    return [one_line(line.replace("```", "'''")) for line in lines]

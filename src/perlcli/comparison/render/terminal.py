"""A comparison report as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from perlcli.comparison.render import tables, words
from perlcli.comparison.render.tables import Column
from perlcli.comparison.results import ArmResult, Comparison, Report
from perlcli.text import clip, clip_middle, one_line, plain_table

WIDTH = 100
NAME = 34  # per cent of a terminal's width that a name may take
SHORT = 60  # longest failure that is shown in the table


def text(report: Report, width: int = WIDTH) -> str:
    """The report in lines of at most `width` columns, as far as names and figures can be cut to that."""
    parts = [_section(comparison, width) for comparison in report.comparisons]
    header, rows = tables.pipeline(report)
    if rows:
        parts.insert(0, f"{tables.PIPELINE_LINE}\n{_narrow(header, rows, width)}")
    state = words.state(report)
    if state:
        parts.insert(0, _wrapped(state, width))
    return "\n\n".join(parts)


def _section(comparison: Comparison, width: int) -> str:
    notes, _ = tables.footnotes(comparison, SHORT)
    stage = words.STAGES.get(comparison.stage, comparison.stage)
    parts = [
        f"{stage}\n{_wrapped(words.headline(comparison), width)}",
        "\n".join([_arms(comparison, width), *(_wrapped(note, width, f"[{n}] ") for n, note in enumerate(notes, 1))]),
        "\n".join(_wrapped(verdict, width, "- ") for verdict in tables.verdicts(comparison)),
        _phases(comparison, width),
        _paper(comparison),
        _setup(comparison, width),
        _samples(comparison, width),
        "\n".join(_wrapped(warning, width, "Warning: ") for warning in comparison.warnings),
    ]
    return "\n\n".join(filter(None, parts))


def _narrow(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """A table without as many of its last columns as the width takes."""
    count = len(header)
    while count > 2 and max(map(len, plain_table(header[:count], [row[:count] for row in rows]).splitlines())) > width:
        count -= 1
    return plain_table(header[:count], [row[:count] for row in rows])


def _setup(comparison: Comparison, width: int) -> str:
    """How the arms ran: what they share, then for each other setting its values with the arms that have them."""
    shared, (header, rows) = tables.common(comparison), tables.how(comparison)
    lines = [(name, value) for name, value in shared]
    for place, name in enumerate(header[1:], 1):
        groups: dict[str, list[str]] = {}
        for row in rows:
            groups.setdefault(row[place], []).append(row[0])
        lines.append((name, "; ".join(f"{value}: {', '.join(arms)}" for value, arms in groups.items())))
    longest = max((len(name) for name, _ in lines), default=0)
    return "\n".join(_wrapped(value, width, f"{name.ljust(longest)}  ") for name, value in lines)


def _samples(comparison: Comparison, width: int) -> str:
    """One prompt with its answers, cut to two lines each."""
    lines = []
    for sample in tables.samples(comparison)[:1]:
        prompt = [_wrapped(clip(one_line(sample.prompt), 2 * width), width, "prompt: ")] if sample.prompt else []
        lines += [*prompt, *(_answer(*answer, width) for answer in sample.answers)]
    return "\n".join(lines)


def _answer(who: str, text: str, score: str, width: int) -> str:
    start = f"  {who} ({score}): " if score else f"  {who}: "
    return _wrapped(clip_middle(one_line(text), max(40, 2 * width - 2 * len(start))), width, start)


def _wrapped(text: str, width: int, first: str = "") -> str:
    """The text in lines, the first after `first` and the others indented as far."""
    rest = " " * len(first)
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _arms(comparison: Comparison, width: int) -> str:
    """The arms' table with as many columns as fit, and a failure in place of an arm's figures."""
    names = _names(comparison, width)
    head, *lines = _fitting(comparison, names, width)
    start = max(map(len, names), default=0) + 2
    for place, (name, arm) in enumerate(zip(names, comparison.arms, strict=True)):
        if arm.failure:
            lines[place] = name.ljust(start) + clip(words.failure(arm), max(20, min(SHORT, width - start)))
    return "\n".join(filter(None, (head, *lines)))


def _fitting(comparison: Comparison, names: Sequence[str], width: int) -> list[str]:
    """The table's head and a line per arm; without any figure, an empty head."""
    kept = tables.columns(comparison)
    while kept:
        rows = [
            [name, *(_cell(column, arm) for column in kept)] for name, arm in zip(names, comparison.arms, strict=True)
        ]
        lines = plain_table(["", *(column.head for column in kept)], rows).splitlines()
        highest = max(column.rank for column in kept)
        if max(map(len, lines)) <= width or highest == 0:
            return ["\n".join(lines[:2]), *lines[2:]]
        kept = [column for column in kept if column.rank != highest]
    return ["", *names]


def _names(comparison: Comparison, width: int) -> list[str]:
    """The first column: the arms' names with the numbers of their remarks."""
    _, marks = tables.footnotes(comparison, SHORT)
    labels = [clip_middle(label, width * NAME // 100) for label in words.labels(comparison.arms)]
    return [label + "".join(f" [{n}]" for n in numbers) for label, numbers in zip(labels, marks, strict=True)]


def _cell(column: Column, arm: ArmResult) -> str:
    """A figure, with its interval only for the metric that the stage is judged by."""
    if arm.failure:
        return ""
    cell, detail = column.cell(arm), column.detail(arm)
    if column.rank == 0 and cell.endswith("%") and " to " in detail:
        return f"{cell} ({detail})"
    return cell or words.NONE


def _phases(comparison: Comparison, width: int) -> str:
    header, rows = tables.phases(comparison)
    short = [[clip_middle(name, width * NAME // 100), *cells] for name, *cells in rows]
    return plain_table(header, short) if rows else ""


def _paper(comparison: Comparison) -> str:
    header, rows = tables.paper(comparison)
    return f"{tables.PAPER_LINE}\n{plain_table(header, rows)}" if rows else ""

"""A comparison report as tables: on a terminal, in Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from perlcli.comparison.render import words
from perlcli.comparison.results import FULL, Arm, Comparison, Report, RunFigures, Spread, speed_of
from perlcli.run import metrics
from perlcli.text import clip, clip_middle, inline, markdown_table, megabytes, number, one_line, plain_table, size

WIDTH = 100
NAME = 34  # per cent of a terminal's width that a name may take
FURTHER = 5  # columns of a higher rank stand in a document's second table
FORMULA = ("=", "+", "-", "@")  # what a formula begins with in a spreadsheet
SHORT = 60  # the longest failure that stands in a terminal's table
RATIOS = ("memory", "reserved", "speed", "cpu_speed", "tokens_per_second", "trainable", "weights", "optimizer")
SPREADS = ("memory_mb", "reserved_mb", "steps_per_second", "tokens_per_second")

Cell = Callable[[Arm], str]


@dataclass(frozen=True)
class Column:
    """A column of the arms' table: its figure, what stands small beside it, when a narrow terminal leaves it out."""

    head: str
    cell: Cell
    detail: Cell = lambda arm: ""
    rank: int = 0  # a narrow terminal leaves out the highest first, and 0 never


def columns(comparison: Comparison) -> list[Column]:
    """The columns that at least one arm of the comparison has something in."""
    whole = words.baseline_word(comparison)
    known = [
        Column("trained", lambda arm: _told(words.count, arm.trainable_parameters or None), _trained_share, rank=4),
        Column("memory", lambda arm: _spread(megabytes, arm.memory_mb), _memory_detail),
        Column(f"of {whole}", lambda arm: _told(words.share, arm.ratios.get("memory"))),
        Column("predicted", lambda arm: _told(megabytes, arm.predicted_mb), rank=2),
        Column("steps/s", lambda arm: _spread(number, arm.steps_per_second), _speed_detail, rank=3),
        Column("speed", lambda arm: _told(words.times, speed_of(arm)), _both_speeds),
        Column("tokens/s", lambda arm: _spread(number, arm.tokens_per_second), rank=5),
        *_quality_columns(comparison.stage),
        Column("weights", lambda arm: _bytes(arm, "weights_bytes"), lambda arm: _of(arm, "weights"), rank=8),
        Column("optimizer", lambda arm: _bytes(arm, "optimizer_bytes"), lambda arm: _of(arm, "optimizer"), rank=9),
    ]
    return [column for column in known if any(column.cell(arm) for arm in comparison.arms)]


def _quality_columns(stage: str) -> list[Column]:
    names = [metric.name for metric in metrics.compared(stage)]

    def column(name: str, place: int) -> Column:
        return Column(
            metrics.words(name),
            lambda arm: words.quality(name, arm.quality[name]) if name in arm.quality else "",
            lambda arm: words.interval(name, arm.quality[name]) if name in arm.quality else "",
            rank=place and 5 + place,
        )

    return [column(name, place) for place, name in enumerate(names)]


def _told(word: Callable[[float], str], value: float | None) -> str:
    return "" if value is None else word(value)


def _spread(word: Callable[[float], str], found: Spread | None) -> str:
    return "" if found is None else word(found.value)


def _range(word: Callable[[float], str], found: Spread | None) -> str:
    return "" if found is None or found.low == found.high else f"{word(found.low)} to {word(found.high)}"


def _memory_detail(arm: Arm) -> str:
    reserved = f"{megabytes(arm.reserved_mb.value)} reserved" if arm.reserved_mb else ""
    return "; ".join(filter(None, (_range(megabytes, arm.memory_mb), reserved)))


def _speed_detail(arm: Arm) -> str:
    return _range(number, arm.steps_per_second)


def _both_speeds(arm: Arm) -> str:
    """On a CPU: the ratio by the clock, and by the processors' time, which neighbours on the machine disturb less."""
    by_clock, by_cpu = arm.ratios.get("speed"), arm.ratios.get("cpu_speed")
    if by_clock is None or by_cpu is None or arm.reserved_mb is not None:
        return ""
    return f"{words.times(by_clock)} by the clock, {words.times(by_cpu)} by CPU time"


def _trained_share(arm: Arm) -> str:
    return f"{arm.trainable_parameters / arm.total_parameters:.2%}" if arm.total_parameters else ""


def _finished(arm: Arm) -> RunFigures | None:
    return next((run for run in arm.runs if run.status == "finished"), None)


def _bytes(arm: Arm, field: str) -> str:
    run = _finished(arm)
    count = getattr(run, field) if run else None
    return "" if count is None else size(count)


def _of(arm: Arm, name: str) -> str:
    return f"{words.share(arm.ratios[name])} of the baseline's" if name in arm.ratios else ""


def footnotes(comparison: Comparison, limit: int | None = None) -> tuple[list[str], list[list[int]]]:
    """The remarks on the arms, each once, and for each arm the numbers of its own; with failures above `limit`."""
    known: dict[str, int] = {}
    marks = []
    for arm in comparison.arms:
        cut = [arm.failure] if limit is not None and arm.failure and len(arm.failure) > limit else []
        marks.append([known.setdefault(text, len(known) + 1) for text in (*arm.remarks, *cut)])
    return list(known), marks


def terminal(report: Report, width: int = WIDTH) -> str:
    """The report as text of at most `width` columns, as far as names and figures can be cut to that."""
    parts = [_wrapped(words.state(report), width)] if words.state(report) else []
    for comparison in report.comparisons:
        parts += [_section(comparison, width)]
    return "\n\n".join(parts)


def _section(comparison: Comparison, width: int) -> str:
    notes, _ = footnotes(comparison, SHORT)
    parts = [
        f"{words.STAGES.get(comparison.stage, comparison.stage)}\n{_wrapped(words.headline(comparison), width)}",
        "\n".join([_arms(comparison, width), *(_wrapped(note, width, f"[{n}] ") for n, note in enumerate(notes, 1))]),
        _phases_text(comparison, width), _paper_text(comparison),
        "\n".join(_wrapped(warning, width, "Warning: ") for warning in comparison.warnings),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts))


def _wrapped(text: str, width: int, first: str = "") -> str:
    """The text in lines, those after the first indented as far as what stands before the first."""
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _arms(comparison: Comparison, width: int) -> str:
    """The arms' table with as many columns as fit; a failure stands in place of an arm's figures."""
    names = _names(comparison, width)
    head, *lines = _fitting(comparison, names, width)
    start = max(map(len, names), default=0) + 2
    for place, (name, arm) in enumerate(zip(names, comparison.arms, strict=True)):
        if arm.failure:
            told = clip(words.failure(arm), max(20, min(SHORT, width - start)))
            lines[place] = name.ljust(start) + told
    return "\n".join(filter(None, (head, *lines)))


def _fitting(comparison: Comparison, names: Sequence[str], width: int) -> list[str]:
    """The table's head and a line per arm; without any figure, no head."""
    kept = columns(comparison)
    while kept:
        rows = [[name, *(_plain(column, arm) for column in kept)]
                for name, arm in zip(names, comparison.arms, strict=True)]  # fmt: skip
        lines = plain_table(["", *(column.head for column in kept)], rows).splitlines()
        highest = max(column.rank for column in kept)
        if max(map(len, lines)) <= width or not highest:
            return ["\n".join(lines[:2]), *lines[2:]]
        kept = [column for column in kept if column.rank != highest]
    return ["", *names]


def _names(comparison: Comparison, width: int) -> list[str]:
    """What the arms are called in a terminal's first column, with the numbers of their remarks."""
    _, marks = footnotes(comparison, SHORT)
    labels = words.labels(comparison.arms)
    return [
        clip_middle(label, width * NAME // 100) + "".join(f" [{number}]" for number in numbers)
        for label, numbers in zip(labels, marks, strict=True)
    ]


def _plain(column: Column, arm: Arm) -> str:
    """A cell on a terminal: only the figure of quality that a stage is judged by has its interval beside it."""
    cell = column.cell(arm)
    if arm.failure:
        return ""
    detail = column.detail(arm) if column.rank == 0 and " to " in column.detail(arm) and cell.endswith("%") else ""
    return f"{cell} ({detail})" if detail else cell or words.NONE


def phases(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Where a step's time goes, per arm that tells: header and rows; no rows where none does."""
    rows = []
    for label, arm in zip(words.labels(comparison.arms), comparison.arms, strict=True):
        spent = spent_phases(arm)
        whole = sum(spent.values())
        if whole:
            cells = [f"{number(spent[name])} ({spent[name] / whole:.0%})" for name in words.PHASES]
            rows.append([label, number(whole), *cells])
    return ["seconds a step", "in all", *words.PHASES], rows


def spent_phases(arm: Arm) -> dict[str, float]:
    """Mean seconds a step that the arm's finished runs spent on each phase; empty where they don't tell."""
    runs = [run.phases for run in arm.runs if run.status == "finished" and set(words.PHASES) <= set(run.phases)]
    return {name: sum(run[name] for run in runs) / len(runs) for name in words.PHASES} if runs else {}


def _phases_text(comparison: Comparison, width: int) -> str:
    header, rows = phases(comparison)
    return plain_table(header, [[clip_middle(row[0], width * NAME // 100), *row[1:]] for row in rows]) if rows else ""


def paper(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The paper's ratios of LoRA to full tuning, by task: header and rows; no rows where it has none."""
    told = {"memory": lambda value: f"{value * 100:.3g}%", "speed": lambda value: f"{value:g}x"}  # as it prints them
    tasks = list(dict.fromkeys(task for values in comparison.paper.values() for task in values))
    rows = [
        [what, *(_told(told.get(what, number), values.get(task)) or words.NONE for task in tasks)]
        for what, values in comparison.paper.items()
    ]
    return ["", *tasks], rows


PAPER_LINE = "The paper, LoRA to full (arXiv 2403.10704, Table 1; PaLM 2 and Gemini Pro):"


def paper_beside(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The paper's ratios behind those of the arm that stands for the comparison; no rows without ratios to full."""
    arm = words.chosen(comparison)
    header, rows = paper(comparison)
    if arm is None or not arm.ratios or words.baseline_word(comparison) != FULL:
        return header, []
    told = {"memory": _told(words.share, arm.ratios.get("memory")), "speed": _told(words.times, speed_of(arm))}
    here = {name: word or words.NONE for name, word in told.items()}
    return ["", f"{arm.name} here", *header[1:]], [[row[0], here[row[0]], *row[1:]] for row in rows]


def _paper_text(comparison: Comparison) -> str:
    header, rows = paper_beside(comparison)
    return f"{PAPER_LINE}\n{plain_table(header, rows)}" if rows else ""


def runs(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Each run with how it ended and what it took: header and rows."""
    rows = []
    for label, arm in zip(words.labels(comparison.arms), comparison.arms, strict=True):
        for run in arm.runs:
            step = f"{number(median(run.step_seconds))} s" if run.step_seconds else words.NONE
            memory = _told(megabytes, run.memory_mb) or words.NONE
            rows.append([run.folder, label, str(run.seed), run.failure or run.status, memory, step])
    return ["folder", "arm", "seed", "ended", "memory", "a step"], rows


def markdown(report: Report, pictures: Sequence[tuple[str, str, str]] = ()) -> str:
    """The report as Markdown; `pictures` are (stage, path, caption)."""
    lines = [f"# {inline(words.title(report))}", ""]
    lines += [f"**{inline(words.state(report))}**", ""] if words.state(report) else []
    for comparison in report.comparisons:
        lines += [*_chapter(comparison, [item for item in pictures if item[0] == comparison.stage])]
    lines += ["## How it was measured", "", *(f"- {inline(line)}" for line in words.method(report)), ""]
    lines += [f"- {name}: {inline(value)}" for name, value in words.facts(report)]
    lines += ["", "## To have it again", "", "```console", *(f"$ {c}" for c in _fenced(words.commands(report))), "```"]
    return "\n".join(lines) + "\n"


def _chapter(comparison: Comparison, pictures: Sequence[tuple[str, str, str]]) -> Iterable[str]:
    """A comparison's part of the Markdown, line by line."""
    notes, _ = footnotes(comparison)
    header, rows = grid(comparison, main_columns(comparison))
    yield from (f"## {words.STAGES.get(comparison.stage, comparison.stage)}", "")
    yield from (inline(words.headline(comparison)), "", _table(header, rows), "")
    yield from (f"{number}. {inline(note)}" for number, note in enumerate(notes, 1))
    yield from [""] if notes else []
    further = further_columns(comparison)
    for header, rows in (grid(comparison, further) if further else ([], []), phases(comparison)):
        yield from [_table(header, rows), ""] if rows else []
    header, rows = paper_beside(comparison)
    yield from [PAPER_LINE, "", _table(header, rows), ""] if rows else []
    yield from (f"> **Warning.** {inline(warning)}\n" for warning in comparison.warnings)
    for _, path, caption in pictures:
        yield from (f"![{inline(caption)}]({path})", "")
    header, rows = how(comparison)
    yield from [inline(common(comparison)), ""] if common(comparison) else []
    yield from [_table(header, rows), ""] if rows else []


def main_columns(comparison: Comparison) -> list[Column]:
    """What the first table of a document holds."""
    return [column for column in columns(comparison) if column.rank <= FURTHER]


def further_columns(comparison: Comparison) -> list[Column]:
    """What a second table holds: more figures of quality, bytes on disk."""
    return [column for column in columns(comparison) if column.rank > FURTHER]


def grid(comparison: Comparison, kept: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """The arms' table with these columns, details in brackets, failures in the first cell of figures."""
    _, marks = footnotes(comparison)
    rows = []
    for label, arm, numbers in zip(words.labels(comparison.arms), comparison.arms, marks, strict=True):
        name = label + "".join(f" [{number}]" for number in numbers)
        cells = [_bracketed(column.cell(arm), column.detail(arm)) for column in kept] or [words.NONE]
        rows.append([name, *([words.failure(arm), *[""] * (len(cells) - 1)] if arm.failure else cells)])
    return ["", *([column.head for column in kept] or ["result"])], rows


def _bracketed(cell: str, detail: str) -> str:
    return f"{cell} ({detail})" if cell and detail else cell or words.NONE


def how(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """How each arm trained, in what they differ: header and rows."""
    found = [words.settings(arm) for arm in comparison.arms]
    names = [name for name in found[0] if len({values[name] for values in found}) > 1] if found else []
    rows = [[label, *(values[name] for name in names)]
            for label, values in zip(words.labels(comparison.arms), found, strict=True)]  # fmt: skip
    return ["", *names], rows if names else []


def common(comparison: Comparison) -> str:
    """How every arm trained, in a line."""
    found = [words.settings(arm) for arm in comparison.arms]
    same = {name: value for name, value in (found[0] if found else {}).items()
            if value != words.NONE and all(values[name] == value for values in found)}  # fmt: skip
    whole = "Every arm: " if len(found) > 1 else ""
    return whole + "; ".join(f"{name} {value}" for name, value in same.items()) + "." if same else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with every cell escaped, the first column aligned left, the others right."""
    return markdown_table([*map(inline, header)], [[*map(inline, row)] for row in rows], left=1)


def _fenced(lines: Iterable[str]) -> list[str]:
    """Lines that can't end the block of code that they stand in."""
    return [one_line(line.replace("```", "'''")) for line in lines]


def arms_csv(report: Report) -> str:
    """A row per arm, its figures as plain numbers."""
    names = list(dict.fromkeys(name for c in report.comparisons for arm in c.arms for name in arm.quality))
    return _csv(_arm_row(comparison.stage, arm, names) for comparison in report.comparisons for arm in comparison.arms)


def _arm_row(stage: str, arm: Arm, qualities: Iterable[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage}
    fields = ("name", "model", "kind", "precision", "rank", "learning_rate", "is_baseline", "failure",
              "trainable_parameters", "total_parameters", "predicted_mb")  # fmt: skip
    row |= {"arm" if name == "name" else name: getattr(arm, name) for name in fields}
    spreads = {name: getattr(arm, name) for name in SPREADS} | {name: arm.quality.get(name) for name in qualities}
    for name, found in spreads.items():
        ends = (None, None, None) if found is None else (found.value, found.low, found.high)
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    row |= {f"ratio_{name}": arm.ratios.get(name) for name in RATIOS}
    return row | {"may_be_chance": arm.may_be_chance, "runs": len(arm.runs), "remarks": "; ".join(arm.remarks)}


def runs_csv(report: Report) -> str:
    """A row per run, its figures as plain numbers."""
    runs = [(c.stage, arm, run) for c in report.comparisons for arm in c.arms for run in arm.runs]
    names = list(dict.fromkeys(name for _, _, run in runs for name in run.metrics))
    return _csv(_run_row(stage, arm, run, names) for stage, arm, run in runs)


def _run_row(stage: str, arm: Arm, run: RunFigures, names: Iterable[str]) -> dict[str, Any]:
    fields = ("folder", "status", "failure", "seed", "repeat", "steps", "trainable_parameters", "total_parameters",
              "memory_mb", "reserved_mb", "weights_bytes", "optimizer_bytes", "command")  # fmt: skip
    row = {"stage": stage, "arm": arm.name, "model": arm.model} | {name: getattr(run, name) for name in fields}
    row["median_step_seconds"] = median(run.step_seconds) if run.step_seconds else None
    row |= {f"seconds_{name}": run.phases.get(name) for name in words.PHASES}
    return row | {f"metric_{name}": run.metrics.get(name) for name in names}


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    found = list(rows)
    text = io.StringIO()
    if found:
        writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _no_formula(value) for name, value in row.items()} for row in found)
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    """A cell that a spreadsheet takes for what it is: text in one line, behind an apostrophe if it would compute."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.startswith(FORMULA) else text

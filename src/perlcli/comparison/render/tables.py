"""The tables of a comparison report as headers and rows, whichever form they are shown in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from perlcli.arms import FULL
from perlcli.comparison.contrasts import speed_of
from perlcli.comparison.render import words
from perlcli.comparison.results import ArmResult, Comparison, Spread
from perlcli.run import metrics
from perlcli.text import megabytes, number, size

FURTHER = 5  # columns of a higher rank go into a document's second table
PAPER_LINE = "In the paper, LoRA to full (arXiv 2403.10704, Table 1; PaLM 2 and Gemini Pro):"

Cell = Callable[[ArmResult], str]
Table = tuple[list[str], list[list[str]]]  # header and rows


@dataclass(frozen=True)
class Column:
    """A column of the arms' table."""

    head: str
    cell: Cell
    detail: Cell = lambda arm: ""  # shown small, or in brackets
    rank: int = 0  # a narrow terminal leaves out the highest first, and 0 never


def columns(comparison: Comparison) -> list[Column]:
    """The columns that at least one arm of the comparison has a figure for."""
    baseline = words.baseline_word(comparison)
    names = [metric.name for metric in metrics.compared(comparison.stage)]
    qualities = [name for name in names if any(name in arm.quality for arm in comparison.arms)]
    known = [
        Column("trained", lambda arm: _worded(words.count, arm.trainable_parameters or None), _trained_share, rank=4),
        Column("memory", lambda arm: _value(megabytes, arm.memory_mb), _memory_detail),
        Column(f"of {baseline}", lambda arm: _worded(words.share, arm.ratios.get("memory"))),
        Column("predicted", lambda arm: _worded(megabytes, arm.predicted_mb), rank=2),
        Column(
            "steps/s",
            lambda arm: _value(number, arm.steps_per_second),
            lambda arm: _range(number, arm.steps_per_second),
            rank=3,
        ),
        Column("speed", lambda arm: _worded(words.times, speed_of(arm)), _both_speeds),
        Column("tokens/s", lambda arm: _value(number, arm.tokens_per_second), rank=5),
        *[_quality_column(name, place) for place, name in enumerate(qualities)],
        Column("weights", _weights_size, lambda arm: _of_baseline(arm, "weights"), rank=8),
        Column("optimizer", _optimizer_size, lambda arm: _of_baseline(arm, "optimizer"), rank=9),
    ]
    return [column for column in known if any(column.cell(arm) for arm in comparison.arms)]


def _quality_column(name: str, place: int) -> Column:
    """The column of a quality metric; only the first one, at place 0, is always shown."""
    figure = functools.partial(words.quality, name)
    return Column(
        metrics.words(name),
        lambda arm: _value(figure, arm.quality.get(name)),
        lambda arm: _range(figure, arm.quality.get(name)),
        rank=5 + place if place else 0,
    )


def _worded(word: Callable[[float], str], value: float | None) -> str:
    return "" if value is None else word(value)


def _value(word: Callable[[float], str], spread: Spread | None) -> str:
    return "" if spread is None else word(spread.value)


def _range(word: Callable[[float], str], spread: Spread | None) -> str:
    return "" if spread is None or spread.low == spread.high else f"{word(spread.low)} to {word(spread.high)}"


def _trained_share(arm: ArmResult) -> str:
    return f"{arm.trainable_parameters / arm.total_parameters:.2%}" if arm.total_parameters else ""


def _memory_detail(arm: ArmResult) -> str:
    reserved = f"{megabytes(arm.reserved_mb.value)} reserved" if arm.reserved_mb else ""
    return "; ".join(filter(None, (_range(megabytes, arm.memory_mb), reserved)))


def _both_speeds(arm: ArmResult) -> str:
    """On a CPU: the ratio by the clock and by CPU time, which other work on the machine disturbs less."""
    by_clock, by_cpu = arm.ratios.get("speed"), arm.ratios.get("cpu_speed")
    if by_clock is None or by_cpu is None or arm.reserved_mb is not None:
        return ""
    return f"{words.times(by_clock)} by the clock, {words.times(by_cpu)} by CPU time"


def _weights_size(arm: ArmResult) -> str:
    return _worded(size, arm.finished[0].weights_bytes) if arm.finished else ""


def _optimizer_size(arm: ArmResult) -> str:
    return _worded(size, arm.finished[0].optimizer_bytes) if arm.finished else ""


def _of_baseline(arm: ArmResult, name: str) -> str:
    return f"{words.share(arm.ratios[name])} of the baseline's" if name in arm.ratios else ""


def main_columns(comparison: Comparison) -> list[Column]:
    """The columns of a document's first table."""
    return [column for column in columns(comparison) if column.rank <= FURTHER]


def further_columns(comparison: Comparison) -> list[Column]:
    """The columns of a second table: more quality metrics, bytes on disk."""
    return [column for column in columns(comparison) if column.rank > FURTHER]


def footnotes(comparison: Comparison, limit: int | None = None) -> tuple[list[str], list[list[int]]]:
    """The remarks on the arms, each once, and the numbers of each arm's own; with failures longer than `limit`."""
    numbers: dict[str, int] = {}
    marks = []
    for arm in comparison.arms:
        notes = list(arm.remarks)
        if limit is not None and arm.failure and len(arm.failure) > limit:
            notes.append(arm.failure)
        marks.append([numbers.setdefault(note, len(numbers) + 1) for note in notes])
    return list(numbers), marks


def grid(comparison: Comparison, kept: Sequence[Column]) -> Table:
    """The arms' table with these columns, details in brackets, and failures in the first cell of figures."""
    _, marks = footnotes(comparison)
    rows = []
    for label, arm, numbers in zip(words.labels(comparison.arms), comparison.arms, marks, strict=True):
        name = label + "".join(f" [{number}]" for number in numbers)
        cells = [_bracketed(column.cell(arm), column.detail(arm)) for column in kept] or [words.NONE]
        if arm.failure:
            cells = [words.failure(arm), *("" for _ in cells[1:])]
        rows.append([name, *cells])
    return ["", *([column.head for column in kept] or ["result"])], rows


def _bracketed(cell: str, detail: str) -> str:
    return f"{cell} ({detail})" if cell and detail else cell or words.NONE


def phases(comparison: Comparison) -> Table:
    """Where a step's time goes, for each arm that measured it."""
    rows = []
    for label, arm in zip(words.labels(comparison.arms), comparison.arms, strict=True):
        spent = spent_phases(arm)
        total = sum(spent.values())
        if total:
            cells = [f"{number(spent[name])} ({spent[name] / total:.0%})" for name in words.PHASES]
            rows.append([label, number(total), *cells])
    return ["seconds per step", "total", *words.PHASES], rows


def spent_phases(arm: ArmResult) -> dict[str, float]:
    """Mean seconds per step that the arm's finished runs spent on each phase; empty if they didn't measure it."""
    runs = [run.phases for run in arm.finished if set(words.PHASES) <= set(run.phases)]
    return {name: sum(run[name] for run in runs) / len(runs) for name in words.PHASES} if runs else {}


def paper(comparison: Comparison) -> Table:
    """The paper's ratios of LoRA to full tuning by task, after those of the headline's arm. No rows unless the arms are
    compared with full tuning."""
    tasks = list(dict.fromkeys(task for values in comparison.paper.values() for task in values))
    arm = words.chosen(comparison)
    if arm is None or not arm.ratios or words.baseline_word(comparison) != FULL:
        return ["", *tasks], []
    here = {"memory": _worded(words.share, arm.ratios.get("memory")), "speed": _worded(words.times, speed_of(arm))}
    as_printed = {"memory": lambda value: f"{value * 100:.3g}%", "speed": lambda value: f"{value:g}x"}
    rows = []
    for what, values in comparison.paper.items():
        theirs = [_worded(as_printed.get(what, number), values.get(task)) for task in tasks]
        rows.append([what, *(cell or words.NONE for cell in (here.get(what, ""), *theirs))])
    return ["", f"{arm.name} here", *tasks], rows


def runs(comparison: Comparison) -> Table:
    """Each run with how it ended and what it took."""
    rows = []
    for label, arm in zip(words.labels(comparison.arms), comparison.arms, strict=True):
        for run in arm.runs:
            step = f"{number(median(run.step_seconds))} s" if run.step_seconds else words.NONE
            memory = _worded(megabytes, run.memory_mb) or words.NONE
            rows.append([run.folder, label, str(run.seed), run.failure or run.status, memory, step])
    return ["folder", "arm", "seed", "result", "memory", "per step"], rows


def how(comparison: Comparison) -> Table:
    """How each arm trained, as far as they differ."""
    settings = [words.settings(arm) for arm in comparison.arms]
    names = [name for name in settings[0] if len({values[name] for values in settings}) > 1] if settings else []
    labelled = zip(words.labels(comparison.arms), settings, strict=True)
    rows = [[label, *(values[name] for name in names)] for label, values in labelled]
    return ["", *names], rows if names else []


def common(comparison: Comparison) -> str:
    """How every arm trained, in a line."""
    if not comparison.arms:
        return ""
    first, *others = [words.settings(arm) for arm in comparison.arms]
    shared = {name: value for name, value in first.items() if all(values[name] == value for values in others)}
    same = "; ".join(f"{name} {value}" for name, value in shared.items() if value != words.NONE)
    if not same:
        return ""
    return f"Every arm: {same}." if others else f"{same}."

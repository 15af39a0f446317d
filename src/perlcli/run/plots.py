"""Records and metrics as pictures. Pure: no model, no clock."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perlcli.run import metrics
from perlcli.run.files import read_rows, write_whole
from perlcli.run.metrics import Metric

INK, SOFT, ACCENT = "#1f2933", "#9fb3c8", "#1971c2"
COLORS = (ACCENT, "#e8590c", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599", "#b08800", "#5f3dc4", "#868e96", "#212529")


def curves(stage: str, log: Path, target: Path) -> None:
    """Draw a stage's learning curves from its `metrics.jsonl`: each step faint, a running mean strong."""
    rows = read_rows(log)
    panels = [metric for metric in metrics.panels(stage) if _points(rows, metric)]
    if not panels:
        return
    figure, axes = new_figure(len(panels))
    for axis, metric in zip(axes, panels, strict=True):
        steps, values = zip(*_points(rows, metric), strict=True)
        axis.plot(steps, values, color=SOFT, linewidth=1, marker="." if len(steps) < 3 else "")
        axis.plot(steps, smooth(values), color=ACCENT, linewidth=2)
        label_axis(axis, metric.panel, "step", metric.is_share)
    save(figure, target)


def compared(runs: Mapping[str, Sequence[Path]], panels: Sequence[Metric], target: Path) -> None:
    """Draw figures by step for several kinds of runs, from their `metrics.jsonl`: each run thin, a kind's mean strong.
    Metrics that no run has are left out; the mean of a kind ends with its shortest run."""
    logs = {kind: [read_rows(file) for file in files] for kind, files in runs.items()}
    keys = {key for runs in logs.values() for rows in runs for row in rows for key in row if row[key] is not None}
    panels = [metric for metric in panels if metric.key in keys]
    if not panels:
        return
    figure, axes = new_figure(len(panels))
    for axis, metric in zip(axes, panels, strict=True):
        for (kind, runs_of_kind), color in zip(logs.items(), COLORS, strict=False):
            points = [_points(rows, metric) for rows in runs_of_kind]
            _lines(axis, [run for run in points if run], color, kind)
        label_axis(axis, metric.panel, "step", metric.is_share)
    entries = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = min(len(entries), 3)
    figure.legend(list(entries.values()), list(entries), frameon=False, loc="outside lower center", ncols=columns)
    save(figure, target)


def _points(rows: Sequence[Mapping[str, Any]], metric: Metric) -> list[tuple[float, float]]:
    return [(row["step"], row[metric.key]) for row in rows if row.get(metric.key) is not None]


def _lines(axis: Any, runs: Sequence[Sequence[tuple[float, float]]], color: str, kind: str) -> None:
    """Draw a kind's runs as points (step, value), smoothed: each thin, their mean strong."""
    lines = [smooth([value for _, value in points]) for points in runs]
    if not lines:
        return
    for points, line in zip(runs, lines, strict=True):
        axis.plot([step for step, _ in points], line, color=color, linewidth=0.8, alpha=0.35)
    mean = [sum(values) / len(values) for values in zip(*lines, strict=False)]
    steps = [step for step, _ in runs[0]][: len(mean)]
    axis.plot(steps, mean, color=color, linewidth=2, marker="." if len(mean) < 3 else "", label=kind)


def histogram(groups: Mapping[str, Sequence[float]], title: str, label: str, target: Path) -> None:
    """Draw how the scores of two or three groups are spread, on common bins."""
    figure, (axis,) = new_figure(1)
    low, high = min(map(min, groups.values())), max(map(max, groups.values()))
    edges = [low + (high - low or 1) * i / 30 for i in range(31)]
    for (name, values), color in zip(groups.items(), COLORS, strict=False):
        axis.hist(list(values), bins=edges, alpha=0.55, label=f"{name} ({len(values)})", color=color)
    axis.legend(frameon=False)
    label_axis(axis, title, label, is_share=False)
    axis.set_ylabel("rows")
    save(figure, target)


def bars(names: Sequence[str], values: Sequence[float], title: str, target: Path) -> None:
    """Draw shares as bars with their figures on top."""
    figure, (axis,) = new_figure(1)
    drawn = axis.bar(list(names), list(values), color=[SOFT, "#74a9d8", ACCENT][-len(names) :], width=0.6)
    axis.bar_label(drawn, labels=[f"{value:.1%}" for value in values], padding=3, color=INK)
    label_axis(axis, title, "", is_share=True)
    axis.set_ylim(0, 1.08)
    save(figure, target)


def new_figure(count: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels, at most two in a row, and the panels."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    columns = min(count, 2)
    rows = -(-count // columns)
    size = (4.6 * columns if count > 1 else 5.6, 3.1 * rows if rows > 1 else 3.4)  # inches
    figure = Figure(figsize=size, layout="constrained")
    axes = [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def label_axis(axis: Any, title: str, below: str, is_share: bool) -> None:
    """Give a panel its title, the name of its horizontal axis and the look of all our pictures."""
    axis.set_title(title, fontsize=11, color=INK)
    axis.set_xlabel(below)
    if below == "step":
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y", color="#e4e7eb")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if is_share:
        axis.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.3g}%")


def smooth(values: Sequence[float]) -> list[float]:
    """A running mean over about a tenth of the run."""
    width = max(1, len(values) // 10)
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def save(figure: Any, target: Path) -> None:
    """Write the figure as PNG."""
    target.parent.mkdir(exist_ok=True)  # without parents: a run's folder that was deleted is not created again
    write_whole(target, [png(figure)])


def png(figure: Any) -> bytes:
    """The figure as the content of a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib's font lacks some scripts: such a name is drawn as boxes here but is complete in every table.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(content, format="png", dpi=130)
    return content.getvalue()

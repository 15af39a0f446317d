"""Records and metrics as pictures. Pure: no model, no clock."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The panels of each stage's curves: the key in `metrics.jsonl`, the panel's title, whether it is a share.
PANELS: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "sft": (("loss", "loss", False), ("mean_token_accuracy", "token accuracy", True)),
    "reward": (("loss", "loss", False), ("accuracy", "accuracy on the batch", True)),
    "rl": (
        ("reward", "reward", False),
        ("kl", "KL to the anchor, per token", False),
        ("completions/mean_length", "completion length, tokens", False),
        ("gold", "gold success", True),
    ),
}
INK, SOFT, ACCENT = "#1f2933", "#9fb3c8", "#1971c2"
COLORS = (ACCENT, "#e8590c", "#2f9e44")


def curves(stage: str, metrics: Path, target: Path) -> None:
    """Draw a stage's learning curves from its `metrics.jsonl`: each step faint, a running mean strong."""
    rows = _rows(metrics)
    panels = [panel for panel in PANELS[stage] if any(row.get(panel[0]) is not None for row in rows)]
    if not panels:
        return
    figure, axes = _figure(len(panels))
    for axis, (key, title, is_share) in zip(axes, panels, strict=True):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        steps, values = [step for step, _ in points], [value for _, value in points]
        axis.plot(steps, values, color=SOFT, linewidth=1, marker="." if len(steps) < 3 else "")
        axis.plot(steps, _smooth(values), color=ACCENT, linewidth=2)
        _label(axis, title, "step", is_share)
    _save(figure, target)


def compared(runs: Mapping[str, Sequence[Path]], panels: Sequence[tuple[str, str, bool]], target: Path) -> None:
    """Draw figures by step for several kinds of runs, from their `metrics.jsonl`: each run thin, a kind's mean strong.

    `panels` are as in PANELS; runs of a kind are drawn as far as the shortest goes.
    """
    figure, axes = _figure(len(panels))
    for axis, (key, title, is_share) in zip(axes, panels, strict=True):
        for (kind, files), color in zip(runs.items(), COLORS, strict=False):
            lines = [_smooth([row[key] for row in _rows(file) if row.get(key) is not None]) for file in files]
            for line in lines:
                axis.plot(range(1, len(line) + 1), line, color=color, linewidth=0.8, alpha=0.35)
            mean = [sum(points) / len(points) for points in zip(*lines, strict=False)]
            axis.plot(range(1, len(mean) + 1), mean, color=color, linewidth=2, label=kind)
        _label(axis, title, "step", is_share)
    axes[0].legend(frameon=False)
    _save(figure, target)


def histogram(groups: Mapping[str, Sequence[float]], title: str, label: str, target: Path) -> None:
    """Draw how the scores of two or three groups are spread, on common bins."""
    figure, (axis,) = _figure(1)
    low, high = min(map(min, groups.values())), max(map(max, groups.values()))
    edges = [low + (high - low or 1) * i / 30 for i in range(31)]
    for (name, values), color in zip(groups.items(), COLORS, strict=False):
        axis.hist(list(values), bins=edges, alpha=0.55, label=f"{name} ({len(values)})", color=color)
    axis.legend(frameon=False)
    _label(axis, title, label, is_share=False)
    axis.set_ylabel("rows")
    _save(figure, target)


def bars(names: Sequence[str], values: Sequence[float], title: str, target: Path) -> None:
    """Draw shares as bars with their figures on top."""
    figure, (axis,) = _figure(1)
    drawn = axis.bar(list(names), list(values), color=[SOFT, "#74a9d8", ACCENT][-len(names) :], width=0.6)
    axis.bar_label(drawn, labels=[f"{value:.1%}" for value in values], padding=3, color=INK)
    _label(axis, title, "", is_share=True)
    axis.set_ylim(0, 1.08)
    _save(figure, target)


def _rows(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _figure(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(4.6 * columns if count > 1 else 5.6, 3.1 * rows if rows > 1 else 3.4), layout="constrained"
    )
    axes = [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _label(axis: Any, title: str, below: str, is_share: bool) -> None:
    axis.set_title(title, fontsize=11, color=INK)
    axis.set_xlabel(below)
    axis.grid(axis="y", color="#e4e7eb")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if is_share:
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over about a tenth of the run."""
    width = max(1, len(values) // 10)
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _save(figure: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)

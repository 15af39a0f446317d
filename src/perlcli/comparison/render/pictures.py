"""A comparison report as pictures, drawn in the style of `plots`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlcli.comparison.contrasts import speed_of
from perlcli.comparison.render import tables, words
from perlcli.comparison.results import ArmResult, Comparison, Report, Spread
from perlcli.run import metrics
from perlcli.run.files import METRICS
from perlcli.run.plots import ACCENT, COLORS, INK, SOFT, compared, label_axis, save
from perlcli.text import clip, clip_middle, megabytes, number

FOLDER = "plots"
LABEL = 40  # longest name next to a bar
PHASE_COLORS = (ACCENT, "#e8590c", "#f2b134", "#2f9e44")
BAD = "#c92a2a"
LETTER = 0.0195  # width of a letter at a bar's end, as a share of its panel's
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
ENDS: dict[str, Any] = {"va": "center", "fontsize": 8.5, "zorder": 3, "bbox": BOX}
MARKERS = "osD^vP*Xp<>h"


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn: its stage, its path relative to the report, and what it shows."""

    stage: str
    path: str
    caption: str


def draw(report: Report, folder: Path) -> list[Picture]:
    """Draw what the report's arms have figures for, into the folder's `plots`."""
    drawn: list[Picture] = []
    for comparison in report.comparisons:
        for draw_one in (_costs, _qualities, _phases, _curves):
            drawn += draw_one(comparison, folder)
    kept = {folder / picture.path for picture in drawn}
    for path in (folder / FOLDER).glob("*-*.png"):  # those of an earlier report that this one has no figures for
        if path.name.partition("-")[0] in words.STAGES and path not in kept:
            path.unlink()
    return drawn


def _costs(comparison: Comparison, folder: Path) -> list[Picture]:
    """Memory and speed as bars, side by side."""
    panels = [panel for panel in (_memory(comparison), _speed(comparison)) if any(panel.values)]
    if not panels:
        return []
    labels = _labels(comparison.arms)
    figure, axes = _bars_figure(labels, len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        _draw_bars(axis, panel, comparison.arms)
    for place, arm in enumerate(comparison.arms):  # why there is no bar, once
        if arm.failure and not panels[0].values[place]:
            reason = _plain(clip(arm.failure, LABEL))
            axes[0].text(0.01, place, reason, transform=axes[0].get_yaxis_transform(), color=BAD, **ENDS)
    path = f"{FOLDER}/{comparison.stage}-cost.png"
    save(figure, folder / path)
    return [Picture(comparison.stage, path, f"For each arm: {'; '.join(panel.title for panel in panels)}.")]


def _labels(arms: Sequence[ArmResult]) -> list[str]:
    return [_plain(clip_middle(label, LABEL)) for label in words.labels(arms)]


def _plain(text: str) -> str:
    """Text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


@dataclass(frozen=True)
class Bars:
    """A panel of bars: each arm's value, None if it has none, and the words at its end."""

    title: str
    values: list[float | None]
    ends: list[str]
    ticks: Callable[[float], str]
    baseline: float | None = None  # its value, where a line is drawn


def _memory(comparison: Comparison) -> Bars:
    """Memory as a share of the baseline's; in MB or GB if arms can't be compared with one."""
    arms = comparison.arms
    sizes = [megabytes(arm.memory_mb.value) if arm.memory_mb else "" for arm in arms]
    if _is_relative(arms, "memory"):
        shares = [1.0 if arm.is_baseline and arm.memory_mb else arm.ratios.get("memory") for arm in arms]
        ends = [
            f"{words.share(value)}  ({size})" if value is not None else ""
            for value, size in zip(shares, sizes, strict=True)
        ]
        title = f"peak memory, {words.baseline_word(comparison)} = 100%"
        return Bars(title, shares, ends, lambda value: f"{value:.0%}", baseline=1.0)
    values = [_peak(arm) for arm in arms]
    ends = [_plain(clip(arm.failure, LABEL)) if arm.failure else size for arm, size in zip(arms, sizes, strict=True)]
    if max((value for value in values if value is not None), default=0) < 1000:
        return Bars("peak memory", values, ends, lambda value: f"{value:g} MB")
    return Bars("peak memory", values, ends, lambda value: f"{value / 1000:g} GB")


def _peak(arm: ArmResult) -> float | None:
    """An arm's peak memory in MB; if it ran out of memory, what it held by then."""
    if arm.memory_mb is not None:
        return arm.memory_mb.value
    return max((run.memory_mb for run in arm.runs if run.memory_mb and run.status == "out of memory"), default=None)


def _speed(comparison: Comparison) -> Bars:
    """Speed as a multiple of the baseline's; in steps per second if arms can't be compared with one."""
    arms = comparison.arms
    rates = [number(arm.steps_per_second.value) if arm.steps_per_second else "" for arm in arms]
    if _is_relative(arms, "speed"):
        ratios = [1.0 if arm.is_baseline and arm.steps_per_second else speed_of(arm) for arm in arms]
        ends = [
            f"{words.times(value)}  ({rate} steps/s)" if value is not None else ""
            for value, rate in zip(ratios, rates, strict=True)
        ]
        title = f"speed, {words.baseline_word(comparison)} = 1"
        return Bars(title, ratios, ends, lambda value: f"{value:g}x", baseline=1.0)
    values = [arm.steps_per_second.value if arm.steps_per_second else None for arm in arms]
    return Bars("steps per second", values, rates, lambda value: f"{value:g}")


def _is_relative(arms: Sequence[ArmResult], name: str) -> bool:
    """Whether every arm with figures can be compared with a baseline."""
    done = [arm for arm in arms if not arm.failure]
    return any(arm.ratios for arm in done) and all(arm.is_baseline or name in arm.ratios for arm in done)


def _bars_figure(labels: Sequence[str], panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    longest = max(map(len, labels))
    figure = Figure(figsize=(0.5 + 0.085 * longest + 4.1 * panels, 1.1 + 0.42 * len(labels)), layout="constrained")
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    axes[0].set_yticks(range(len(labels)), labels)
    return figure, axes


def _draw_bars(axis: Any, bars: Bars, arms: Sequence[ArmResult]) -> None:
    """Bars with words at their ends: the baseline's is pale, and those of failed arms are open."""
    longest = max(value for value in bars.values if value is not None)
    if bars.baseline is not None:
        axis.axvline(bars.baseline, color="#868e96", linewidth=0.8, linestyle=":")
    for place, (arm, value, end) in enumerate(zip(arms, bars.values, bars.ends, strict=True)):
        if value is None:
            continue
        style = {"color": SOFT if arm.is_baseline else ACCENT}
        if arm.failure:
            style = {"facecolor": "none", "edgecolor": BAD, "hatch": "///"}
        axis.barh(place, value, height=0.62, zorder=2, **style)
        axis.text(value + 0.02 * longest, place, end, color=BAD if arm.failure else INK, **ENDS)
    _dress(axis, bars.title)
    axis.xaxis.set_major_formatter(lambda value, _: bars.ticks(value))
    shares = [max(0.15, 0.95 - LETTER * len(end)) for end in bars.ends]  # of the panel's width that a bar may take
    needed = [(value or 0) / share for value, share in zip(bars.values, shares, strict=True)]
    axis.set_xlim(0, max(longest * 1.02, *needed))
    axis.locator_params(axis="x", nbins=5)


def _dress(axis: Any, title: str) -> None:
    label_axis(axis, title, "", is_share=False)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color="#e4e7eb")
    axis.tick_params(axis="y", length=0)


def _qualities(comparison: Comparison, folder: Path) -> list[Picture]:
    """The first quality metric that the arms have against trainable parameters."""
    known = [metric.name for metric in metrics.compared(comparison.stage)]
    name = next((name for name in known if any(name in arm.quality for arm in comparison.arms)), "")
    points = [
        (label, arm, arm.quality[name])
        for label, arm in zip(_labels(comparison.arms), comparison.arms, strict=True)
        if name in arm.quality and arm.trainable_parameters
    ]
    if len(points) < 2:
        return []
    path = f"{FOLDER}/{comparison.stage}-quality.png"
    save(_scatter(name, points), folder / path)
    what = metrics.words(name)
    spread = "the metric's interval or, over several seeds, the lowest and the highest"
    caption = f"{what[:1].upper()}{what[1:]} against trainable parameters, with {spread}."
    return [Picture(comparison.stage, path, caption)]


def _scatter(name: str, points: Sequence[tuple[str, ArmResult, Spread]]) -> Any:
    """Points with their intervals on a log axis; a legend names them, so that no label hides another."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    longest = max(len(label) for label, _, _ in points)
    figure = Figure(figsize=(6 + 0.08 * longest, max(3.4, 0.9 + 0.27 * len(points))), layout="constrained")
    axis = figure.subplots()
    models = list(dict.fromkeys(arm.model for _, arm, _ in points))
    names = list(dict.fromkeys(arm.name for _, arm, _ in points))
    taken: list[float] = []
    for place, (label, arm, spread) in enumerate(points):
        color = COLORS[(models.index(arm.model) if len(models) > 1 else place) % len(COLORS)]
        reach = [[max(0.0, spread.value - spread.low)], [max(0.0, spread.high - spread.value)]]
        marker = MARKERS[names.index(arm.name) % len(MARKERS)]
        x = _free_place(arm.trainable_parameters, taken)
        axis.errorbar(
            x, spread.value, yerr=reach, fmt=marker, color=color, markersize=7, capsize=3, linewidth=1.4, label=label
        )
    axis.set_xscale("log")
    axis.set_xlim(min(taken) / 2, max(taken) * 2)
    axis.xaxis.set_major_formatter(lambda value, _: words.count(value))
    axis.xaxis.set_minor_formatter(lambda value, _: "")
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    label_axis(axis, metrics.words(name), "trainable parameters", is_share=False)
    if metrics.is_share(name):
        axis.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.3g}%")
    figure.legend(frameon=False, loc="outside right upper", fontsize=9)
    return figure


def _free_place(count: int, taken: list[float]) -> float:
    """Where to draw a point of so many parameters: next to those that are drawn already."""
    place = float(count)
    while any(abs(place / other - 1) < 0.04 for other in taken):
        place *= 1.06
    taken.append(place)
    return place


def _phases(comparison: Comparison, folder: Path) -> list[Picture]:
    spent = dict(zip(_labels(comparison.arms), map(tables.spent_phases, comparison.arms), strict=True))
    spent = {label: phases for label, phases in spent.items() if phases}
    if not spent:
        return []
    figure, (axis,) = _bars_figure(list(spent), 1)
    figure.set_size_inches(8, 1.5 + 0.42 * len(spent))
    _stack(axis, list(spent.values()))
    figure.legend(frameon=False, loc="outside lower center", ncols=len(words.PHASES))
    path = f"{FOLDER}/{comparison.stage}-phases.png"
    save(figure, folder / path)
    return [Picture(comparison.stage, path, "Where the time of a step goes.")]


def _stack(axis: Any, spent: Sequence[Mapping[str, float]]) -> None:
    """Seconds per step in a row, with shares in the bars that have room for them."""
    totals = [sum(phases.values()) for phases in spent]
    longest = max(totals) or 1.0
    starts = [0.0] * len(spent)
    for name, color in zip(words.PHASES, PHASE_COLORS, strict=True):
        values = [phases[name] for phases in spent]
        axis.barh(range(len(spent)), values, left=starts, color=color, height=0.62, label=name)
        for place, (value, start) in enumerate(zip(values, starts, strict=True)):
            if value / longest > 0.07:
                share = f"{value / totals[place]:.0%}"
                ink = INK if color == PHASE_COLORS[2] else "white"
                axis.text(start + value / 2, place, share, ha="center", va="center", fontsize=8.5, color=ink)
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    for place, total in enumerate(totals):
        axis.text(total + 0.01 * longest, place, f"{number(total)} s", va="center", fontsize=8.5, color=INK)
    axis.set_xlim(0, longest * 1.12)
    _dress(axis, "seconds per step")


def _curves(comparison: Comparison, folder: Path) -> list[Picture]:
    models = words.shortest(arm.model for arm in comparison.arms)
    labels = _labels(comparison.arms)
    pictures = []
    for order, (model, shown) in enumerate(models.items(), 1):
        files = {
            label: [folder / Path(run.folder).expanduser() / METRICS for run in arm.finished or arm.runs]
            for label, arm in zip(labels, comparison.arms, strict=True)
            if arm.model == model
        }
        name = f"{comparison.stage}-curves-{order}" if len(models) > 1 else f"{comparison.stage}-curves"
        path = f"{FOLDER}/{name}.png"
        (folder / path).unlink(missing_ok=True)
        compared(files, metrics.panels(comparison.stage), folder / path)
        if (folder / path).exists():
            title = f"Learning curves of {shown}" if len(models) > 1 else "Learning curves"
            caption = f"{title}: thin lines are runs, strong lines an arm's mean over its runs, smoothed."
            pictures.append(Picture(comparison.stage, path, caption))
    return pictures

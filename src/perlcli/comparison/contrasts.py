"""Compares arms with their baseline: ratios, what may be chance, and what else the runs differ in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from perlcli import settings
from perlcli.comparison.figures import summarise
from perlcli.comparison.results import ArmResult, Comparison, Spread
from perlcli.run import lineage, metrics, setup
from perlcli.run.record import RunRecord
from perlcli.stats import Z95
from perlcli.text import clip

UNEVEN = 1.1  # ratio of speed by the clock to speed by CPU time: beyond it, other work disturbed the arms unevenly
# What arms differ in by their nature, by the names of settings and of TRL's.
OF_ARMS = (
    {*settings.LORA, "full", "peft", "load_in_4bit", "load_in_8bit", "bf16", "fp16"}
    | {"learning_rate", "value_learning_rate", "seed", "data_seed"}
    | {"output", "output_dir", "logging_dir", "run_name", *settings.ONCE}
)
# Table 1 of the paper (arXiv 2403.10704): LoRA against full tuning on its six tasks, memory as a share of full
# tuning's peak, speed as a multiple of it.
PAPER: dict[str, dict[str, tuple[float | None, ...]]] = {
    "reward": {"memory": (0.431, 0.48, 0.50, None, 0.56, 0.74), "speed": (1.6, 1.5, 1.7, None, 1.9, 1.15)},
    "rl": {"memory": (0.80, 0.75, 0.75, 0.80, 0.74, 0.74), "speed": (1.3, 1.15, 1.15, 1.05, 1.20, 1.24)},
}
PAPER_TASKS = ("Harmless", "SHP", "TL;DR", "BOLT", "UI", "VQA")


def compare(stage: str, arms: Sequence[ArmResult], warnings: Sequence[str] = ()) -> Comparison:
    """The arms summarised, each compared with its model's baseline."""
    done = [summarise(arm, stage) for arm in arms]
    for arm in done:
        baseline = next((other for other in done if other.is_baseline and other.model == arm.model), None)
        if baseline is not None and baseline is not arm:
            arm.ratios = ratios(arm, baseline)
            chance = remarks(arm, baseline, stage)
            arm.may_be_chance, arm.remarks = bool(chance), [*arm.remarks, *chance, *disturbance(arm)]
    models = list(dict.fromkeys(arm.model for arm in done))
    done.sort(key=lambda arm: (models.index(arm.model), not arm.is_baseline))
    return Comparison(stage, done, [*warnings, *same_rates(done)], paper(stage))


def ratios(arm: ArmResult, baseline: ArmResult) -> dict[str, float]:
    """The arm's figures as multiples of the baseline's, as far as both have them."""
    theirs = _amounts(baseline)
    amounts = {name: (amount, theirs.get(name)) for name, amount in _amounts(arm).items()}
    known = {name: one / other for name, (one, other) in amounts.items() if one is not None and other}
    same = {(run.seed, run.repeat): run for run in baseline.finished}
    runs = [(run, same[run.seed, run.repeat]) for run in arm.finished if (run.seed, run.repeat) in same]
    speeds = {
        "speed": _speed((one.step_seconds, other.step_seconds) for one, other in runs),
        "cpu_speed": _speed((one.step_cpu_seconds, other.step_cpu_seconds) for one, other in runs),
    }
    return known | {name: speed for name, speed in speeds.items() if speed is not None}


def _amounts(arm: ArmResult) -> dict[str, float | None]:
    """What an arm takes, by the names of its ratios; for files, what its first finished run takes."""
    spreads = {"memory": arm.memory_mb, "reserved": arm.reserved_mb, "tokens_per_second": arm.tokens_per_second}
    amounts = {name: None if spread is None else spread.value for name, spread in spreads.items()}
    amounts["trainable"] = arm.trainable_parameters or None
    for run in arm.finished[:1]:
        amounts |= {"weights": run.weights_bytes, "optimizer": run.optimizer_bytes}
    return amounts


def _speed(pairs: Iterable[tuple[list[float], list[float]]]) -> float | None:
    """How many times faster our steps are: the median over steps of the same number in runs of the same seed and
    repeat, which train on the same rows. A pair holds the seconds of each step of our run and of theirs."""
    multiples = [
        their_seconds / our_seconds
        for ours, theirs in pairs
        for our_seconds, their_seconds in zip(ours, theirs, strict=False)
        if our_seconds and their_seconds
    ]
    return median(multiples) if multiples else None


def speed_of(arm: ArmResult) -> float | None:
    """The arm's speed as a multiple of the baseline's: by the clock, or by CPU time if other work disturbed that."""
    return arm.ratios.get("cpu_speed" if _is_disturbed(arm) else "speed")


def _is_disturbed(arm: ArmResult) -> bool:
    """Whether clock and CPU time disagree about an arm's speed. On a GPU the CPU only waits."""
    by_clock, by_cpu = arm.ratios.get("speed"), arm.ratios.get("cpu_speed")
    if not by_clock or not by_cpu or arm.reserved_mb is not None:
        return False
    return max(by_clock / by_cpu, by_cpu / by_clock) >= UNEVEN


def disturbance(arm: ArmResult) -> list[str]:
    """A remark if an arm's speed is given by CPU time, because other work slowed the arms unevenly."""
    if not _is_disturbed(arm):
        return []
    return [f"speed by CPU time; {arm.ratios['speed']:.2f}x by the clock, as other work ran on the machine"]


def remarks(arm: ArmResult, baseline: ArmResult, stage: str) -> list[str]:
    """A remark if the first quality metric that both arms have may differ by chance."""
    shared = [m.name for m in metrics.compared(stage) if m.name in arm.quality and m.name in baseline.quality]
    if not shared:
        return []
    name = shared[0]
    ours, theirs, words = arm.quality[name], baseline.quality[name], name.replace("_", " ")
    if any(len({run.seed for run in each.finished}) > 1 for each in (arm, baseline)):
        is_apart = ours.low > theirs.high or ours.high < theirs.low
        return [] if is_apart else [f"{words}: the ranges of both arms overlap, so the difference may be chance"]
    if ours.low == ours.high:
        return [f"{words}: only one seed, so the difference may be chance"]
    gap, noise = ours.value - theirs.value, math.hypot(_error(ours), _error(theirs)) * Z95
    if abs(gap) > noise:
        return []
    return [f"{words}: {gap * 100:+.1f} points, within the ±{noise * 100:.1f} that chance allows on {ours.n:,} rows"]


def _error(share: Spread) -> float:
    return math.sqrt(max(share.value * (1 - share.value), 1e-9) / share.n)


def same_rates(arms: Sequence[ArmResult]) -> list[str]:
    """A warning if full tuning and adapters train at the same learning rate, which suits one of them at most."""
    rates = {arm.learning_rate for arm in arms if arm.is_full} - {None}
    same = [arm for arm in arms if not arm.is_full and arm.learning_rate in rates]
    if not same:
        return []
    names = ", ".join(dict.fromkeys(arm.name for arm in same))
    return [
        f"{names} and full tuning have the same learning rate, {same[0].learning_rate:g}: adapters are usually trained "
        "at ten times the rate of full tuning"
    ]


def paper(stage: str) -> dict[str, dict[str, float]]:
    """The paper's ratios for a stage, by task; empty if it has none."""
    return {
        what: {task: value for task, value in zip(PAPER_TASKS, values, strict=True) if value is not None}
        for what, values in PAPER.get(stage, {}).items()
    }


def differences(records: Mapping[str, RunRecord], intended: Iterable[str] = ()) -> list[str]:
    """What the runs of one comparison differ in, other than in `intended` and in what makes them different arms:
    settings, TRL's settings, data, device, versions."""
    views = {name: _view(record) for name, record in records.items()}
    allowed = OF_ARMS | set(intended)
    lines = _other_data(records)
    if lines:  # said once, in words
        allowed |= {"data", "eval_data"}
    for key in dict.fromkeys(key for view in views.values() for key in view):
        if key.rpartition(".")[2] in allowed:
            continue
        groups: dict[str, list[str]] = {}
        for name, view in views.items():
            groups.setdefault(json.dumps(view.get(key), default=str, ensure_ascii=False), []).append(name)
        if len(groups) > 1:
            shown = "; ".join(f"{_shown(value)} in {', '.join(names)}" for value, names in groups.items())
            lines.append(f"The runs differ in {key}: {shown}")
    return lines


def _other_data(records: Mapping[str, RunRecord]) -> list[str]:
    """A warning for each role of data, training or held-out, in which the runs had other rows."""
    lines = []
    for role, done in (("train", "trained on"), ("eval", "measured on")):
        groups: dict[tuple[Any, Any], list[str]] = {}
        for name, record in records.items():
            data = record.data.get(role, {})
            groups.setdefault((data.get("fingerprint"), data.get("kept")), []).append(name)
        if len(groups) > 1:
            sources = [records[names[0]].data.get(role) for names in groups.values()]
            words = [setup.rows(data) if data else "none" for data in sources]
            shown = "; ".join(
                f"{words_of or 'rows'} in {', '.join(names)}"
                for words_of, names in zip(words, groups.values(), strict=True)
            )
            lines.append(f"The runs were {done} different rows: {shown}")
    return lines


def _shown(value: str, limit: int = 60) -> str:
    return clip("not set" if value == "null" else value.strip('"'), limit)


def _view(record: RunRecord) -> dict[str, Any]:
    """What must be the same in each arm, by name."""
    view: dict[str, Any] = dict(record.settings)
    view |= {f"trl.{name}": value for name, value in record.trl_settings.items() if name not in record.settings}
    if all(summary.get("fingerprint") for summary in record.data.values()) and record.data:
        view = {name: value for name, value in view.items() if name not in ("data", "eval_data")}  # paths to the rows
    for role, summary in record.data.items():
        view[f"{role} data.tokens"] = summary.get("tokens")
    if record.command == "eval":
        view["opponent"] = lineage.opponent(record) or "none"
        view["judge"] = view.pop("reward", None)
        view["the judge's weights"] = sorted(record.model.get("rewards", {}).values())
    view |= {f"version.{name}": value for name, value in record.versions.items()}
    view["steps"] = record.steps
    view |= {f"device.{key}": record.device.get(key) for key in ("name", "threads")}
    return view

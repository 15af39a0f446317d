"""A record as text for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perlcli.run import metrics, next_steps
from perlcli.run.record import RunRecord
from perlcli.terminal import say
from perlcli.text import counted, megabytes

SECONDS = "seconds_"


def show(record: RunRecord | None) -> None:
    """Print the summary of a finished run and what to type next; nothing for a dry run."""
    if record is not None:
        say("\n".join(filter(None, (text(record), next_steps.text(record)))))


def text(record: RunRecord, folder: Path | None = None) -> str:
    """A few lines with the record's figures and the run's folder, which is `folder` if it was moved since."""
    merged = _merged(record.metrics)
    lines = [f"{name}: {value}" for name, value in figures(record)]
    spent = {key.removeprefix(SECONDS): value for key, value in merged.items() if key.startswith(SECONDS)}
    if spent:
        total = sum(spent.values()) or 1
        parts = [f"{name} {value:.3g} ({value / total:.0%})" for name, value in spent.items()]
        lines.append(f"seconds per step: {total:.3g} = {' + '.join(parts)}")
    facts = [f"{record.elapsed_seconds:.0f} s", _memory(record)]
    if record.steps:
        facts = [counted(record.steps, "step"), f"{record.tokens:,} tokens", *facts]
    if record.trainable_parameters:
        share = record.trainable_parameters / record.total_parameters
        facts.append(f"trained {record.trainable_parameters:,} of {record.total_parameters:,} parameters ({share:.2%})")
    return "\n".join([*lines, " · ".join(facts), f"Saved in {folder or record.settings.get('output')}"])


def figures(record: RunRecord) -> list[tuple[str, str]]:
    """The names and values of a run's metrics for a person to read, without where the time went."""
    merged = _merged(record.metrics)
    return [(metrics.words(key), figure(key, value)) for key, value in merged.items() if not key.startswith(SECONDS)]


def judged(record: RunRecord) -> list[str]:
    """A run's verdicts; of a run without any, its key figure with interval and rows in a sentence, if it has one."""
    if record.verdicts:
        return record.verdicts
    merged, rows = _merged(record.metrics), record.metrics.get("rows", record.metrics.get("prompts"))
    name = next((metric.name for metric in metrics.compared(record.command) if metric.name in merged), None)
    if name is None or not isinstance(merged[name], tuple | float):
        return []
    on_rows = f" on {counted(rows, 'held-out row')}" if isinstance(rows, int) else ""
    return [f"{metrics.words(name)} {figure(name, merged[name])}{on_rows}"]


def _memory(record: RunRecord) -> str:
    """The peak memory; on a GPU also the peaks of loading and of training, which `perl estimate` predicts apart."""
    peak, memory = f"peak memory {megabytes(record.peak_memory_mb)}", record.memory
    if record.device.get("type") != "cuda" or not {"loading_mb", "training_mb"} <= set(memory):
        return peak
    return f"{peak} (loading {megabytes(memory['loading_mb'])}, training {megabytes(memory['training_mb'])})"


def _merged(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics, with intervals joined to their figures."""
    merged = {}
    for key, value in metrics.items():
        if key.endswith(("_low", "_high")) or value is None:
            continue
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        merged[key] = value if low is None or high is None else (value, low, high)
    return merged


def figure(key: str, value: Any) -> str:
    """A metric's value for a person to read: shares in per cent, with the interval after the figure."""
    if isinstance(value, tuple):
        return f"{figure(key, value[0])} (95 % interval {figure(key, value[1])} to {figure(key, value[2])})"
    if isinstance(value, float):
        return f"{value:.1%}" if metrics.is_share(key) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)

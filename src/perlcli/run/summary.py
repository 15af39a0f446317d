"""Records as text for a terminal. Pure: no model, no clock."""

from __future__ import annotations

from typing import Any

from perlcli.run import metrics
from perlcli.run.record import RunRecord
from perlcli.terminal import say
from perlcli.text import counted, megabytes

SECONDS = "seconds_"


def show(record: RunRecord | None) -> None:
    """Print what a finished run has to say; a dry run has said it already."""
    if record is not None:
        say(text(record))


def text(record: RunRecord) -> str:
    """The record's figures and where to find the rest, as some lines of text."""
    merged = _merged(record.metrics)
    lines = [
        f"{metrics.words(key)}: {figure(key, value)}" for key, value in merged.items() if not key.startswith(SECONDS)
    ]
    spent = {key.removeprefix(SECONDS): value for key, value in merged.items() if key.startswith(SECONDS)}
    if spent:
        whole = sum(spent.values()) or 1
        lines.append(
            f"seconds a step: {whole:.3g} = " + " + ".join(f"{n} {v:.3g} ({v / whole:.0%})" for n, v in spent.items())
        )
    facts = [f"{record.elapsed_seconds:.0f} s", f"peak memory {megabytes(record.peak_memory_mb)}"]
    if record.steps:
        facts = [counted(record.steps, "step"), f"{record.tokens:,} tokens", *facts]
    if record.trainable_parameters:
        share = record.trainable_parameters / record.total_parameters
        facts.append(f"trained {record.trainable_parameters:,} of {record.total_parameters:,} parameters ({share:.2%})")
    return "\n".join([*lines, " · ".join(facts), f"Saved in {record.settings.get('output')}"])


def _merged(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with each interval beside its figure."""
    merged = {}
    for key, value in metrics.items():
        if key.endswith(("_low", "_high")) or value is None:
            continue
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        merged[key] = value if low is None or high is None else (value, low, high)
    return merged


def figure(key: str, value: Any) -> str:
    """A metric's value for a person to read: shares in per cent, the interval behind its figure."""
    if isinstance(value, tuple):
        return f"{figure(key, value[0])} (95 % interval {figure(key, value[1])} to {figure(key, value[2])})"
    if isinstance(value, float):
        return f"{value:.1%}" if metrics.is_share(key) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)

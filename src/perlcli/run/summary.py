"""Records as text for a terminal."""

from __future__ import annotations

from typing import Any

from perlcli.run import metrics
from perlcli.run.record import RunRecord
from perlcli.terminal import say
from perlcli.text import counted, megabytes

SECONDS = "seconds_"


def show(record: RunRecord | None) -> None:
    """Print the summary of a finished run; nothing for a dry run."""
    if record is not None:
        say(text(record))


def text(record: RunRecord) -> str:
    """A few lines with the record's figures and the run's folder."""
    merged = _merged(record.metrics)
    lines = [
        f"{metrics.words(key)}: {figure(key, value)}" for key, value in merged.items() if not key.startswith(SECONDS)
    ]
    spent = {key.removeprefix(SECONDS): value for key, value in merged.items() if key.startswith(SECONDS)}
    if spent:
        total = sum(spent.values()) or 1
        lines.append(
            f"seconds per step: {total:.3g} = " + " + ".join(f"{n} {v:.3g} ({v / total:.0%})" for n, v in spent.items())
        )
    facts = [f"{record.elapsed_seconds:.0f} s", f"peak memory {megabytes(record.peak_memory_mb)}"]
    if record.steps:
        facts = [counted(record.steps, "step"), f"{record.tokens:,} tokens", *facts]
    if record.trainable_parameters:
        share = record.trainable_parameters / record.total_parameters
        facts.append(f"trained {record.trainable_parameters:,} of {record.total_parameters:,} parameters ({share:.2%})")
    return "\n".join([*lines, " · ".join(facts), f"Saved in {record.settings.get('output')}"])


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

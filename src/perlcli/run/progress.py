"""The progress line of a stage: live on a terminal, plain and less frequent elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from perlcli.run import disk, metrics

PLAIN_SECONDS = 10.0


def figures(stage: str, logs: Mapping[str, float]) -> str:
    """The stage's figures as text, e.g. `loss 0.412 · accuracy 81.2%`."""
    logged = [metric for metric in metrics.METRICS[stage] if metric.live and logs.get(metric.key) is not None]
    return " · ".join(f"{metric.words} {metric.live.format(logs[metric.key])}" for metric in logged)


class Progress:
    """A context in which `update` shows the progress of a stage on standard error."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total = stage, total
        self._start = time.monotonic()
        self._first = 0 if stage == "eval" else None  # resumed training starts in the middle
        # Training shows its first step at once; an evaluation of a few seconds shows nothing.
        self._last_line = 0.0 if stage == "eval" else -PLAIN_SECONDS
        self._bar = _bar() if sys.stderr.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(stage, total=total, figures="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, logs: Mapping[str, float]) -> None:
        """Show `done` of the total with the stage's figures."""
        if self._bar:
            self._bar.update(self._task, completed=done, figures=figures(self.stage, logs))
            return
        self._first = done - 1 if self._first is None else self._first
        elapsed = time.monotonic() - self._start
        is_end = done >= self.total and (self.stage != "eval" or self._last_line > 0)
        if elapsed - self._last_line < PLAIN_SECONDS and not is_end:
            return
        self._last_line = elapsed
        left = elapsed / max(done - self._first, 1) * (self.total - done)
        parts = [f"{self.stage} {done}/{self.total}", figures(self.stage, logs), f"{elapsed:.0f} s, {left:.0f} s left"]
        disk.tell(" · ".join(part for part in parts if part), error=True)


def _bar():  # type: ignore[no-untyped-def]  # rich is imported only where there is a terminal to draw on
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

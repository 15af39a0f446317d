"""The progress line of a stage: live on a terminal, plain and less frequent elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from perlcli.run import disk, metrics
from perlcli.text import duration

PLAIN_SECONDS = 10.0
RECENT = 10  # updates from which the time that is left is guessed


def figures(stage: str, logs: Mapping[str, float]) -> str:
    """The stage's figures as text, e.g. `loss 0.412 · accuracy 81.2%`."""
    logged = [metric for metric in metrics.METRICS[stage] if metric.live and logs.get(metric.key) is not None]
    return " · ".join(f"{metric.words} {metric.live.format(logs[metric.key])}" for metric in logged)


class Progress:
    """A context in which `update` shows the progress of a stage on standard error."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total = stage, total
        self._start = time.monotonic()
        # When how much was done: of the last updates, and the start. Resumed training starts in the middle.
        self._recent: deque[tuple[float, int]] = deque([(self._start, 0)] if stage == "eval" else [], RECENT + 1)
        # Training shows its first step at once; an evaluation of a few seconds shows nothing.
        self._last_line = 0.0 if stage == "eval" else -PLAIN_SECONDS
        self._bar = _bar(self) if sys.stderr.isatty() else None
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
        if not self._recent:
            self._recent.append((self._start, done - 1))
        self._recent.append((time.monotonic(), done))
        if self._bar:
            self._bar.update(self._task, completed=done, figures=figures(self.stage, logs))
            return
        elapsed = time.monotonic() - self._start
        is_end = done >= self.total and (self.stage != "eval" or self._last_line > 0)
        if elapsed - self._last_line < PLAIN_SECONDS and not is_end:
            return
        self._last_line = elapsed
        time_words = f"{duration(elapsed)}, {duration(self.left() or 0.0)} left"
        parts = [f"{self.stage} {done}/{self.total}", figures(self.stage, logs), time_words]
        disk.tell(" · ".join(part for part in parts if part), error=True)

    def left(self) -> float | None:
        """The seconds that are left, by the pace of the last updates; None before the first."""
        if len(self._recent) < 2:
            return None
        (start, first), (end, done) = self._recent[0], self._recent[-1]
        pace = (end - start) / max(done - first, 1)
        return max(0.0, pace * (self.total - done) - (time.monotonic() - end))


def _bar(progress: Progress):  # type: ignore[no-untyped-def]  # rich is imported only where there is a terminal
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Left(ProgressColumn):
        """The time that is left. rich's own column knows only the last 30 s, in which no step may end."""

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            left = progress.left()
            words = "" if left is None else f"{duration(left)} left"
            return Text(words, style="progress.remaining")

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        Left(),
        console=Console(stderr=True),
    )

"""One line that tells what matters while a stage runs: live on a terminal, plain and rare elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from perlcli import disk

PLAIN_SECONDS = 10.0

# What each stage shows, in order: the key in the trainer's logs, the word for it, how to print it.
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "sft": (("loss", "loss", "{:.3f}"), ("mean_token_accuracy", "token accuracy", "{:.1%}")),
    "reward": (("loss", "loss", "{:.3f}"), ("accuracy", "accuracy", "{:.1%}")),
    "rl": (
        ("reward", "reward", "{:.3f}"),
        ("kl", "KL/token", "{:.4f}"),
        ("completions/mean_length", "length", "{:.1f}"),
        ("completions/clipped_ratio", "truncated", "{:.1%}"),
    ),
    "eval": (),
}


def figures(stage: str, logs: Mapping[str, float]) -> str:
    """The stage's figures as text, e.g. `loss 0.412 · accuracy 81.2%`."""
    return " · ".join(
        f"{word} {form.format(logs[key])}" for key, word, form in COLUMNS[stage] if logs.get(key) is not None
    )


class Progress:
    """A context in which `update` shows how far a stage is; writes to standard error."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total = stage, total
        self._bar = None
        self._start = time.monotonic()
        self._first = 0 if stage == "eval" else None  # a resumed training begins in the middle
        # A training run shows its first step at once; an evaluation that is over in seconds shows nothing.
        self._last_line = 0.0 if stage == "eval" else -PLAIN_SECONDS
        if sys.stderr.isatty():
            self._bar = _bar()
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

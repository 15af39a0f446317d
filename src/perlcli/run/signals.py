"""The signals that ask a process to stop: from Ctrl-C, `kill`, preempted machines and schedulers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SOON = 0.05  # seconds


class Signalled(KeyboardInterrupt):
    """A signal to stop that takes effect at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def heard(answer: Callable[[int], object]) -> Iterator[None]:
    """Call `answer` with a signal's number when one arrives inside. Does nothing except in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            asked.append(number)
        if _is_in_finaliser(frame):  # Python ignores exceptions there
            signal.setitimer(signal.ITIMER_REAL, SOON)
        else:
            answer(asked[-1])

    before = {number: signal.signal(number, take) for number in (*STOPS, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_finaliser(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def stop(number: int) -> None:
    """The answer that stops the run at once. Raises Signalled."""
    raise Signalled(number)


def exit_code(error: KeyboardInterrupt) -> int:
    """The exit code after a signal: 130, 143 or 138."""
    return 128 + (error.number if isinstance(error, Signalled) else signal.SIGINT)

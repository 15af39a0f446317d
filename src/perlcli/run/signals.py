"""The signals that ask a process to end: Ctrl-C, what `kill` and preempted machines send, what schedulers warn with."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SOON = 0.05  # seconds


class Signalled(KeyboardInterrupt):
    """A signal that asks for the end, where it is heard at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def heard(answer: Callable[[int], object]) -> Iterator[None]:
    """Have these signals answered inside, by their number. Only a main thread can; in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            asked.append(number)
        if _is_in_finaliser(frame):  # Python drops what is raised there
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
    """Whether a frame is of an object that is being taken down, or was called by one."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def stop(number: int) -> None:
    """The answer that ends what is at work. Raises Signalled."""
    raise Signalled(number)


def exit_code(error: KeyboardInterrupt) -> int:
    """The exit code of a process that a signal ended: 130, 143 or 138."""
    return 128 + (error.number if isinstance(error, Signalled) else signal.SIGINT)

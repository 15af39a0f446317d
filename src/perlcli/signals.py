"""The signals that ask a process to end: Ctrl-C, what `kill` and preempted machines send, what schedulers warn with."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
    before = {number: signal.signal(number, lambda number, frame: answer(number)) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int) -> None:
    """The answer that ends what is at work. Raises Signalled."""
    raise Signalled(number)


def exit_code(error: KeyboardInterrupt) -> int:
    """The exit code of a process that a signal ended: 130, 143 or 138."""
    return 128 + (error.number if isinstance(error, Signalled) else signal.SIGINT)

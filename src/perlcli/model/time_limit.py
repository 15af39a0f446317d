"""A limit on the processor time of what a user's text makes Python do: match an expression, render a template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(Exception):
    """What ran longer than its limit."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TooLong after this much processor time: the re module handles signals while it searches."""
    if threading.current_thread() is not threading.main_thread():  # Python can set a timer only in the main thread
        yield
        return

    def ring(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

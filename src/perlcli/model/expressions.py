"""Regular expressions that come in a file, tried before they are used: some take years for a name of thirty letters."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

SECONDS = 2.0  # of the processor's, for all expressions of a file on all names: an ordinary one takes microseconds


class _TooLong(Exception):
    """The time is up."""


def fault(expressions: Iterable[str], names: Sequence[str], seconds: float = SECONDS) -> str | None:
    """What is wrong with the first expression that can't be read, or can't be matched with these names in time."""
    for expression in expressions:
        try:
            with _limit(seconds):
                compiled = re.compile(expression)
                for name in names:
                    compiled.fullmatch(name)
        except (re.error, RecursionError, OverflowError) as error:
            return f"is no regular expression: {error}"
        except _TooLong:
            return f"is a regular expression that took longer than {seconds:g} s to match with the model's modules"
    return None


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise _TooLong after so many seconds of the processor; the re module asks for signals while it searches."""
    if threading.current_thread() is not threading.main_thread():  # where Python can set no timer
        yield
        return

    def ring(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

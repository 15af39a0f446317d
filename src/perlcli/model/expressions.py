"""Tries regular expressions from a file before they are used: some take years to match a name of thirty letters."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from perlcli.text import shorten

SECONDS = 2.0  # processor time for one expression on all names; an ordinary one takes microseconds


class _TooLong(Exception):
    """The time is up."""


def fault(expressions: Iterable[str], names: Sequence[str], seconds: float = SECONDS) -> str | None:
    """What is wrong with the first expression that is invalid or can't be matched with these names in time."""
    for expression in expressions:
        try:
            with _limit(seconds):
                compiled = re.compile(expression)
                for name in names:
                    compiled.fullmatch(name)
        except (re.error, RecursionError, OverflowError) as error:
            return f"{shorten(expression)} is not a valid regular expression: {error}"
        except _TooLong:
            return f"the regular expression {shorten(expression)} takes longer than {seconds:g} s to match module names"
    return None


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises _TooLong after this much processor time: the re module handles signals while it searches."""
    if threading.current_thread() is not threading.main_thread():  # Python can set a timer only in the main thread
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

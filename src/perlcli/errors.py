"""Errors that the user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from perlcli.text import clip, one_line

SHOWN_FAULTS = 20


class PerlError(Exception):
    """A problem that the user can fix: the first line names it, the hint says what to type."""

    exit_code = 2

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem}\nHint: {self.hint}" if self.hint else self.problem


class RunFailed(PerlError):
    """A run that failed after it began. What was saved stays, and the record keeps the reason."""

    exit_code = 1


class Interrupted(PerlError):
    """A run that the user stopped. The hint is the command that continues it, or if nothing is saved (`is_saved`) that
    starts it again."""

    exit_code = 130

    def __init__(self, problem: str, hint: str = "", *, is_saved: bool = True) -> None:
        super().__init__(problem, hint)
        self.is_saved = is_saved

    def __str__(self) -> str:
        ending = f": {self.hint} {'continues' if self.is_saved else 'starts again'}" if self.hint else ""
        return f"{self.problem}{ending}."


def reason(error: Exception) -> str:
    """An error of a library or the system in one line, with its type or its file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {clip(one_line(str(error)), 600)}"


def line(error: BaseException, limit: int = 300) -> str:
    """A library's error message in one line of at most `limit` characters, to quote in a message."""
    if isinstance(error, KeyError):  # its text is the key alone
        return clip(f"{one_line(str(error))} is missing", limit)
    return clip(one_line(str(error)), limit) or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean …?` with the known name that is most like an unknown one; empty if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {matches[0]}?" if matches else ""


def listing(faults: Sequence[str]) -> str:
    """The first faults, one per line, and how many more there are."""
    rest = len(faults) - SHOWN_FAULTS
    shown = "\n".join(faults[:SHOWN_FAULTS])
    return f"{shown}\n… and {rest:,} more" if rest > 0 else shown

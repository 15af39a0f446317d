"""What the value of an option may be, from the option's declaration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from perlcli.settings.declaring import Option, Values
from perlcli.settings.types import describe, fits
from perlcli.text import shorten

LARGEST = 2**53  # of numbers: above it a float is no longer exact
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes that file systems accept


def type_fault(item: Option, value: object) -> str:
    """What is wrong with the type of a value from YAML or the command line; empty if nothing."""
    return "" if fits(value, item.type) else f"must be {describe(item.type)}, not {shorten(value)}"


def misfit(item: Option, value: object) -> str:
    """Why no option of this kind can have a value, whatever its limits; empty if it can."""
    if isinstance(value, tuple):
        return next((fault for each in value if (fault := misfit(item, each))), "")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        return f"must be a finite number of at most {LARGEST:,}, not {shorten(value)}"
    if not isinstance(value, str):
        return ""
    return text_fault(value) or (place_fault(value) if item.place else "")


def text_fault(text: str) -> str:
    """Why a text cannot be written to a file; empty if it can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"must be text in UTF-8, not {shorten(text)}"
    return f"must be text without NUL characters, not {shorten(text)}" if "\0" in text else ""


def place_fault(text: str) -> str:
    """Why a text cannot name a file, a folder or something on the Hub; empty if it can."""
    if fault := text_fault(text):
        return fault
    if len(text.encode()) > LONGEST_PATH or max(len(part.encode()) for part in text.split("/")) > LONGEST_NAME:
        return f"is too long for a file name: {shorten(text)}"
    try:
        Path(text).expanduser()
    except RuntimeError:
        return f"{shorten(text)}: there is no such home folder"
    return ""


def limit_faults(items: Iterable[Option], values: Values) -> list[str]:
    """A line for every number outside its option's limits, as the command line spells the option."""
    return [f"{item.shown} {fault}" for item in items if (fault := limit_fault(item, values[item.name]))]


def limit_fault(item: Option, value: object) -> str:
    """How a number, or the first in a list, is outside its option's limits; empty if it is within."""
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, int | float) and not _is_within(item, number):
            return f"must be {_limits(item)}, not {shorten(number)}"
    return ""


def _is_within(item: Option, number: float) -> bool:
    return (
        (item.gt is None or number > item.gt)
        and (item.ge is None or number >= item.ge)
        and (item.lt is None or number < item.lt)
    )


def _limits(item: Option) -> str:
    """An option's limits in words: `above 0`, `at least 0 and below 1`."""
    words = {"above": item.gt, "at least": item.ge, "below": item.lt}
    return " and ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)

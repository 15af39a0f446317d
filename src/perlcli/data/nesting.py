"""What may stand inside a value of JSON: nothing below fifty levels, no half characters, no key twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from perlcli.text import shorten

DEEPEST = 50  # levels: what writes and shows rows later calls itself for each
TOO_DEEP = "nested too deeply"
HALVES = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON spells half a character: text in UTF-8 holds none


class Twice(dict[str, Any]):
    """An object in which a key stands twice."""

    key = ""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, marked where a key stands twice: which of the two is meant, nobody can tell."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    twice = Twice(found)
    twice.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return twice


def flaw(value: Any, halves: object) -> str:
    """What is wrong with a value, in words; empty for nothing. `halves` says whether half a character can be in it."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        for item in level:
            if isinstance(item, Twice):
                return f"the key {shorten(item.key)} stands twice in one object"
            if halves and (half := _half(item)):
                return f"{half} is half a character: drop it, or write both halves"
        level = [part for item in level if isinstance(item, dict | list) for part in _inside(item, halves)]
        if not level:
            return ""
    return TOO_DEEP


def _inside(value: dict[str, Any] | list[Any], halves: object) -> Iterator[Any]:
    """What stands right inside a value; the keys of an object where they may be at fault."""
    if isinstance(value, list):
        return iter(value)
    return iter([*value, *value.values()] if halves else value.values())


def _half(value: Any) -> str:
    """The first lone surrogate in a text: JSON can spell what no text in UTF-8 holds, and tokenizers refuse it."""
    if not isinstance(value, str):
        return ""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return error.object[error.start].encode("unicode_escape").decode()
    return ""

"""Text for people: values cut to length, counts with their noun, Markdown."""

from __future__ import annotations

from collections.abc import Iterator

LONG_NUMBER = 14_000  # bits: Python spells no number of more than 4,300 digits


def counted(number: int, noun: str) -> str:
    """A count with its noun: `1 row`, `1,234 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shorten(value: object, limit: int = 80) -> str:
    """The value as it would be typed, cut to `limit` characters, for use inside an error line.

    No more of it is spelled than is shown: what a user gave can be millions of values deep, wide or long.
    """
    text = ""
    for piece in _spelled(value, limit):
        text += piece
        if len(text) > limit:
            return text[: limit - 1] + "…"
    return text


def clip(text: str, limit: int = 80) -> str:
    """Text cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _spelled(value: object, limit: int) -> Iterator[str]:
    """A value's spelling, piece by piece."""
    if isinstance(value, dict):
        yield "{"
        for place, (key, item) in enumerate(value.items()):
            yield ", " if place else ""
            yield from _spelled(key, limit)
            yield ": "
            yield from _spelled(item, limit)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for place, item in enumerate(value):
            yield ", " if place else ""
            yield from _spelled(item, limit)
        yield "]"
    elif isinstance(value, int) and value.bit_length() > LONG_NUMBER:
        yield "a number of thousands of digits"  # which Python spells no more
    else:
        yield repr(value[:limit] if isinstance(value, str | bytes) else value)


MARKUP = str.maketrans(
    {"\\": "\\\\", "&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "\\`", "*": "\\*", "[": "\\["}
)


def inline(text: str) -> str:
    """Text of a model or a file in one line, with what Markdown or HTML would read as more than a sign escaped."""
    return " ".join(text.translate(MARKUP).split())

"""Text for people: lines, numbers with their unit, tables, Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum

LONG_NUMBER = 14_000  # bits: Python refuses to print integers of more than 4,300 digits
UNITS = ("B", "kB", "MB", "GB", "TB")


def counted(number: int, noun: str) -> str:
    """A count with its noun: `1 row`, `1,234 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def number(value: float) -> str:
    """A number with three significant digits, without an exponent unless it is very small or very large."""
    if value == 0 or not 1e-4 <= abs(value) < 1e15:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".")


def size(count: float) -> str:
    """Bytes in units of a thousand, as the trainers count them: `812 B`, `1.23 GB`."""
    power = 0
    while count >= 999.5 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{number(count) if power else f'{count:.0f}'} {UNITS[power]}"


def megabytes(mb: float) -> str:
    """Memory given in MB: `812 MB`, `1.23 GB`."""
    return size(mb * 1e6)


def duration(seconds: float) -> str:
    """A time span as people say it: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 99.5:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"


def one_line(text: str) -> str:
    """The text in one line, with single spaces."""
    return " ".join(text.split())


def clip(text: str, limit: int = 80) -> str:
    """The text, cut at its end if it is longer than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def clip_middle(text: str, limit: int) -> str:
    """The text, cut in its middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def shorten(value: object, limit: int = 80) -> str:
    """The value as a user would type it, cut to `limit` characters, to quote in an error line. Formats no more of the
    value than it returns, since users can give values with millions of items or levels."""
    text = ""
    for piece in _spelled(value, limit):
        text += piece
        if len(text) > limit:
            return text[: limit - 1] + "…"
    return text


def _spelled(value: object, limit: int) -> Iterator[str]:
    """A value's text, piece by piece."""
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
        yield "a number of thousands of digits"
    else:
        yield repr(value[:limit] if isinstance(value, str | bytes) else value)


def enum_value(value: object) -> str:
    """The value of an enum's member; any other value as text."""
    return str(value.value if isinstance(value, Enum) else value)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table for a terminal. The first `left` columns are aligned left, the others right."""
    from rich.cells import cell_len  # some letters take two columns

    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        line = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            line.append(cell + space if place < left else space + cell)
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int | None = None) -> str:
    """A Markdown table. With `left`, the columns after the first `left` are aligned right. Cells are not escaped."""
    marks = ["---" if left is None or place < left else "---:" for place in range(len(header))]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (header, marks, *rows))


MARKUP = str.maketrans(
    {"\\": "\\\\", "&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "\\`", "*": "\\*", "[": "\\["}
)


def inline(text: str) -> str:
    """Text from a model or a file in one line, with the characters that Markdown or HTML would interpret escaped."""
    return one_line(text.translate(MARKUP))

"""What is printed: without the user's home and secrets, and without what would steer a terminal."""

from __future__ import annotations

import sys
import unicodedata
from typing import TextIO

from perlcli.redaction import hidden

LINES, JOINERS = "\n\t", "\u200c\u200d"  # Persian and families of emoji need the latter


def say(text: str = "", file: TextIO | None = None) -> None:
    """Print text in which data, models and files may have put anything; on standard output where no file is given."""
    put(visible(hidden(text)), file)


def put(text: str, file: TextIO | None = None) -> None:
    """Print text as it is, and what the stream can't encode as its number."""
    stream = file or sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def visible(text: str) -> str:
    """The text with what would steer a terminal spelled out."""
    return "".join(c if _is_text(c) else c.encode("unicode_escape").decode() for c in text)


def _is_text(letter: str) -> bool:
    """Whether a letter is printed as itself: as it is text, a space of any width, or joins others into one."""
    return letter.isprintable() or letter in LINES + JOINERS or unicodedata.category(letter) == "Zs"

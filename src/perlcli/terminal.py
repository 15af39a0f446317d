"""Printing, without the user's home and secrets and without terminal control characters."""

from __future__ import annotations

import sys
import unicodedata
from typing import TextIO

from perlcli.redaction import hidden

LINES, JOINERS = "\n\t", "\u200c\u200d"  # Persian and combined emoji need the joiners


def say(text: str = "", file: TextIO | None = None) -> None:
    """Prints text that may contain anything, since data, models and files contribute to it; by default to stdout."""
    put(visible(hidden(text)), file)


def put(text: str, file: TextIO | None = None) -> None:
    """Prints text as it is, with escapes for the characters that the stream can't encode."""
    stream = file or sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def visible(text: str) -> str:
    """The text with its terminal control characters escaped."""
    return "".join(letter if _is_text(letter) else letter.encode("unicode_escape").decode() for letter in text)


def _is_text(letter: str) -> bool:
    return letter.isprintable() or letter in LINES + JOINERS or unicodedata.category(letter) == "Zs"

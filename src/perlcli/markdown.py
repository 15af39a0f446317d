"""Text of others as Markdown that is nothing but that text."""

from __future__ import annotations

MARKUP = str.maketrans(
    {"\\": "\\\\", "&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "\\`", "*": "\\*", "[": "\\["}
)


def inline(text: str) -> str:
    """Text of a model or a file in one line, with what Markdown or HTML would read as more than a sign escaped."""
    return " ".join(text.translate(MARKUP).split())

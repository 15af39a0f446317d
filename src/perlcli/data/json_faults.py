"""Faults of decoded JSON: nested too deeply, a key given twice, text with a lone surrogate."""

from __future__ import annotations

import json
import re
from collections import Counter

from perlcli.text import shorten

DEEPEST = 50  # levels: code that writes and shows rows later recurses once per level
TOO_DEEP = "nested too deeply"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it; UTF-8 text can't hold one unescaped


class _Duplicate(dict[str, object]):
    """An object in which a key appears twice."""

    key = ""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON; marked if a key appears twice, as it is unknown which value is meant."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    duplicate = _Duplicate(value)
    duplicate.key = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return duplicate


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def fault_of(value: object, text: str) -> str:
    """What is wrong with a value that `DECODER` made of a JSON text; empty if nothing is."""
    level: list[object] = [value]
    for _ in range(DEEPEST):
        inner: list[object] = []
        for item in level:
            if isinstance(item, _Duplicate):
                return f"duplicate key: {shorten(item.key)}"
            if isinstance(item, dict | list):
                inner.extend(item.values() if isinstance(item, dict) else item)
        if not inner:
            return _lone_surrogate(value) if SURROGATE.search(text) else ""
        level = inner
    return TOO_DEEP


def _lone_surrogate(value: object) -> str:
    """A fault if some text has half of a surrogate pair: JSON can escape it, but no tokenizer accepts it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        letter = error.object[error.start].encode("unicode_escape").decode()
        return f"{letter} is half of a surrogate pair: remove it, or write both halves"
    return ""


def why_undecoded(error: ValueError | RecursionError) -> str:
    """Why a decoder gave up on JSON that is valid: it is nested too deeply, or has a number of thousands of digits."""
    return TOO_DEEP if isinstance(error, RecursionError) else str(error)

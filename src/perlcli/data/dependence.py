"""Which rows are not independent of each other: those of one prompt, and those of one dialog."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from perlcli.data.rows import Content, Message, Row
from perlcli.text import one_line

BYTES = 16


def groups(rows: Sequence[Row]) -> list[int]:
    """A number for each row, the same for rows that are not independent: those with the same prompt, and those whose
    prompt continues that of another row, as the later turns of a dialog do. A row without a prompt is by itself."""
    prefixes = [list(_prefixes(row.prompt)) for row in rows]
    prompts = {own[-1] for own in prefixes if own}
    numbers: dict[bytes | int, int] = {}
    found = []
    for place, own in enumerate(prefixes):
        first = next((digest for digest in own if digest in prompts), place)
        found.append(numbers.setdefault(first, len(numbers)))
    return found


def _message(message: Message) -> bytes:
    """A message as bytes, the same apart from white space."""
    fields = {key: one_line(value) if isinstance(value, str) else value for key, value in message.items()}
    return json.dumps(fields, sort_keys=True, default=str).encode()


def _prefixes(prompt: Content | None) -> Iterator[bytes]:
    """The digests of a prompt's first lines or messages: of the first, of the first two, and so on up to all."""
    digest = hashlib.blake2b(digest_size=BYTES)
    if prompt is None:
        return
    parts = prompt.strip().splitlines() or [""] if isinstance(prompt, str) else prompt
    for part in parts:
        digest.update(one_line(part).encode() if isinstance(part, str) else _message(part))
        digest.update(b"\n")
        yield digest.digest()

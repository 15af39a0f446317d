"""What is found in rows before they become tokens: empty completions, repeats, labels, prompts on both sides."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from perlcli.data.rows import Content, Data, Demonstration, Preference, Prompt, Row, Thumb

EMPTY, REPEATED = "with an empty completion", "that repeat an earlier row"


def inspect(data: Data) -> None:
    """Leave out the rows with an empty completion, and put repeats and labels into the report."""
    keep(data, [not is_empty(row) for row in data.rows], EMPTY)
    data.report.repeated = [data.numbers[place] for place in repeats(data.rows)]
    data.report.labels = labels(data.rows)


def drop_repeats(data: Data) -> None:
    """Keep the first of rows that are exactly the same."""
    again = set(repeats(data.rows))
    keep(data, [place not in again for place in range(len(data.rows))], REPEATED)
    data.report.repeated = []


def keep(data: Data, wanted: list[bool], reason: str) -> None:
    """Leave the rows that aren't wanted out, and count them under the reason."""
    if all(wanted):
        return
    for number, stays in zip(data.numbers, wanted, strict=True):
        if not stays:
            data.report.drop(reason, number)
    rows = [row for row, stays in zip(data.rows, wanted, strict=True) if stays]
    restrict(data, rows, [number for number, stays in zip(data.numbers, wanted, strict=True) if stays])


def restrict(data: Data, rows: list[Row], numbers: list[int]) -> None:
    """Let these rows be all there are, and the report tell of them alone."""
    standing = set(numbers)
    data.rows, data.numbers = rows, numbers
    data.report.kept, data.report.labels = len(rows), labels(rows)
    data.report.repeated = [number for number in data.report.repeated if number in standing]
    data.report.overlap = [number for number in data.report.overlap if number in standing]


def is_empty(row: Row) -> bool:
    """Whether a completion says nothing; of a pair, whether the chosen one does: silence can be the worse answer."""
    if isinstance(row, Prompt):
        return False
    content = row.chosen if isinstance(row, Preference) else row.completion
    texts = [content] if isinstance(content, str) else [message["content"] for message in content]
    return not any(text.strip() for text in texts)


def repeats(rows: Iterable[Row]) -> list[int]:
    """The places of the rows that equal an earlier one."""
    seen: set[bytes] = set()
    found = []
    for place, row in enumerate(rows):
        mark = hashlib.blake2b(encoded(row), digest_size=16).digest()  # rows can be long, and many
        if mark in seen:
            found.append(place)
        seen.add(mark)
    return found


def fingerprint(rows: Iterable[Row | None]) -> str:
    """A digest of the rows' content and order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(encoded(row))
    return digest.hexdigest()[:16]


def encoded(row: Row | None) -> bytes:
    """A row's kind and content as bytes, the same for equal rows."""
    fields = [getattr(row, item.name) for item in dataclasses.fields(row)] if row is not None else []
    return json.dumps([type(row).__name__, *fields], sort_keys=True, default=str).encode()


def labels(rows: Iterable[Row]) -> dict[str, int]:
    """How many thumbs are up and how many down; empty for rows of another kind."""
    found = [row.label for row in rows if isinstance(row, Thumb)]
    return {"up": sum(found), "down": len(found) - sum(found)} if found else {}


def prompt_mark(row: Row) -> bytes:
    """A digest that rows of the same prompt share, white space aside.

    A conversation without a prompt of its own counts by what stands before the first answer, a text by all of it.
    """
    content: Any = row.prompt
    if content is None and isinstance(row, Preference):
        content = [row.chosen, row.rejected]
    elif content is None and isinstance(row, Demonstration):
        content = row.completion if isinstance(row.completion, str) else _opening(row.completion)
    return hashlib.sha256(json.dumps(_plain(content)).encode()).digest()


def _opening(messages: list[dict[str, str]]) -> Content:
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return messages[: max(first, 1)]


def _plain(content: Any) -> Any:
    if isinstance(content, str):
        return " ".join(content.split())
    if isinstance(content, dict):
        return [content["role"], _plain(content["content"])]
    return [_plain(part) for part in content]


def overlap(train: Data, held_out: Data) -> list[int]:
    """The numbers of the held-out rows whose prompt stands among the training rows, too."""
    trained = {prompt_mark(row) for row in train.rows}
    return [n for n, row in zip(held_out.numbers, held_out.rows, strict=True) if prompt_mark(row) in trained]


def percentiles(lengths: list[int]) -> dict[str, int]:
    """The length that 50, 90 and 99 % of rows don't exceed, and the longest."""
    ordered = sorted(lengths)
    found = {f"p{part}": ordered[-(-len(ordered) * part // 100) - 1] for part in (50, 90, 99)}
    return {**found, "max": ordered[-1]}

"""What is found in rows before they become tokens: empty completions, repeats, labels, prompts on both sides."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from perlcli.data.rows import (
    Content,
    Data,
    DataReport,
    Demonstration,
    Numbers,
    Preference,
    Prompt,
    Row,
    Thumb,
    is_blank,
)
from perlcli.text import one_line

EMPTY, REPEATED = "with an empty completion", "repeating an earlier row"
MARK = 16  # bytes of a digest


class Marks:
    """Digests of rows, and the numbers of the rows: 24 bytes a row, as there can be many."""

    def __init__(self) -> None:
        self._marks, self._numbers = bytearray(), array("q")

    def add(self, mark: bytes, number: int) -> None:
        """Keep a digest, of which the first bytes count, and its row's number."""
        self._marks += mark[:MARK]
        self._numbers.append(number)

    def __iter__(self) -> Iterator[bytes]:
        return unpacked(self._marks)

    def repeated(self) -> Numbers:
        """The numbers of the rows whose digest stands before, too, in the order in which they were added."""
        import numpy as np

        marks = np.frombuffer(bytes(self._marks), dtype=[("first", "u8"), ("second", "u8")])
        order = np.lexsort((marks["second"], marks["first"]))  # stable: of equal ones the earliest comes first
        again = order[1:][marks[order[1:]] == marks[order[:-1]]]
        return [self._numbers[place] for place in sorted(again.tolist())]

    def found_in(self, other: Iterable[bytes]) -> Numbers:
        """The numbers of the rows whose digest is among the others."""
        mine = set(self)
        both = {mark for mark in other if mark in mine}
        return [number for mark, number in zip(self, self._numbers, strict=True) if mark in both]

    def packed(self, numbers: Iterable[int], more: bytes) -> bytes:
        """The digests of the rows of these numbers and those packed before, each once, in their own order."""
        wanted = set(numbers)
        mine = {mark for mark, number in zip(self, self._numbers, strict=True) if number in wanted}
        return b"".join(sorted(mine.union(unpacked(more))))


def unpacked(content: bytes | bytearray) -> Iterator[bytes]:
    """The digests that stand one after the other in what `Marks` packed."""
    return (bytes(content[place : place + MARK]) for place in range(0, len(content), MARK))


class Tally:
    """What rows say together, whichever way they come: their fingerprint, repeats and thumbs."""

    def __init__(self) -> None:
        self._digest, self._marks, self._thumbs = hashlib.sha256(), Marks(), Counter[bool]()

    def add(self, number: int, row: Row) -> None:
        """Count a row in."""
        whole = encoded(row)
        self._digest.update(whole)
        self._marks.add(mark(whole), number)
        if isinstance(row, Thumb):
            self._thumbs[row.label] += 1

    def put(self, report: DataReport) -> None:
        """Tell the report."""
        report.fingerprint = self._digest.hexdigest()[:16]
        report.repeated = self._marks.repeated()
        report.labels = {"up": self._thumbs[True], "down": self._thumbs[False]} if self._thumbs else {}


def tally(data: Data) -> None:
    """Put what the rows say together into their report."""
    found = Tally()
    for number, row in zip(data.numbers, data.rows, strict=True):
        found.add(number, row)
    found.put(data.report)


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
    return is_blank(row.chosen if isinstance(row, Preference) else row.completion)


def repeats(rows: Iterable[Row]) -> list[int]:
    """The places of the rows that equal an earlier one."""
    found = Marks()
    for place, row in enumerate(rows):
        found.add(mark(encoded(row)), place)
    return found.repeated()


def mark(content: bytes) -> bytes:
    """A digest of a row's content."""
    return hashlib.blake2b(content, digest_size=MARK).digest()


def encoded(row: Row) -> bytes:
    """A row's kind and content as bytes, the same for equal rows."""
    fields = [getattr(row, item.name) for item in dataclasses.fields(row)]
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
        return one_line(content)
    if isinstance(content, dict):
        return [content["role"], _plain(content["content"])]
    return [_plain(part) for part in content]


def prompts(data: Data) -> Marks:
    """The marks of the rows' prompts."""
    found = Marks()
    for number, row in zip(data.numbers, data.rows, strict=True):
        found.add(prompt_mark(row), number)
    return found


def overlap(train: Data, held_out: Data) -> list[int]:
    """The numbers of the held-out rows whose prompt stands among the training rows, too."""
    return prompts(held_out).found_in(prompts(train))


def percentiles(lengths: Iterable[int]) -> dict[str, int]:
    """The length that 50, 90 and 99 % of rows don't exceed, and the longest; a Counter gives all that it counts."""
    counts = Counter(lengths)
    ordered, total = sorted(counts), counts.total()
    found: dict[str, int] = {}
    below = 0
    for length in ordered:
        below += counts[length]
        found |= {
            f"p{part}": length for part in (50, 90, 99) if f"p{part}" not in found and below * 100 >= total * part
        }
    return {**found, "max": ordered[-1]}

"""What a file's bytes hold, row by row: JSON, JSONL and CSV, never more than one row in memory at once.

A row that can't be read is given as a fault with its place, and the next one follows where that is possible. CSV is
read by Python's csv and not by datasets, which guesses numbers, fills short rows and shifts long ones without a word.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from perlcli.data.nesting import HALVES, TOO_DEEP, flaw, unique
from perlcli.data.rows import Found
from perlcli.text import clip, shorten

LONGEST = 64 * 2**20  # bytes: a longer row is no row, and reading on would fill the memory
TOO_LONG = f"longer than {LONGEST // 2**20} MiB, the most that one row may be"
CHUNK = 2**20
CUT_OFF = 16  # characters: an escape, a literal or a number that the end of a chunk cuts in two is shorter
SPACE = re.compile(r"[ \t\r\n]*")


class Unreadable(Exception):
    """Bytes after which nothing more can be read: the place inside the file, and what is wrong."""


def read_json(stream: BinaryIO, name: str) -> Iterator[Found]:
    """Rows of JSON lines, or of one JSON list, which may be one long line."""
    number, offset = 1, 0
    start = stream.readline(CHUNK)
    if start.startswith(codecs.BOM_UTF8):  # Windows tools put a mark first
        start, offset = start.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
    while start and not start.strip():
        number, offset = number + start.count(b"\n"), offset + len(start)
        start = stream.readline(CHUNK)
    is_list = start.lstrip()[:1] == b"["
    try:
        if is_list:
            yield from _List(stream, name, start, number, offset).rows()
        else:
            yield from _json_lines(stream, name, start, number, offset)
    except Unreadable as fault:
        yield _fault(name, fault)


def _json_lines(stream: BinaryIO, name: str, start: bytes, number: int, offset: int) -> Iterator[Found]:
    row = 0
    if start.strip() == b"{":
        what = "an object over several lines: expected one object a line, or a list of them in [ and ]"
        raise Unreadable(f"line {number}", what)
    line = _line(stream, number, start)
    while line:
        if line.strip():
            row += 1
            place = f"row {row}" + (f" (line {number})" if row != number else "")
            try:
                text = _text(line, number, offset).rstrip()
                yield _row(_parse(text, number), f"{name}, {place}", HALVES.search(text))
            except Unreadable as fault:
                yield _fault(name, fault)
        number, offset = number + 1, offset + len(line)
        line = _line(stream, number)


def _fault(name: str, fault: Unreadable) -> Found:
    place, what = fault.args
    return Found(f"{name}, {place}", None, what)


def _line(stream: BinaryIO, number: int, start: bytes = b"") -> bytes:
    """The next line, whose first bytes may have been read before."""
    line = start if start.endswith(b"\n") else start + stream.readline(LONGEST + 1 - len(start))
    if len(line) > LONGEST:
        raise Unreadable(f"line {number}", TOO_LONG)
    return line


def _text(line: bytes, number: int, offset: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(line, number, offset, error) from error


def _not_text(found: bytes, number: int, offset: int, error: UnicodeDecodeError) -> Unreadable:
    kinds = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", b"\x1f\x8b": "gzip: name the file .gz"}
    start = next((kind for mark, kind in kinds.items() if offset == 0 and found.startswith(mark)), "")
    what = f"not UTF-8 text: found 0x{error.object[error.start]:02x}" + (f" (it looks like {start})" if start else "")
    return Unreadable(f"line {number}, byte {offset + error.start}", what)


def _parse(text: str, number: int) -> Any:
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {number + error.lineno - 1}, column {error.colno}"
        raise Unreadable(place, _no_json(error.msg, text, error.pos)) from error
    except (RecursionError, ValueError) as error:
        raise Unreadable(f"line {number}", _odd_json(error)) from error


def _no_json(message: str, text: str, position: int) -> str:
    near = text[max(0, position - 20) : position + 20].strip()
    return f"not valid JSON ({message}) at {shorten(near)}" if near else f"not valid JSON ({message})"


def _odd_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return TOO_DEEP
    return str(error)  # Python reads no number of more than 4,300 digits


DECODER = json.JSONDecoder(object_pairs_hook=unique)


def _row(value: Any, place: str, halves: object) -> Found:
    """A parsed value as a row, where it is one; `halves` says whether half a character may stand in it."""
    if not isinstance(value, dict):
        return Found(place, None, f"expected an object with named columns, found {shorten(value)}")
    if what := flaw(value, halves):
        return Found(place, None, what)
    return Found(place, value)


class _List:
    """The rows of one JSON list, read by the chunk: `text` is a part of it, parsed up to `at`, which is at `line`."""

    def __init__(self, stream: BinaryIO, name: str, first: bytes, line: int, offset: int) -> None:
        self.stream, self.name, self.line = stream, name, line
        self.offset = offset  # bytes before what the decoder holds
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.before = "", 0, 0  # `before`: characters of this line that `text` no longer has
        self.at_end = False
        self._take(first)

    def rows(self) -> Iterator[Found]:
        self._skip("[")
        row, ended = 0, self._peek() == "]"
        while not ended:
            row += 1
            value, halves = self._value()
            yield _row(value, f"{self.name}, row {row}", halves)
            ended = self._peek() == "]"
            if not ended:
                self._skip(",")
        self._skip("]")
        if self._peek():
            raise self._broken("Extra data", self.at)

    def _value(self) -> tuple[Any, object]:
        """The next value, and whether half a character is spelled in it."""
        self._peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - CUT_OFF
                if self.at_end or not is_cut:
                    raise self._broken(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:
                raise Unreadable(f"line {self.line}", _odd_json(error)) from error
            else:
                if end < len(self.text) or self.at_end:
                    halves = HALVES.search(self.text, self.at, end)
                    self._move(end)
                    return value, halves
            if len(self.text) - self.at > LONGEST:
                raise Unreadable(f"line {self.line}", TOO_LONG)
            self._fill()

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._move(SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text) or self.at_end:
                return self.text[self.at : self.at + 1]
            self._fill()

    def _skip(self, wanted: str) -> None:
        if self._peek() != wanted:
            raise self._broken(f"Expecting '{wanted}'", self.at)
        self._move(self.at + 1)

    def _fill(self) -> None:
        """Read as much again as there is, so that a long row is parsed a few times and not a thousand."""
        start = self.text.rfind("\n", 0, self.at) + 1
        self.before = self.at - start + (0 if start else self.before)
        self.text, self.at = self.text[self.at :], 0
        self._take(self.stream.read(max(CHUNK, len(self.text))))

    def _take(self, found: bytes) -> None:
        pending = len(self.decoder.getstate()[0])
        self.at_end = not found
        try:
            self.text += self.decoder.decode(found, final=self.at_end)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].count(b"\n") + self.text.count("\n", self.at)
            raise _not_text(error.object, self.line + before, self.offset - pending, error) from error
        self.offset += len(found)

    def _move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _broken(self, message: str, position: int) -> Unreadable:
        line = self.line + self.text.count("\n", self.at, position)
        start = self.text.rfind("\n", 0, position) + 1
        column = position - start + 1 + (0 if start else self.before)
        return Unreadable(f"line {line}, column {column}", _no_json(message, self.text, position))


def read_csv(stream: BinaryIO, name: str) -> Iterator[Found]:
    """Rows of a CSV file with a header: every cell is text, an empty one is null."""
    csv.field_size_limit(LONGEST)
    reader = csv.reader(_text_lines(stream), strict=True)
    try:
        header = next(reader, [])
        if fault := _header_fault(header):
            raise Unreadable("line 1", fault)
        row = 0
        for cells in reader:
            if not cells:
                continue
            row += 1
            if len(cells) == len(header):
                yield Found(f"{name}, row {row}", {k: cell or None for k, cell in zip(header, cells, strict=True)})
            else:
                what = f"expected {len(header)} fields ({clip(', '.join(header), 300)}), found {len(cells)}"
                yield Found(f"{name}, line {reader.line_num}", None, what)
    except csv.Error as error:
        yield Found(f"{name}, line {reader.line_num}", None, f"not valid CSV ({error})")
    except Unreadable as fault:
        yield _fault(name, fault)


def _header_fault(header: list[str]) -> str:
    twice = next((column for column, count in Counter(header).items() if count > 1), None)
    if twice is not None:
        return f"the column {shorten(twice)} stands twice in the header"
    if header and "" in header[1:]:
        return "the header has a column without a name"
    return ""


def _text_lines(stream: BinaryIO) -> Iterator[str]:
    offset, number = 0, 1
    while line := _line(stream, number):
        yield _text(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number, offset)
        offset, number = offset + len(line), number + 1

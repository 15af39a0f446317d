"""Reads JSON and JSONL row by row, with never more than one row in memory.

A row that can't be read becomes a fault with its place, and reading continues with the next row if possible.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from perlcli.data.rows import SourceRow
from perlcli.text import shorten

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LONGEST = 64 * 2**20  # bytes of one row: more is not a row, and would fill the memory
TOO_LONG = f"longer than {LONGEST // 2**20} MiB, the limit for one row"
CHUNK = 2**20  # bytes read at once
CUT_OFF = 16  # characters: longer than any escape, literal or number that the end of a chunk can cut in two
GZIP = b"\x1f\x8b"
OVER_LINES = "a JSON object over several lines: write one object per line, or a list of objects in [ and ]"
# Under which names the rows of an object are found, and what may precede them in its first line.
WRAPPERS = ("data", "rows", "examples", "instances", "items", "records", "samples", "train")
ABOUT = "version|name|title|description|dataset|source|license|author|created|created_at|split|total|count|size"
WRAPPED = re.compile(
    rf'\s*{{(?:\s*"(?:{ABOUT})"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*,)*\s*"(?:{"|".join(WRAPPERS)})"\s*:\s*\[\s*'
    r'(?:{(?!\s*"(?:role|from|type)")|\]|$)'
)
SPACE = re.compile(r"[ \t\r\n]*")
Rows = Generator[SourceRow, None, None]  # close it unless it is read to the end: it holds files open
DEEPEST = 50  # levels: code that writes and shows rows later recurses once per level
TOO_DEEP = "nested too deeply"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it; UTF-8 text can't hold one unescaped


class Unreadable(Exception):
    """Content that can't be read: the place inside the file, and what is wrong."""

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(place, fault)
        self.place, self.fault = place, fault

    def row(self, name: str) -> SourceRow:
        """The fault in place of a row of the source with this name."""
        return SourceRow(f"{name}, {self.place}", None, self.fault)


def read_json(stream: BufferedReader, name: str) -> Rows:
    """The rows of JSON lines, or of one JSON list, which may be one long line or in an object like `{"data": […]}`."""
    number, offset = 1, 0
    start = stream.readline(CHUNK)
    if start.startswith(codecs.BOM_UTF8):  # Windows tools write a byte order mark
        start, offset = start.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
    while start and not start.strip():
        number, offset = number + start.count(b"\n"), offset + len(start)
        start = stream.readline(CHUNK)
    is_list = start.lstrip()[:1] == b"["
    try:
        if is_list:
            yield from _List(stream, name, start, number, offset).rows()
        elif start.strip() == b"{" or (WRAPPED.match(_decoded(start)) and _is_all(stream, start)):
            yield from _List(stream, name, start, number, offset).wrapped()
        else:
            yield from _json_lines(stream, name, start, number, offset)
    except Unreadable as error:
        yield error.row(name)


def _decoded(start: bytes) -> str:
    return start[:1000].decode("utf-8", "replace")


def _is_all(stream: BufferedReader, start: bytes) -> bool:
    """Whether the first line is not a complete object with others after it: then it is a row."""
    try:
        DECODER.decode(start.decode())
    except (ValueError, RecursionError):
        return True
    return not stream.peek(1).strip()


def _json_lines(stream: BinaryIO, name: str, start: bytes, number: int, offset: int) -> Rows:
    row = 0
    line = line_of(stream, number, start)
    while line:
        if line.strip():
            row += 1
            place = f"row {row}" + (f" (line {number})" if row != number else "")
            try:
                text = text_of(line, number, offset).rstrip()
                yield _row(_parse(text, number), text, f"{name}, {place}")
            except Unreadable as error:
                yield error.row(name)
        number, offset = number + 1, offset + len(line)
        line = line_of(stream, number)


def line_of(stream: BinaryIO, number: int, start: bytes = b"") -> bytes:
    """The next line; `start` is what has already been read of it."""
    line = start if start.endswith(b"\n") else start + stream.readline(LONGEST + 1 - len(start))
    if len(line) > LONGEST:
        raise Unreadable(f"line {number}", TOO_LONG)
    return line


def text_of(line: bytes, number: int, offset: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(line, number, offset, error) from error


def _not_text(content: bytes, number: int, offset: int, error: UnicodeDecodeError) -> Unreadable:
    what = f"not UTF-8 text: found 0x{error.object[error.start]:02x}"
    if offset == 0 and content.startswith(GZIP):
        what += " (it looks like gzip: its name must end in .gz)"
    else:
        what += " (save the file as UTF-8)"
    return Unreadable(f"line {number}, byte {offset + error.start}", what)


def _parse(text: str, number: int) -> object:
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {number + error.lineno - 1}, column {error.colno}"
        raise Unreadable(place, _invalid_json(error.msg, text, error.pos)) from error
    except (RecursionError, ValueError) as error:
        raise Unreadable(f"line {number}", why_undecoded(error)) from error


def _invalid_json(message: str, text: str, position: int) -> str:
    near = text[max(0, position - 20) : position + 20].strip()
    return f"not valid JSON ({message}) at {shorten(near)}" if near else f"not valid JSON ({message})"


def _row(value: object, text: str, place: str) -> SourceRow:
    """A value and the text it was decoded from as a row, or as a fault if it can't be one."""
    if not isinstance(value, dict):
        found = json.dumps(value) if value is None or isinstance(value, bool) else shorten(value)
        return SourceRow(place, None, f"expected an object with named columns, found {found}")
    if fault := fault_of(value, text):
        return SourceRow(place, None, fault)
    return SourceRow(place, value)


class _List:
    """Reads one JSON list in chunks: `text` is a part of it, parsed up to `at`, which is in line `line`."""

    def __init__(self, stream: BinaryIO, name: str, first: bytes, line: int, offset: int) -> None:
        self.stream, self.name, self.line = stream, name, line
        self.offset = offset  # bytes that have been decoded
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.before = "", 0, 0  # `before`: characters of this line that were dropped from `text`
        self.at_end = False
        self._take(first)

    def wrapped(self) -> Rows:
        """The rows of the list in an object. Raises Unreadable if it has none or several, or can't be read."""
        first, found, others = self.line, "", list[str]()
        self._skip("{")
        while self._peek() != "}":
            key, _ = self._value()
            self._skip(":")
            if key in WRAPPERS and not found and self._peek() == "[":
                found = str(key)
                yield from self._items()
            else:
                value, _ = self._value()
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    others.append(str(key))
            if self._peek() != "}":
                self._skip(",")
        if not found:
            raise Unreadable(f"line {first}", OVER_LINES)
        self._skip("}")
        if self._peek():
            raise self._broken("Extra data", self.at)
        if others:
            names = ", ".join([found, *others])
            raise Unreadable(f"line {first}", f"several lists of rows: {names} (write each to a file of its own)")

    def rows(self) -> Rows:
        """The rows of the list. Raises Unreadable if it can't be read to its end."""
        yield from self._items()
        if self._peek():
            raise self._broken("Extra data", self.at)

    def _items(self) -> Rows:
        self._skip("[")
        row, ended = 0, self._peek() == "]"
        while not ended:
            row += 1
            value, text = self._value()
            yield _row(value, text, f"{self.name}, row {row}")
            ended = self._peek() == "]"
            if not ended:
                self._skip(",")
        self._skip("]")

    def _value(self) -> tuple[object, str]:
        """The next value, and the text it was decoded from."""
        self._peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - CUT_OFF
                if self.at_end or not is_cut:
                    raise self._broken(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:
                raise Unreadable(f"line {self.line}", why_undecoded(error)) from error
            else:
                if end < len(self.text) or self.at_end:
                    text = self.text[self.at : end]
                    self._move(end)
                    return value, text
            if len(self.text) - self.at > LONGEST:
                raise Unreadable(f"line {self.line}", TOO_LONG)
            self._fill()

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = SPACE.match(self.text, self.at)
            self._move(space.end() if space else self.at)
            if self.at < len(self.text) or self.at_end:
                return self.text[self.at : self.at + 1]
            self._fill()

    def _skip(self, wanted: str) -> None:
        if self._peek() != wanted:
            raise self._broken(f"Expecting '{wanted}'", self.at)
        self._move(self.at + 1)

    def _fill(self) -> None:
        """Read as much again as is buffered, so that a long row is parsed a few times and not thousands of times."""
        start = self.text.rfind("\n", 0, self.at) + 1
        self.before = self.at - start + (0 if start else self.before)
        self.text, self.at = self.text[self.at :], 0
        self._take(self.stream.read(max(CHUNK, len(self.text))))

    def _take(self, content: bytes) -> None:
        pending = len(self.decoder.getstate()[0])
        self.at_end = not content
        try:
            self.text += self.decoder.decode(content, final=self.at_end)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].count(b"\n") + self.text.count("\n", self.at)
            raise _not_text(error.object, self.line + before, self.offset - pending, error) from error
        self.offset += len(content)

    def _move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _broken(self, message: str, position: int) -> Unreadable:
        line = self.line + self.text.count("\n", self.at, position)
        start = self.text.rfind("\n", 0, position) + 1
        column = position - start + 1 + (0 if start else self.before)
        return Unreadable(f"line {line}, column {column}", _invalid_json(message, self.text, position))


@contextmanager
def as_utf8(stream: BinaryIO) -> Iterator[BufferedReader]:
    """A file's content as UTF-8 if it is UTF-16 with a byte order mark, as Excel writes it; else as it is. Reading
    raises OSError for broken UTF-16."""
    buffered: BufferedReader = BufferedReader(cast(Any, stream))
    is_utf16 = buffered.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        yield BufferedReader(cast(Any, _Transcoded(buffered))) if is_utf16 else buffered
    finally:
        buffered.detach()  # it would close the stream, which may be standard input


class _Transcoded(RawIOBase):
    """UTF-16 as UTF-8."""

    def __init__(self, source: BufferedReader) -> None:
        self._source, self._decoder, self._left = source, codecs.getincrementaldecoder("utf-16")(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._left:
            content = self._source.read(CHUNK)
            try:
                self._left = self._decoder.decode(content, final=not content).encode()
            except UnicodeDecodeError as error:
                raise OSError(f"not UTF-16 text: {error.reason}") from None
            if not content:
                break
        with memoryview(buffer) as room:
            count = min(len(room), len(self._left))
            room[:count], self._left = self._left[:count], self._left[count:]
        return count


class _Duplicate(dict[str, object]):
    """An object in which `key` appears twice, so that it is unknown which value is meant."""

    key = ""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
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
    return TOO_DEEP if isinstance(error, RecursionError) else "a number of thousands of digits"

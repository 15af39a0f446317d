"""Reads tables row by row: CSV, TSV and CSV with semicolons, and Excel workbooks.

CSV is read with Python's csv and not with datasets, which silently guesses numbers, fills short rows and shifts long
ones.
"""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from perlcli.data.files import LONGEST, Rows, Unreadable, line_of, text_of
from perlcli.data.rows import SourceRow
from perlcli.errors import PerlError, line
from perlcli.text import clip, counted, shorten

DELIMITERS = (",", "\t", ";", "|")
EXCEL = "pip install 'perlcli[excel]'"


def read_csv(stream: BufferedReader, name: str) -> Rows:
    """The rows of a CSV file with a header: every cell is text, an empty cell is null. What separates the cells is the
    mark that the header has most often: a comma, tab, semicolon or bar."""
    csv.field_size_limit(LONGEST)
    lines = _text_lines(stream)
    try:
        first = next(lines, "")
        reader = csv.reader(chain([first], lines), delimiter=delimiter(first), strict=True)
    except Unreadable as error:
        yield error.row(name)
        return
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
                columns = {column: cell or None for column, cell in zip(header, cells, strict=True)}
                yield SourceRow(f"{name}, row {row}", columns)
            else:
                expected = f"{counted(len(header), 'field')} ({clip(', '.join(header), 300)})"
                fault = f"expected {expected}, found {len(cells)}"
                yield Unreadable(f"line {reader.line_num}", fault).row(name)
    except csv.Error as error:
        why = "a carriage return in a line: end lines with LF or CRLF" if "new-line" in str(error) else error
        yield Unreadable(f"line {reader.line_num}", f"not valid CSV ({why})").row(name)
    except Unreadable as error:
        yield error.row(name)


def delimiter(header: str) -> str:
    """What separates the columns in the first line of a file."""
    counts = {mark: len(_cells(header, mark)) for mark in DELIMITERS}
    return max(counts, key=lambda mark: counts[mark])  # the comma, if none has more


def _cells(header: str, mark: str) -> list[str]:
    try:
        return next(csv.reader([header], delimiter=mark), [])
    except csv.Error:
        return []


def _header_fault(header: Sequence[str]) -> str:
    for column, count in Counter(header).items():
        if count > 1:
            return f"duplicate column in the header: {shorten(column)}"
    if header and "" in header[1:]:
        return "the header has a column without a name"
    return ""


def _text_lines(stream: BufferedReader) -> Iterator[str]:
    offset, number = 0, 1
    while line := line_of(stream, number):
        yield text_of(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number, offset)
        offset, number = offset + len(line), number + 1


def read_excel(path: Path) -> Rows:
    """The rows of the first sheet of a workbook, under its header: as in CSV, every cell is text, an empty one is null.
    Raises PerlError if it can't be read, or openpyxl is not installed."""
    try:
        openpyxl: Any = import_module("openpyxl")
    except ImportError as error:
        raise PerlError(f"{path} is an Excel workbook, which needs openpyxl", EXCEL) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # zipfile, XML and openpyxl have errors of their own
        raise PerlError(f"Can't read {path}: {line(error)}", "save it as .xlsx again, or as CSV") from error
    yield from sheet_rows(book.worksheets[0].iter_rows(values_only=True), str(path))


def sheet_rows(rows: Iterator[Sequence[Any]], name: str) -> Rows:
    """The rows of a sheet, of which the first is the header; empty ones are left out."""
    header = [_cell(value) or "" for value in next(rows, ())]
    while header and not header[-1]:
        header.pop()
    if fault := _header_fault(header):
        yield Unreadable("line 1", fault).row(name)
        return
    number = 0
    for values in rows:
        cells = [_cell(value) for value in values]
        if not any(cells):
            continue
        number += 1
        if any(cells[len(header) :]):
            yield SourceRow(f"{name}, row {number}", None, f"expected {counted(len(header), 'cell')}, found more")
        else:
            full = cells[: len(header)] + [None] * (len(header) - len(cells))
            yield SourceRow(f"{name}, row {number}", dict(zip(header, full, strict=True)))


def _cell(value: object) -> str | None:
    """A cell as text: 1.0, as Excel keeps whole numbers, is 1."""
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)

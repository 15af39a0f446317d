"""Tables and wrapped lists: separators that are found, UTF-16, Excel workbooks, lists in an object."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from row_samples import ROWS

from perlcli import data
from perlcli.data import sources, tables
from perlcli.data.rows import SourceRow
from perlcli.errors import PerlError
from perlcli.settings import DataSettings

TEXT = 'prompt,chosen,rejected\na,"b; c\td",e\n'


@pytest.mark.parametrize("mark", [",", "\t", ";", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings_are_found(mark: str, name: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(TEXT.replace(",", mark).encode(encoding))
    rows = [row.raw for row in sources.read(str(path), "train")]
    assert rows == [{"prompt": "a", "chosen": "b; c\td", "rejected": "e"}]


def test_a_table_with_one_column_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt\n"a; b, c"\n')
    assert [row.raw for row in sources.read(str(tmp_path / "a.csv"), "train")] == [{"prompt": "a; b, c"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1.0", "rows": ROWS, "total": 2}),
        json.dumps({"name": "x", "about": {"a": [1]}, "examples": ROWS}, indent=1),
        '{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}\n",
    ],
    ids=["line", "between", "indented", "started"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_rows_are_found_in_an_object(text: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    assert [row.raw for row in sources.read(str(tmp_path / "a.json"), "train")] == ROWS


@pytest.mark.parametrize(
    "rows",
    [
        [{"data": [{"x": 1}]}, {"data": [{"x": 2}]}],
        [{"prompt": "a", "examples": [{"x": 1}]}],
        [{"data": [{"role": "user", "content": "a"}]}],
        [{"data": {"prompt": "a"}}],
    ],
    ids=["several", "a prompt", "messages", "object"],
)
def test_a_row_with_a_list_is_still_a_row(rows: Any, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    assert [row.raw for row in sources.read(str(path), "train")] == rows


def test_excel_needs_openpyxl_and_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(PerlError, match=r"a\.xlsx is an Excel workbook, which needs openpyxl") as caught:
        list(sources.read(str(tmp_path / "a.xlsx"), "train"))
    assert caught.value.hint == "pip install 'perlcli[excel]'"


def test_a_damaged_workbook_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_workbook(*_: object, **__: object) -> None:
        raise ValueError("File is not a zip file")

    monkeypatch.setitem(sys.modules, "openpyxl", types.SimpleNamespace(load_workbook=load_workbook))
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(PerlError, match=r"Can't read .*a\.xlsx: File is not a zip file"):
        data.load(str(tmp_path / "a.xlsx"), "reward", options=DataSettings())


def test_the_first_sheet_of_a_workbook_is_read_like_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [("prompt", "completion", "label", None), ("a", "b", 1.0, None), (None,) * 4, ("c", "d", 0)]
    sheet = types.SimpleNamespace(iter_rows=lambda values_only: iter(cells))
    book = types.SimpleNamespace(worksheets=[sheet, None])
    monkeypatch.setitem(sys.modules, "openpyxl", types.SimpleNamespace(load_workbook=lambda *_, **__: book))
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    rows = [row.raw for row in sources.read(str(tmp_path / "a.xlsx"), "train")]
    assert rows == [{"prompt": "a", "completion": "b", "label": "1"}, {"prompt": "c", "completion": "d", "label": "0"}]
    assert list(tables.sheet_rows(iter([("a",), ("b", "c")]), "x")) == [
        SourceRow("x, row 1", None, "expected 1 cell, found more")
    ]


def test_fields_that_arrow_adds_to_objects_are_left_out(tmp_path: Path) -> None:
    import datasets

    calls = [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {"y": 2}}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}], "note": None} for call in calls]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert [row.raw for row in sources.read(str(tmp_path / "a.parquet"), "train")] == rows

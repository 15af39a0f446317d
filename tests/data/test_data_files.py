"""The content of JSON lines, JSON lists and CSV files, row by row."""

import json
from pathlib import Path
from typing import Any

import pytest
from row_samples import lines

from perlcli import data
from perlcli.data import files, sources
from perlcli.errors import PerlError
from perlcli.settings import DataSettings


def read(source: str, side: str = "train", **options: Any) -> list[Any]:
    """The rows of a source as it has them."""
    return [found.raw for found in sources.read(source, side, DataSettings(**options))]


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    row = {"text": "one\u2028two\x85three\x0bfour"}
    (tmp_path / "a.jsonl").write_bytes(lines(row, row))
    assert read(str(tmp_path / "a.jsonl"), "train") == [row, row]


def test_a_table_by_columns_is_refused_with_the_way_to_write_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}')
    with pytest.raises(PerlError, match=r"a\.json is one object that has .* for each column, not rows") as caught:
        data.load(str(tmp_path / "a.json"), "sft")
    assert 'orient="records"' in caught.value.hint


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"null\n", "row 1: expected an object with named columns, found null"),
        (b"[true]", "row 1: expected an object with named columns, found true"),
        (b'{"text": "Stra\xdfe"}\n', "found 0xdf (save the file as UTF-8)"),
    ],
)
def test_faults_are_in_the_words_of_the_file(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(PerlError) as caught:
        data.load(str(tmp_path / "a.json"), "sft")
    assert told in caught.value.problem


def test_every_cell_of_a_csv_is_text(tmp_path: Path) -> None:
    rows = [{"prompt": word, "label": "1"} for word in ("None", "NA", "null", "nan", "007", "1.50", "1e5", "True", "a")]
    (tmp_path / "a.csv").write_text("prompt,label\n" + "".join(f"{row['prompt']},1\n" for row in rows))
    assert read(str(tmp_path / "a.csv"), "train") == rows


def test_a_list_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a chunk ends, in a character, an escape or a number, the rows are the same."""
    rows = [{"text": 'é\n"\\' * size, "n": 12345, "deep": [{"a": None}]} for size in range(20)]
    for chunk in (1, 2, 3, 7, 64):
        monkeypatch.setattr(files, "CHUNK", chunk)
        for indent in (None, 1):
            (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
            assert read(str(tmp_path / "a.json")) == rows

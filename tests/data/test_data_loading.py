"""Loading a source: what is kept, dropped and reported; the embedded data."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from row_samples import PAIR, ROWS, SHP, lines

from perlcli import coffee, data
from perlcli.data import Prompt, sources


@pytest.mark.parametrize("kind", [list, json.dumps])
def test_standard_input_gives_its_rows(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = lines(*ROWS) if kind is list else json.dumps(ROWS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = data.load("-", "reward")
    assert found.report.line() == "standard input: pairs, 2 rows read, 2 kept"
    assert not sources.has_split("-", "test")


def test_dropped_rows_are_counted_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(PAIR, *[{**PAIR, "chosen": "c"}] * 4, PAIR))
    found = data.load(str(path), "reward")
    assert found.report.line() == f"{path}: pairs, 6 rows read, 2 kept; dropped 4 with equal answers (rows 2, 3, 4…)"
    assert (len(found.rows), found.numbers) == (2, [1, 6])
    assert found.report.summary()["dropped"] == {"with equal answers": {"count": 4, "first_rows": [2, 3, 4, 5]}}


def test_the_fingerprint_is_of_content_and_order(tmp_path: Path) -> None:
    marks = []
    for rows in (ROWS, ROWS, ROWS[::-1], ROWS[:1]):
        (tmp_path / "a.jsonl").write_bytes(lines(*rows))
        marks.append(data.load(str(tmp_path / "a.jsonl"), "reward").report.fingerprint)
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


@pytest.mark.parametrize("use", ["sft", "reward", "rl"])
def test_the_embedded_data_has_a_train_and_a_test_side(use: str) -> None:
    sides = [data.load(None, use, split=split) for split in ("train", "test")]
    assert sides[0].report.source.endswith("train") and sides[1].report.source.endswith("test")
    assert sides[0].report.fingerprint != sides[1].report.fingerprint
    assert len(sides[0].rows) > len(sides[1].rows) >= 200


def test_a_prompt_with_an_order_has_a_gold_check() -> None:
    (row,) = coffee.prompts("test", 1)
    check = data.gold_check(Prompt(row["prompt"], {"order": row["order"]}))
    assert check is not None
    assert check(row["order"]) and not check("add_order_item()")
    assert data.gold_check(Prompt("a")) is None
    assert data.gold_check(Prompt("a", {"order": 7})) is None


@pytest.mark.slow
def test_the_limits_of_shp_hold_where_the_data_is_shp(perl: Any, write: Any, tmp_path: Path) -> None:
    """Held-out pairs in another format are not limited."""
    train = write(tmp_path / "shp.jsonl", [SHP, {**SHP, "score_ratio": 1.2}, {**SHP, "post_id": "p2"}])
    dev = write(tmp_path / "dev.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    options = ("--shp-score-ratio", 2, "--shp-per-post", 1, "--dry-run")
    told = perl("reward", "--data", train, "--eval-data", dev, *options).stdout
    assert f"{train}: shp, 3 rows read, 2 kept; dropped 1 with a score ratio below 2 (row 2)" in told
    assert f"{dev}: pairs, 1 row read, 1 kept" in told
    assert perl("reward", "--data", train, "--eval-data", train, *options).stdout.count("shp, 3 rows read, 2 kept") == 2

"""Data: rows from every kind of source, every known format, and one clear error for whatever else comes."""

import csv
import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from perlcli import coffee, data
from perlcli.cli import app
from perlcli.data import Demonstration, Preference, Prompt, Thumb, sources
from perlcli.data.formats import convert
from perlcli.data.rows import DataReport
from perlcli.errors import PerlError

Raw = dict[str, Any]
PAIR: Raw = {"prompt": "a", "chosen": "b", "rejected": "c"}
THUMB: Raw = {"prompt": "a", "completion": "b", "label": 1}
ROWS: list[Raw] = [PAIR, {"prompt": "Grüße, 世界", "chosen": 'say "x", y', "rejected": "two\nlines"}]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(content: str) -> dict[str, str]:
    return said("user", content)


def agent(content: str) -> dict[str, str]:
    return said("assistant", content)


def lines(*rows: Any) -> bytes:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[Raw], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parquet(rows: list[Raw], path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path)


def saved(rows: list[Raw], path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(path)


# --- sources


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_bytes(lines(*ROWS))),
        ("a.json", lambda path: path.write_bytes(lines(*ROWS))),
        ("a.json", lambda path: path.write_text(json.dumps(ROWS))),
        ("a.json", lambda path: path.write_text("\n " + json.dumps(ROWS, indent=2) + "\n")),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(lines(*ROWS)))),
        ("a.json.gz", lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))),
        ("a.jsonl", lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines(*ROWS))),
        ("a.json", lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())),
        ("a.jsonl", lambda path: path.write_bytes(lines(*ROWS).replace(b"\n", b"\r\n"))),
        ("a.jsonl", lambda path: path.write_bytes(b"\n" + lines(*ROWS).replace(b"\n", b"\n\n").rstrip())),
        ("a.csv", lambda path: table(ROWS, path)),
        ("a.parquet", lambda path: parquet(ROWS, path)),
        ("folder", lambda path: saved(ROWS, path)),
    ],
    ids=["jsonl", "json lines", "json array", "indented array", "jsonl.gz", "json.gz", "BOM", "BOM array", "CRLF",
         "blank lines", "csv", "parquet", "saved data set"],
)  # fmt: skip
def test_every_kind_of_source_gives_the_same_rows(name: str, write: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path / name)
    assert sources.read(str(tmp_path / name), "train") == ROWS


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    row = {"text": "one\u2028two\x85three\x0bfour"}
    (tmp_path / "a.jsonl").write_bytes(lines(row, row))
    assert sources.read(str(tmp_path / "a.jsonl"), "train") == [row, row]


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(lines(*ROWS))
    assert sources.read("~/a.jsonl", "train") == ROWS


def test_a_word_like_none_in_a_csv_is_text(tmp_path: Path) -> None:
    rows = [{"prompt": word, "label": 1} for word in ("None", "NA", "null", "nan", "a")]
    table(rows, tmp_path / "a.csv")
    assert sources.read(str(tmp_path / "a.csv"), "train") == rows


@pytest.mark.parametrize("test", ["test", "validation", "valid", "dev", "eval"])
def test_a_folder_has_a_file_for_each_split(test: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"text": "train"}))
    (tmp_path / f"{test}.json").write_bytes(lines({"text": "held out"}))
    assert sources.read(str(tmp_path), "train") == [{"text": "train"}]
    assert sources.read(str(tmp_path), "test") == [{"text": "held out"}]
    assert sources.has_split(str(tmp_path), "test")


def test_a_saved_data_set_with_splits_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert sources.read(str(tmp_path), "train") == [{"text": "train"}]
    assert sources.read(str(tmp_path), "test") == [{"text": "validation"}]


def test_a_saved_data_set_without_the_split_says_which_it_has(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(tmp_path)
    with pytest.raises(PerlError, match="has no test split: found train"):
        sources.read(str(tmp_path), "test")


@pytest.mark.parametrize("name", [None, "train.jsonl", "nowhere"])
def test_only_a_folder_has_splits(name: str | None, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"text": "a"}))
    assert not sources.has_split(name and str(tmp_path / name), "test")
    assert not sources.has_split(str(tmp_path), "test")


# --- formats

TASK = {"context": json.dumps([{"role": "user", "text": "a latte"}]),
        "generation": json.dumps({"role": "agent", "api": {"add": {"id": "latte"}}}), "reward": 1.0}  # fmt: skip
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: good",
      "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: bad"}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "use", "name", "row"),
    [
        (PAIR, "reward", "pairs", Preference("a", "b", "c")),
        ({"chosen": "b", "rejected": "c"}, "reward", "pairs", Preference(None, "b", "c")),
        ({**PAIR, "prompt": None}, "reward", "pairs", Preference(None, "b", "c")),
        (
            {"prompt": [user("a")], "chosen": [agent("b")], "rejected": [agent("c")]},
            "reward",
            "pairs",
            Preference([user("a")], [agent("b")], [agent("c")]),
        ),
        (
            {"chosen": [user("a"), agent("b")], "rejected": [user("a"), agent("c")]},
            "reward",
            "pairs",
            Preference([user("a")], [agent("b")], [agent("c")]),
        ),
        (
            {"chosen": [agent("b")], "rejected": [agent("c")]},
            "reward",
            "pairs",
            Preference(None, [agent("b")], [agent("c")]),
        ),
        (
            {"chosen": [user("a"), agent("b"), user("d"), agent("e")], "rejected": [user("a"), agent("c")]},
            "reward",
            "pairs",
            Preference([user("a")], [agent("b"), user("d"), agent("e")], [agent("c")]),
        ),
        (
            {"chosen": [user("a"), agent("b"), agent("c")], "rejected": [user("a"), agent("b"), agent("d")]},
            "reward",
            "pairs",
            Preference([user("a")], [agent("b"), agent("c")], [agent("b"), agent("d")]),
        ),
        (
            HH,
            "reward",
            "Anthropic HH pairs",
            Preference([user("hi"), agent("hello"), user("more")], [agent("good")], [agent("bad")]),
        ),
        (THUMB, "reward", "thumbs", Thumb("a", "b", True)),
        (
            {"prompt": [user("a")], "completion": [agent("b")], "label": False},
            "reward",
            "thumbs",
            Thumb([user("a")], [agent("b")], False),
        ),
        (
            TASK,
            "reward",
            "Taskmaster thumbs",
            Thumb([user("user: a latte\nagent:")], [agent('{"add": {"id": "latte"}}')], True),
        ),
        ({"prompt": "a", "completion": "b"}, "sft", "prompt and completion", Demonstration("a", "b")),
        ({"messages": [user("a"), agent("b")]}, "sft", "messages", Demonstration(None, [user("a"), agent("b")])),
        ({"text": "a"}, "sft", "text", Demonstration(None, "a")),
        ({"prompt": "a"}, "rl", "prompts", Prompt("a")),
        ({"prompt": [user("a")], "order": 3}, "rl", "prompts", Prompt([user("a")], {"order": 3})),
    ],
)
def test_a_format_is_known_by_its_columns(raw: Raw, use: str, name: str, row: Any) -> None:
    assert convert([raw], use, "x", chat=True) == (name, [row])


@pytest.mark.parametrize(
    ("raw", "use", "row"),
    [
        (PAIR, "sft", Demonstration("a", "b")),
        (THUMB, "sft", Demonstration("a", "b")),
        ({**THUMB, "label": 0}, "sft", None),
        ({**PAIR, "chosen": "c"}, "reward", None),
        (PAIR, "rl", Prompt("a")),
        (THUMB, "rl", Prompt("a", {"label": 1})),
        ({"messages": [user("a"), agent("b")]}, "rl", Prompt([user("a")], {"messages": [user("a"), agent("b")]})),
        ({"messages": [user("a")]}, "rl", Prompt([user("a")], {"messages": [user("a")]})),
        (HH, "rl", Prompt([user("hi"), agent("hello"), user("more")])),
        (HH, "sft", Demonstration([user("hi"), agent("hello"), user("more")], [agent("good")])),
    ],
)
def test_a_format_serves_other_stages_too(raw: Raw, use: str, row: Any) -> None:
    assert convert([raw], use, "x", chat=True)[1] == [row]


def test_without_a_chat_template_hh_stays_text() -> None:
    prompt = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    assert convert([HH], "reward", "x", chat=False)[1] == [Preference(prompt, " good", " bad")]


def test_hh_conversations_that_part_early_keep_their_own_turns() -> None:
    raw = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: e",
    }
    row = Preference([user("a")], [agent("b"), user("c"), agent("d")], [agent("e")])
    assert convert([raw], "reward", "x", chat=True)[1] == [row]
    text = Preference("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d", " e")
    assert convert([raw], "reward", "x", chat=False)[1] == [text]


def test_without_a_chat_template_taskmaster_stays_text() -> None:
    turns = [{"role": "agent", "text": "Hello"}, {"role": "api", "response": {"é": 1}}]
    raw = {"context": json.dumps(turns), "generation": json.dumps({"role": "agent", "text": "Hi"}), "reward": 0}
    row = Thumb('agent: Hello\napi: {"é": 1}\nagent:', " Hi", False)
    assert convert([raw], "reward", "x", chat=False)[1] == [row]


def test_taskmaster_turns_may_be_objects_already() -> None:
    raw = {key: json.loads(value) if isinstance(value, str) else value for key, value in TASK.items()}
    assert convert([raw], "reward", "x", chat=True) == convert([TASK], "reward", "x", chat=True)


@pytest.mark.parametrize(
    ("label", "expected"),
    [(0, False), (1, True), (0.0, False), (1.0, True), (True, True), (False, False), ("true", True), ("False", False),
     ("0", False), ("1", True)],
)  # fmt: skip
def test_a_label_is_0_or_1_in_any_spelling(label: Any, expected: bool) -> None:
    assert convert([{**THUMB, "label": label}], "reward", "x", chat=True)[1] == [Thumb("a", "b", expected)]


def test_ten_faulty_rows_are_told_and_the_rest_counted() -> None:
    with pytest.raises(PerlError) as caught:
        convert([THUMB, *[{**THUMB, "label": 2}] * 1012], "reward", "rows.jsonl", chat=True)
    told = caught.value.problem.splitlines()
    assert told[0] == "rows.jsonl, row 2: label must be 0, 1, true or false, not 2"
    assert told[9].startswith("rows.jsonl, row 11:")
    assert told[10:] == ["… and 1,002 more rows"]


# --- load, report, fit


def test_what_is_left_out_is_counted_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(PAIR, *[{**PAIR, "chosen": "c"}] * 4, PAIR))
    found = data.load(str(path), "reward")
    assert found.report.line() == f"{path}: pairs, 2 of 6 rows; left out 4 equal pairs (rows 2, 3, 4…)"
    assert (len(found.rows), found.numbers) == (2, [1, 6])
    assert found.report.summary()["dropped"] == {"equal pairs": {"count": 4, "first_rows": [2, 3, 4, 5]}}


def test_three_rows_that_were_left_out_are_all_named() -> None:
    report = DataReport("x", "pairs", 4, 4)
    for number in (1, 2, 4):
        report.drop("equal pairs", number)
    assert report.line() == "x: pairs, 1 of 4 rows; left out 3 equal pairs (rows 1, 2, 4)"


@pytest.mark.parametrize(
    "row", [Demonstration(None, "a"), Preference(None, "a", "b"), Thumb("a", "b", True), Prompt("a")]
)
def test_a_row_can_not_change(row: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.prompt = "b"


def test_rows_that_are_too_long_are_left_out_by_their_number_in_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({**THUMB, "completion": "x" * n} for n in (2, 5, 6, 1))))
    found = data.load(str(tmp_path / "a.jsonl"), "reward")
    kept = data.fit(found, 5, lambda row: {"ids": list(row.completion), "label": 1.0})
    assert [len(row["ids"]) for row in kept] == [2, 5, 1]
    assert (found.report.read, found.report.kept) == (4, 3)
    assert found.report.line().endswith("3 of 4 rows; left out 1 longer than 5 tokens (rows 3)")


def test_the_longest_list_of_a_row_counts() -> None:
    found = data.Data([Prompt("a")], [1], DataReport("x", "pairs", 1, 1))
    with pytest.raises(PerlError, match="every row is longer than 2 tokens\nHint: raise --max-length"):
        data.fit(found, 2, lambda row: {"chosen_ids": [1], "rejected_ids": [1, 2, 3]})


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


@pytest.mark.parametrize(
    ("content", "text"), [("a", "a"), ([user("a")], "a"), ([user("a"), agent("b")], "user: a\nassistant: b")]
)
def test_a_content_is_readable_text(content: Any, text: str) -> None:
    assert data.text_of(content) == text


# --- malformed data, through the command line


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command on bad data, which must end with exit code 2 and one clear error, nothing written."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(command: str, source: Path, *words: str) -> str:
        out = tmp_path / "out"
        found = CliRunner().invoke(app, [command, "--data", str(source), "--output", str(out), *words])
        assert found.exit_code == 2, found.output
        assert not isinstance(found.exception, PerlError)
        assert found.stderr.startswith("Error: ")
        assert "Traceback" not in found.output
        assert not out.exists()
        assert not list(Path().iterdir())
        return found.stderr

    return run


def half_flipped(content: bytes) -> bytes:
    """A gzip file whose middle is spoilt."""
    packed = bytearray(gzip.compress(content))
    packed[len(packed) // 2] ^= 0xFF
    return bytes(packed)


MESSAGES: Raw = {"prompt": [user("a")], "chosen": [agent("b")], "rejected": [agent("c")]}
NEEDED = "`perl reward` needs chosen and rejected (prompt optional); or prompt, completion and label"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b"", "a.jsonl holds no rows"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no rows"),
        ("a.json", b"[]", "a.json holds no rows"),
        ("a.csv", b"", "Can't read {path}: No columns to parse from file"),
        ("a.csv", b"prompt,chosen,rejected\n", "a.csv holds no rows"),
        ("a.jsonl", lines(PAIR) + b'{"prompt": ', "a.jsonl, line 2, column 12: not valid JSON (Expecting value)"),
        ("a.jsonl", lines(PAIR) + b"\n\nprompt: a", "a.jsonl, line 4, column 1: not valid JSON"),
        ("a.jsonl", b"{'prompt': 'a'}", "Hint: the line begins \"{'prompt': 'a'}\""),
        ("a.json", b"[\n" + json.dumps(PAIR).encode() + b",\n{]", "a.json, line 3, column 2: not valid JSON"),
        ("a.json", b"[\n", "a.json, line 2, column 1: not valid JSON (Expecting value)"),
        ("a.json", json.dumps(PAIR, indent=1).encode(), "a.json, line 1, column 2: not valid JSON"),
        ("a.jsonl", '{"prompt": "é"}'.encode("latin-1"), "a.jsonl is not UTF-8 text: byte 12 is 0xe9"),
        ("a.jsonl", "{}".encode("utf-16"), "a.jsonl is not UTF-8 text: byte 0 is 0xff"),
        ("a.jsonl", b"1\n", "a.jsonl, line 1: expected an object with named columns, found 1"),
        ("a.jsonl", lines(PAIR) + b'"text"', "a.jsonl, line 2: expected an object with named columns, found 'text'"),
        ("a.jsonl", b"null", "a.jsonl, line 1: expected an object with named columns, found None"),
        ("a.json", b'[["a", "b"]]', "a.json, row 1: expected an object with named columns, found ['a', 'b']"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: nested too deeply"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: Exceeds the limit (4300 digits)"),
        ("a.jsonl", lines(PAIR) + b'{"prompt": "\\ud83d"}', "a.jsonl, line 2: \\ud83d is half a character"),
        ("a.txt", b"text", "a.txt: unknown kind of file\nHint: known endings: .jsonl, .json, .jsonl.gz"),
        ("a", b"text", "a: unknown kind of file"),
        ("a.jsonl.gz", b"no gzip", "Can't read {path}: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(lines(PAIR))[:-9], "Can't read {path}: Compressed file ended"),
        ("a.jsonl.gz", half_flipped(lines(*[PAIR] * 9)), "Can't read {path}: "),
        ("a.jsonl.gz", b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 9, "Can't read {path}: Error -3 while decompressing"),
        ("a.parquet", b"no parquet", "Can't read {path}: Parquet"),
        ("a.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", "Expected 3 fields in line 3, saw 4"),
        ("a.jsonl", lines({"question": "a", "answer": "b"}), "a.jsonl has the columns question, answer; " + NEEDED),
        ("a.jsonl", lines({"text": "a"}), "has the columns text; " + NEEDED),
        ("a.jsonl", lines({"prompt": "a", "completion": "b"}), "has the columns prompt, completion; " + NEEDED),
        ("a.jsonl", b"{}", "has the columns none; " + NEEDED),
        ("a.jsonl", lines(PAIR, {**PAIR, "chosen": None}), "a.jsonl, row 2: chosen is null"),
        ("a.jsonl", lines(PAIR, {"prompt": "a", "chosen": "b"}), "a.jsonl, row 2: rejected is missing"),
        ("a.jsonl", lines({**PAIR, "chosen": 5}), "row 1: chosen must be text or a list of messages, not 5"),
        ("a.jsonl", lines({**PAIR, "chosen": []}), "row 1: chosen must be text or a list of messages, not []"),
        ("a.jsonl", lines({**PAIR, "chosen": ["b"]}), "row 1: chosen holds 'b', which is not a message"),
        ("a.jsonl", lines({**PAIR, "prompt": [user("a")]}), "row 1: text and messages are mixed in one row"),
        ("a.jsonl", lines({**MESSAGES, "chosen": "b"}), "row 1: text and messages are mixed in one row"),
        ("a.jsonl", lines({**MESSAGES, "chosen": [{"content": "b"}]}), "which is not a message with role and content"),
        ("a.jsonl", lines({**MESSAGES, "chosen": [said("assistant", None)]}), "content is not text: None"),
        ("a.jsonl", lines({**MESSAGES, "chosen": [said("assistant", ["b"])]}), "content is not text: ['b']"),
        ("a.jsonl", lines(THUMB, {**THUMB, "label": 2}), "row 2: label must be 0, 1, true or false, not 2"),
        ("a.jsonl", lines({**THUMB, "label": "yes"}), "row 1: label must be 0, 1, true or false, not 'yes'"),
        ("a.jsonl", lines({**THUMB, "label": 0.5}), "row 1: label must be 0, 1, true or false, not 0.5"),
        ("a.jsonl", lines({**THUMB, "label": float("nan")}), "row 1: label must be 0, 1, true or false, not nan"),
        ("a.jsonl", lines({**THUMB, "label": None}), "row 1: label is null"),
        ("a.jsonl", lines(THUMB, THUMB), "All 2 rows have a thumbs up: there is nothing to tell apart"),
        ("a.jsonl", lines({**THUMB, "label": 0}), "All 1 rows have a thumbs down"),
        ("a.jsonl", lines({**PAIR, "chosen": "c"}), "no row is left to use: {path}: pairs, 0 of 1 rows; left out 1"),
        ("a.jsonl", lines({**PAIR, "chosen": "x " * 2000}), "every row is longer than 1024 tokens"),
        ("a.jsonl", lines({**HH, "rejected": "c"}), "row 1: rejected is not a `\\n\\nHuman: … \\n\\nAssistant: …`"),
        ("a.jsonl", lines({**HH, "rejected": "\n\nHuman: b\n\nAssistant: c"}), "row 1: chosen and rejected share no"),
        ("a.jsonl", lines({**TASK, "context": "[{"}), "row 1: context is not valid JSON (Expecting property name"),
        ("a.jsonl", lines({**TASK, "context": "{}"}), "row 1: context must be a list of turns, not {}"),
        ("a.jsonl", lines({**TASK, "context": "[1]"}), "row 1: context holds 1, which is not a turn with a role"),
        ("a.jsonl", lines({**TASK, "generation": '{"role": "agent"}'}), "turn with neither text nor api nor response"),
        ("a.jsonl", lines({**TASK, "reward": 3}), "row 1: label must be 0, 1, true or false, not 3"),
        ("a.csv", b"prompt,chosen,rejected\na,b,c\na,,c\n", "a.csv, row 2: chosen is null"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_malformed_data_gets_one_clear_error(
    name: str, content: bytes, told: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert told.replace("{path}", str(path)) in refused("reward", path)


@pytest.mark.parametrize(
    ("command", "content", "told"),
    [
        ("sft", {"prompt": "a"}, "has the columns prompt; `perl sft` needs prompt and completion; messages; or text"),
        ("sft", {"text": 5}, "row 1: text must be text, not 5"),
        ("sft", {"messages": "a"}, "row 1: messages must be text or a list of messages, not 'a'"),
        ("sft", {"messages": [user("a"), {"role": "assistant"}]}, "row 1: messages has a message whose content"),
        ("sft", {"prompt": "a", "completion": [agent("b")]}, "row 1: text and messages are mixed in one row"),
        ("sft", {**THUMB, "label": 0}, "no row is left to use: {path}: thumbs, 0 of 1 rows; left out 1 thumbs down"),
        ("rl", {"text": "a"}, "has the columns text; `perl rl` needs prompt (or any format that holds one"),
        ("rl", {"chosen": "a", "rejected": "b"}, "row 1: there is no prompt to answer"),
        ("rl", {"prompt": ""}, "row 1: there is no prompt to answer"),
        ("rl", {"messages": [agent("a")]}, "row 1: there is no prompt to answer"),
        ("rl", {"prompt": "x " * 2000}, "every row is longer than 896 tokens"),
    ],
)
def test_each_command_says_what_it_needs(
    command: str, content: Raw, told: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(content))
    words = ["--reward", "math:fsum"] if command == "rl" else []
    assert told.replace("{path}", str(path)) in refused(command, path, *words)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "no/where/at/all", "nowhere/a.json"])
def test_a_source_that_is_not_there_is_told(name: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert f"--data {tmp_path / name} does not exist" in refused("reward", tmp_path / name)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], "holds no train.* (.jsonl, .json, .jsonl.gz, .json.gz, .csv, .parquet): found nothing"),
        (["notes.txt", "rows.jsonl"], "found notes.txt, rows.jsonl\nHint: name the file itself"),
        (["test.jsonl"], "holds no train.*"),
        (["state.json"], "as a saved data set: "),
        (["dataset_dict.json"], "as a saved data set: "),
    ],
)
def test_a_folder_without_the_data_says_what_it_holds(
    files: list[str], told: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "rows").mkdir()
    for name in files:
        (tmp_path / "rows" / name).write_text("{}")
    found = refused("reward", tmp_path / "rows")
    assert str(tmp_path / "rows") in found
    assert told in found


def test_bad_held_out_data_is_told_before_training(tmp_path: Path, refused: Callable[..., str]) -> None:
    for name, row in (("good", PAIR), ("bad", {"prompt": "a"})):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(row))
    assert "bad.jsonl has the columns prompt" in refused(
        "reward", tmp_path / "good.jsonl", "--eval-data", str(tmp_path / "bad.jsonl")
    )


def test_conversations_need_a_chat_template(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "base").mkdir()
    for path in coffee.BASE.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / "base" / path.name).symlink_to(path)
    (tmp_path / "a.jsonl").write_bytes(lines(MESSAGES))
    found = refused("reward", tmp_path / "a.jsonl", "--model", str(tmp_path / "base"))
    assert "has no chat template, and the data holds conversations\nHint: use an instruct model" in found


def test_a_hub_name_may_have_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sources, "_read_hub", lambda source, split: asked.append(source) or [{"prompt": "a"}])
    sources.read("Skywork/Skywork-Reward-Preference-80K-v0.2", "train")
    assert asked == ["Skywork/Skywork-Reward-Preference-80K-v0.2"]


def test_a_completion_of_a_pair_begins_with_the_assistant() -> None:
    """Conversations that part at a user's turn share a prompt that ends before the answer above it."""
    opening = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ends = [[{"role": "user", "content": said}, {"role": "assistant", "content": "sure"}] for said in ("tea", "milk")]
    _, rows = convert([{"chosen": opening + ends[0], "rejected": opening + ends[1]}], "reward", "x", chat=True)
    assert rows == [Preference(opening[:1], opening[1:] + ends[0], opening[1:] + ends[1])]

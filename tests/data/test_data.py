"""Data: rows from every kind of source, every known format, and one clear error for whatever else comes."""

import csv
import dataclasses
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perlcli import coffee, data
from perlcli.data import Demonstration, Preference, Prompt, Thumb, files, sources
from perlcli.data.formats import Converter
from perlcli.data.rows import DataReport, SourceRow
from perlcli.errors import PerlError
from perlcli.settings import DataSettings

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


def read(source: str, side: str = "train", **options: Any) -> list[Any]:
    """The rows of a source as it has them."""
    return [found.raw for found in sources.read(source, side, DataSettings(**options))]


def converted(
    raws: list[Raw], use: str, *, chat: bool = True, name: str = "x", form: str | None = None
) -> tuple[str, list[Any]]:
    """The format of rows, and the rows in our shape."""
    made = Converter(use, name, chat=chat, name=form)
    rows = [
        row
        for number, raw in enumerate(raws, start=1)
        for row in made.take(number, SourceRow(f"{name}, row {number}", raw))
    ]
    made.faults.check()
    return made.report.format, rows


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
        ("a.csv.gz", lambda path: (table(ROWS, path), path.write_bytes(gzip.compress(path.read_bytes())))),
        ("a.parquet", lambda path: parquet(ROWS, path)),
        ("folder", lambda path: saved(ROWS, path)),
    ],
    ids=[
        "jsonl",
        "json lines",
        "json array",
        "indented array",
        "jsonl.gz",
        "json.gz",
        "BOM",
        "BOM array",
        "CRLF",
        "blank lines",
        "csv",
        "csv.gz",
        "parquet",
        "saved data set",
    ],
)
def test_every_kind_of_source_gives_the_same_rows(name: str, write: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path / name)
    assert read(str(tmp_path / name), "train") == ROWS


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    row = {"text": "one\u2028two\x85three\x0bfour"}
    (tmp_path / "a.jsonl").write_bytes(lines(row, row))
    assert read(str(tmp_path / "a.jsonl"), "train") == [row, row]


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(lines(*ROWS))
    assert read("~/a.jsonl", "train") == ROWS


def test_a_cell_of_a_csv_is_text_whatever_it_looks_like(tmp_path: Path) -> None:
    rows = [{"prompt": word, "label": "1"} for word in ("None", "NA", "null", "nan", "007", "1.50", "1e5", "True", "a")]
    table(rows, tmp_path / "a.csv")
    assert read(str(tmp_path / "a.csv"), "train") == rows


@pytest.mark.parametrize("test", ["test", "validation", "valid", "dev", "eval"])
def test_a_folder_has_a_file_for_each_split(test: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"text": "train"}))
    (tmp_path / f"{test}.json").write_bytes(lines({"text": "held out"}))
    assert read(str(tmp_path), "train") == [{"text": "train"}]
    assert read(str(tmp_path), "test") == [{"text": "held out"}]
    assert sources.has_split(str(tmp_path), "test")


def test_a_saved_data_set_with_splits_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert read(str(tmp_path), "train") == [{"text": "train"}]
    assert read(str(tmp_path), "test") == [{"text": "validation"}]


def test_a_saved_data_set_without_the_split_says_which_it_has(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(tmp_path)
    with pytest.raises(PerlError, match="has no test split: found train"):
        read(str(tmp_path), "test")


@pytest.mark.parametrize("name", [None, "train.jsonl", "nowhere"])
def test_only_a_folder_has_splits(name: str | None, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"text": "a"}))
    assert not sources.has_split(name and str(tmp_path / name), "test")
    assert not sources.has_split(str(tmp_path), "test")


@pytest.mark.parametrize("kind", [list, json.dumps])
def test_standard_input_gives_its_rows(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = lines(*ROWS) if kind is list else json.dumps(ROWS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = data.load("-", "reward")
    assert found.report.line() == "standard input: pairs, 2 rows read, 2 kept"
    assert not sources.has_split("-", "test")


def test_a_list_is_read_by_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a chunk ends, in a character, an escape or a number, the rows are the same."""
    rows = [{"text": 'é\n"\\' * size, "n": 12345, "deep": [{"a": None}]} for size in range(20)]
    for chunk in (1, 2, 3, 7, 64):
        monkeypatch.setattr(files, "CHUNK", chunk)
        for indent in (None, 1):
            (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
            assert read(str(tmp_path / "a.json")) == rows


def test_a_named_split_of_a_folder_is_read(tmp_path: Path) -> None:
    for name in ("train", "test", "extra"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines({"text": name}))
    assert read(str(tmp_path), split="extra") == read(str(tmp_path), "test", split="extra") == [{"text": "extra"}]
    with pytest.raises(PerlError, match=r"contains no dev\.\*"):
        read(str(tmp_path), split="dev")


def test_a_folder_that_is_trained_on_its_test_split_holds_nothing_out(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines({"text": name}))
    assert sources.has_split(str(tmp_path), "test", DataSettings(split="train"))
    assert not sources.has_split(str(tmp_path), "test", DataSettings(split="test"))


@pytest.mark.parametrize("place", [".", "data"])
def test_a_split_may_be_in_shards_as_on_the_hub(place: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    for number, row in enumerate(ROWS):
        parquet([row], tmp_path / place / f"train-0000{number}-of-00002.parquet")
    assert read(str(tmp_path)) == ROWS


def test_a_saved_data_set_with_splits_is_held_out_too(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation", "extra")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")
    splits["train"].save_to_disk(tmp_path / "one")
    assert sources.has_split(str(tmp_path / "all"), "test")
    assert not sources.has_split(str(tmp_path / "one"), "test")
    assert read(str(tmp_path / "all"), split="extra") == [{"text": "extra"}]
    with pytest.raises(PerlError, match="is a saved dataset without splits"):
        read(str(tmp_path / "one"), split="extra")


class Hub:
    """A hub with one data set, in place of the functions of datasets that ask for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, configs: list[str]) -> None:
        import datasets

        self.asked: list[Any] = []
        monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: configs)
        monkeypatch.setattr(datasets, "get_dataset_split_names", self.splits)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def splits(self, path: str, config_name: str | None = None, **options: str) -> list[str]:
        return ["train", "validation"]

    def load(self, path: str, **options: str) -> list[Raw]:
        self.asked.append((path, options))
        return ROWS


@pytest.mark.parametrize(
    ("configs", "options", "asked"),
    [
        (["default"], {}, {"split": "train"}),
        (["default"], {"subset": "harmless-base"}, {"split": "train", "data_dir": "harmless-base"}),
        (["axis", "comparisons"], {"subset": "comparisons"}, {"split": "train", "name": "comparisons"}),
        (["default"], {"split": "validation"}, {"split": "validation"}),
        (["default"], {"split": "train[:10]"}, {"split": "train[:10]"}),
    ],
)
def test_a_hub_data_set_is_asked_for_its_subset_and_split(
    configs: list[str], options: Raw, asked: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, configs)
    assert read("a/b", **options) == ROWS
    assert hub.asked == [("a/b", asked)]
    assert sources.has_split("a/b", "test", DataSettings(split="train"))
    assert not sources.has_split("a/b", "test", DataSettings(split="validation"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"split": "tset"}, "a/b has no tset split: found train, validation\nHint: choose one with --split"),
        (
            {"subset": "comparison"},
            "a/b has no subset comparison: found axis, comparisons\nHint: Did you mean comparis",
        ),
    ],
)
def test_what_a_hub_data_set_does_not_have_is_told(options: Raw, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, ["axis", "comparisons"])
    with pytest.raises(PerlError, match=told):
        read("a/b", **options)


def test_without_a_network_a_hub_name_gets_one_clear_error() -> None:
    with pytest.raises(
        PerlError, match="--data no/such is not a local file or folder, and reading it from the Hub failed"
    ):
        read("no/such")


# --- formats

TASK = {
    "context": json.dumps([{"role": "user", "text": "a latte"}]),
    "generation": json.dumps({"role": "agent", "api": {"add": {"id": "latte"}}}),
    "reward": 1.0,
}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: good",
    "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: bad",
}


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
            "hh",
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
            "taskmaster",
            Thumb([user("user: a latte\nagent:")], [agent('{"add": {"id": "latte"}}')], True),
        ),
        ({"prompt": "a", "completion": "b"}, "sft", "prompt-completion", Demonstration("a", "b")),
        ({"messages": [user("a"), agent("b")]}, "sft", "messages", Demonstration(None, [user("a"), agent("b")])),
        ({"text": "a"}, "sft", "text", Demonstration(None, "a")),
        ({"prompt": "a"}, "rl", "prompts", Prompt("a")),
        ({"prompt": [user("a")], "order": 3}, "rl", "prompts", Prompt([user("a")], {"order": 3})),
    ],
)
def test_a_format_is_known_by_its_columns(raw: Raw, use: str, name: str, row: Any) -> None:
    assert converted([raw], use) == (name, [row])


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
    assert converted([raw], use)[1] == ([] if row is None else [row])


def test_without_a_chat_template_hh_stays_text() -> None:
    prompt = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    assert converted([HH], "reward", chat=False)[1] == [Preference(prompt, " good", " bad")]


def test_hh_conversations_that_part_early_keep_their_own_turns() -> None:
    raw = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: e",
    }
    row = Preference([user("a")], [agent("b"), user("c"), agent("d")], [agent("e")])
    assert converted([raw], "reward")[1] == [row]
    text = Preference("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d", " e")
    assert converted([raw], "reward", chat=False)[1] == [text]


def test_without_a_chat_template_taskmaster_stays_text() -> None:
    turns = [{"role": "agent", "text": "Hello"}, {"role": "api", "response": {"é": 1}}]
    raw = {"context": json.dumps(turns), "generation": json.dumps({"role": "agent", "text": "Hi"}), "reward": 0}
    row = Thumb('agent: Hello\napi: {"é": 1}\nagent:', " Hi", False)
    assert converted([raw], "reward", chat=False)[1] == [row]


def test_taskmaster_turns_may_be_objects_already() -> None:
    raw = {key: json.loads(value) if isinstance(value, str) else value for key, value in TASK.items()}
    assert converted([raw], "reward") == converted([TASK], "reward")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (0, False),
        (1, True),
        (0.0, False),
        (1.0, True),
        (True, True),
        (False, False),
        ("true", True),
        ("False", False),
        ("0", False),
        ("1", True),
    ],
)
def test_a_label_is_0_or_1_in_any_spelling(label: Any, expected: bool) -> None:
    assert converted([{**THUMB, "label": label}], "reward")[1] == [Thumb("a", "b", expected)]


def test_ten_faulty_rows_are_told_and_the_rest_counted() -> None:
    with pytest.raises(PerlError) as caught:
        converted([THUMB, *[{**THUMB, "label": 2}] * 1012], "reward", name="rows.jsonl")
    told = caught.value.problem.splitlines()
    assert told[0] == "rows.jsonl, row 2: label must be 0, 1, true or false, not 2"
    assert told[9].startswith("rows.jsonl, row 11:")
    assert told[10:] == ["… and 1,002 more rows"]


# --- load, report, fit


def test_what_is_left_out_is_counted_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(PAIR, *[{**PAIR, "chosen": "c"}] * 4, PAIR))
    found = data.load(str(path), "reward")
    assert found.report.line() == f"{path}: pairs, 6 rows read, 2 kept; dropped 4 with equal answers (rows 2, 3, 4…)"
    assert (len(found.rows), found.numbers) == (2, [1, 6])
    assert found.report.summary()["dropped"] == {"with equal answers": {"count": 4, "first_rows": [2, 3, 4, 5]}}


def test_three_rows_that_were_left_out_are_all_named() -> None:
    report = DataReport("x", "pairs", 4, 4)
    for number in (1, 2, 4):
        report.drop("equal pairs", number)
    assert report.line() == "x: pairs, 4 rows read, 1 kept; dropped 3 equal pairs (rows 1, 2, 4)"


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
    assert found.report.line().endswith("4 rows read, 3 kept; dropped 1 longer than 5 tokens (row 3)")


def test_the_longest_list_of_a_row_counts() -> None:
    found = data.Data([Prompt("a")], [1], DataReport("x", "pairs", 1, 1))
    with pytest.raises(PerlError, match="every row is longer than 2 tokens\nHint: use a higher --max-length"):
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


def test_a_hub_name_may_have_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sources, "_read_hub", lambda source, side, options: asked.append(source) or iter(()))
    sources.read("Skywork/Skywork-Reward-Preference-80K-v0.2", "train")
    assert asked == ["Skywork/Skywork-Reward-Preference-80K-v0.2"]


def test_a_completion_of_a_pair_begins_with_the_assistant() -> None:
    """Conversations that part at a user's turn share a prompt that ends before the answer above it."""
    opening = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ends = [[{"role": "user", "content": said}, {"role": "assistant", "content": "sure"}] for said in ("tea", "milk")]
    _, rows = converted([{"chosen": opening + ends[0], "rejected": opening + ends[1]}], "reward")
    assert rows == [Preference(opening[:1], opening[1:] + ends[0], opening[1:] + ends[1])]


def test_a_saved_table_with_offsets_that_lead_nowhere_is_told(tmp_path: Path) -> None:
    """Arrow takes the offsets of a file as they are: reading a text from beyond it ended the process."""
    import datasets

    datasets.Dataset.from_list([{"text": "abcdefg"}, {"text": "hij"}]).save_to_disk(str(tmp_path / "saved"))
    (path,) = (tmp_path / "saved").glob("*.arrow")
    offsets = (0).to_bytes(4, "little") + (7).to_bytes(4, "little") + (10).to_bytes(4, "little")
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:4] + (2**30).to_bytes(4, "little") + offsets[8:]))
    with pytest.raises(PerlError, match=r"Can't read .*saved"):
        data.load(str(tmp_path / "saved"), "sft")

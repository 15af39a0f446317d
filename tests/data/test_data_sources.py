"""Rows from files, folders, standard input and Hub datasets."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from row_samples import ROWS, Raw, lines

from perlcli import data
from perlcli.data import sources
from perlcli.errors import PerlError
from perlcli.settings import DataSettings


def read(source: str, side: str = "train", **options: Any) -> list[Any]:
    """The rows of a source as it has them."""
    return [found.raw for found in sources.read(source, side, DataSettings(**options))]


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
        "saved dataset",
    ],
)
def test_every_kind_of_source_gives_the_same_rows(name: str, write: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path / name)
    assert read(str(tmp_path / name), "train") == ROWS


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(lines(*ROWS))
    assert read("~/a.jsonl", "train") == ROWS


@pytest.mark.parametrize("test", ["test", "validation", "valid", "dev", "eval"])
def test_a_folder_has_a_file_for_each_split(test: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"text": "train"}))
    (tmp_path / f"{test}.json").write_bytes(lines({"text": "held out"}))
    assert read(str(tmp_path), "train") == [{"text": "train"}]
    assert read(str(tmp_path), "test") == [{"text": "held out"}]
    assert sources.has_split(str(tmp_path), "test")


def test_a_saved_dataset_gives_the_requested_split(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert read(str(tmp_path), "train") == [{"text": "train"}]
    assert read(str(tmp_path), "test") == [{"text": "validation"}]


def test_a_saved_dataset_without_the_split_lists_its_splits(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(tmp_path)
    with pytest.raises(PerlError, match="has no test split: found train"):
        read(str(tmp_path), "test")


@pytest.mark.parametrize("name", [None, "train.jsonl", "nowhere"])
def test_only_a_folder_has_splits(name: str | None, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"text": "a"}))
    assert not sources.has_split(name and str(tmp_path / name), "test")
    assert not sources.has_split(str(tmp_path), "test")


def test_a_named_split_of_a_folder_is_read(tmp_path: Path) -> None:
    for name in ("train", "test", "extra"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines({"text": name}))
    assert read(str(tmp_path), split="extra") == read(str(tmp_path), "test", split="extra") == [{"text": "extra"}]
    with pytest.raises(PerlError, match=r"contains no dev\.\*"):
        read(str(tmp_path), split="dev")


def test_training_on_the_test_split_leaves_nothing_held_out(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "files",
    [
        ["train.jsonl", "train.csv"],
        ["train.jsonl", "train_2.jsonl"],
        ["train.jsonl", "train2.json"],
        ["train.jsonl", "train-00000-of-00001.jsonl"],
        ["train-00000-of-00002.jsonl"],
        ["train-00000-of-00001.jsonl", "train-00000-of-00001.json"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "train_more.jsonl"],
    ],
    ids=" ".join,
)
def test_a_folder_drops_no_file_of_a_split(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(lines({"text": name}))
    with pytest.raises(PerlError, match=", ".join(files[:1])) as caught:
        read(str(tmp_path))
    assert all(name in caught.value.problem for name in files)
    assert caught.value.hint.startswith("give the file itself, or join the files to one")


def test_a_named_split_is_the_file_with_that_name(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train_2.jsonl"):
        (tmp_path / name).write_bytes(lines({"text": name}))
    with pytest.raises(PerlError) as caught:
        read(str(tmp_path))
    assert caught.value.hint.endswith("; --split train reads train.* only")
    assert read(str(tmp_path), split="train") == [{"text": "train.jsonl"}]
    assert read(str(tmp_path), split="train_2") == [{"text": "train_2.jsonl"}]


def test_the_splits_of_a_saved_dataset_are_recognised(tmp_path: Path) -> None:
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
    """A Hub with one dataset, in place of the functions of datasets that access it."""

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
def test_a_hub_dataset_is_loaded_by_subset_and_split(
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
def test_a_missing_split_or_subset_of_a_hub_dataset_is_an_error(
    options: Raw, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch, ["axis", "comparisons"])
    with pytest.raises(PerlError, match=told):
        read("a/b", **options)


def test_without_a_network_a_hub_name_gets_one_clear_error() -> None:
    with pytest.raises(
        PerlError, match="--data no/such is not a local file or folder, and reading it from the Hub failed"
    ):
        read("no/such")


def test_a_hub_name_may_have_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sources, "_read_hub", lambda source, side, options: asked.append(source) or iter(()))
    sources.read("Skywork/Skywork-Reward-Preference-80K-v0.2", "train")
    assert asked == ["Skywork/Skywork-Reward-Preference-80K-v0.2"]


def test_a_saved_table_with_offsets_out_of_range_is_an_error(tmp_path: Path) -> None:
    """Arrow does not check the offsets in a file: reading text beyond its end killed the process."""
    import datasets

    datasets.Dataset.from_list([{"text": "abcdefg"}, {"text": "hij"}]).save_to_disk(str(tmp_path / "saved"))
    (path,) = (tmp_path / "saved").glob("*.arrow")
    offsets = (0).to_bytes(4, "little") + (7).to_bytes(4, "little") + (10).to_bytes(4, "little")
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:4] + (2**30).to_bytes(4, "little") + offsets[8:]))
    with pytest.raises(PerlError, match=r"Can't read .*saved"):
        data.load(str(tmp_path / "saved"), "sft")


def test_a_model_is_measured_on_the_split_that_is_named(perl: Any, rows: dict[str, Path], reward_run: Path) -> None:
    words = ("eval", "--model", reward_run, "--data", rows["pairs"], "--output", "eval", "--dry-run")
    assert "pairs, 12 rows read, 12 kept" in perl(*words).stdout
    assert "pairs, 32 rows read, 32 kept" in perl(*words, "--split", "train").stdout

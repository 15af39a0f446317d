"""The token cache: the same ids from the file, another file for other content, and no damaged file is used."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from perlcli import settings
from perlcli.data import Data, Preference, Renderer, cache
from perlcli.data.cache import TokenCache
from perlcli.data.chat import Style
from perlcli.data.fitting import Fitting, Room
from perlcli.data.render import of_preference
from perlcli.data.rows import DataReport
from perlcli.model import tokenizers
from perlcli.training.prepare import prepare

TEXTS = [f"text {place}" for place in range(300)]
ROWS = [[place, place + 1, -1][: place % 4] for place in range(300)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / cache.FOLDER


class Encoder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> list[list[int]]:
        self.calls += 1
        return ROWS


def test_what_was_encoded_once_is_read_again(folder: Path) -> None:
    encode = Encoder()
    assert [TokenCache("a").ids(TEXTS, "chat", encode) for _ in range(3)] == [ROWS] * 3
    assert encode.calls == 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("tokenizer", "kind", "texts"),
    [("b", "chat", TEXTS), ("a", "text", TEXTS), ("a", "chat", [*TEXTS[:-1], "other"]), ("a", "chat", TEXTS[::-1])],
    ids=["tokenizer", "kind", "text", "order"],
)
def test_anything_else_is_another_file(tokenizer: str, kind: str, texts: list[str], folder: Path) -> None:
    encode = Encoder()
    TokenCache("a").ids(TEXTS, "chat", encode)
    TokenCache(tokenizer).ids(texts, kind, encode)
    assert (encode.calls, len(list(folder.iterdir()))) == (2, 2)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:100], lambda b: b[:40] + b"x" + b[41:], lambda b: b + b"abcd", lambda b: b"\0" * 8],
    ids=["empty", "cut", "changed", "longer", "zeros"],
)
def test_a_damaged_file_is_encoded_again(damage: Any, folder: Path) -> None:
    encode = Encoder()
    TokenCache("a").ids(TEXTS, "chat", encode)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert TokenCache("a").ids(TEXTS, "chat", encode) == ROWS
    assert (encode.calls, path.read_bytes(), len(list(folder.iterdir()))) == (2, whole, 1)


def test_a_few_texts_are_not_cached(folder: Path) -> None:
    TokenCache("a").ids(TEXTS[:10], "chat", Encoder())
    assert not folder.exists()


def test_a_cache_that_can_not_be_written_is_not_an_error(folder: Path) -> None:
    folder.parent.write_text("a file in its place")
    assert TokenCache("a").ids(TEXTS, "chat", Encoder()) == ROWS


def test_the_least_recently_used_files_are_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = TokenCache("a")
    for place in range(3):
        used.ids([*TEXTS, str(place)], "chat", lambda: [*ROWS, []])
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for age, path in enumerate(reversed(files)):
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(cache, "MOST", 3 * files[0].stat().st_size)
    used.ids([*TEXTS, "0"], "chat", Encoder())  # read from its file, which was the oldest until now
    TokenCache("a").ids([*TEXTS, "3"], "chat", lambda: [*ROWS, []])
    kept = set(folder.iterdir())
    assert (len(kept), files[0] in kept, files[1] in kept, files[2] in kept) == (3, True, False, True)


def test_the_size_is_checked_again_after_much_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST", 1)
    used = TokenCache("a")
    used.ids(TEXTS, "chat", Encoder())
    assert not list(folder.iterdir())
    used.ids(TEXTS, "chat", Encoder())
    assert len(list(folder.iterdir())) == 1  # the size is checked rarely, as there may be thousands of files
    monkeypatch.setattr(cache, "LOOK", 1)
    used.ids(TEXTS[::-1], "chat", Encoder())
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"HF_DATASETS_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/datasets"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/datasets"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/datasets"),
    ],
)
def test_the_folder_is_that_of_datasets(variables: dict[str, str], wanted: str, monkeypatch: Any) -> None:
    for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(wanted)


def test_rows_from_the_cache_are_the_rows_that_were_rendered(llama: Path, folder: Path, monkeypatch: Any) -> None:
    rows: list[Any] = [Preference(f"a latte {place}", "yes", "no") for place in range(100)]
    said, answer = {"role": "user"}, {"role": "assistant", "content": "yes"}
    rows += [Preference([{**said, "content": f"ä {n}"}], [answer], [answer, answer]) for n in range(100)]

    def tokens(render: Renderer) -> Any:
        data = Data(list(rows), list(range(1, 201)), DataReport("x", "pairs", 200, 200))
        return list(Fitting(data.report, Room(1000), partial(of_preference, render), render=render).columns(data))

    tokenizer = AutoTokenizer.from_pretrained(llama)
    wanted = tokens(Renderer(tokenizer, style=Style(chat=False)))
    for _ in range(2):
        render = Renderer(tokenizer, style=Style(chat=False))
        render.cache = tokenizers.token_cache(tokenizer)
        assert tokens(render) == wanted
    assert len(list(folder.iterdir())) == 3  # a batch of texts, and two of conversations


def test_a_run_has_a_cache_and_a_dry_run_has_none(llama: Path, rows: dict[str, Path]) -> None:
    given = {"model": str(llama), "data": str(rows["pairs"])}
    assert prepare(settings.build(settings.Reward, given)).renderer.cache is not None
    assert prepare(settings.build(settings.Reward, {**given, "dry_run": True})).renderer.cache is None

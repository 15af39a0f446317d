"""Reads rows from files, folders, standard input and Hub datasets. Errors name the file and the row or line."""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from perlcli.data.files import Rows, as_utf8, read_json
from perlcli.data.rows import SourceRow
from perlcli.data.tables import read_csv, read_excel
from perlcli.errors import PerlError, line, nearest
from perlcli.settings import DataSettings
from perlcli.text import clip, shorten

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", *TABLES, ".xlsx", ".parquet")
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "dev", "eval")}
SHARD = re.compile(r"-of-0*(\d+)\b")  # the number of shards that a split has
STDIN = "-"
BATCH = 1000  # rows of Parquet in memory at once; the default of datasets is a row group, and it fails on an empty one
ANY = DataSettings()


def read(source: str, side: str, options: DataSettings = ANY) -> Rows:
    """The rows of a local file or folder, of standard input or of a Hub dataset, one by one as the source has them; a
    row that can't be read has its fault. `side` ("train" or "test") selects the split of a folder or Hub dataset unless
    `options.split` names one. Raises PerlError if the source can't be read, partly while the rows are iterated."""
    if not source:
        raise PerlError("--data is empty", "give a file, a folder, the id of a Hub dataset, or - for standard input")
    path = Path(source).expanduser()
    is_local = source == STDIN or path.exists()
    if options.subset is not None and is_local:
        raise PerlError(f"--subset only works with Hub datasets; {title(source)} is not one", "leave out --subset")
    if options.split is not None and (source == STDIN or path.is_file()):
        problem = f"--split works with folders and Hub datasets; {title(source)} is a single file"
        raise PerlError(problem, "leave out --split")
    if source == STDIN:
        return _read_stream(sys.stdin.buffer, title(STDIN), _read_lines)
    if path.is_dir():
        return _read_folder(path, side, options)
    if path.is_file():
        return _read_file(path)
    check_there(source)
    return _read_hub(source, side, options)


def check_there(source: str) -> None:
    """Raises PerlError for a name that can be neither that of a local file or folder nor the id of a Hub dataset."""
    path = Path(source).expanduser()
    if path.is_file() or path.is_dir():
        return
    if path.exists():
        raise PerlError(f"--data {source} is neither a file nor a folder")
    if not _is_hub_name(source):
        raise PerlError(f"--data {source} does not exist", "give a file, a folder, or the id of a Hub dataset")


def is_quick(source: str, side: str, options: DataSettings = ANY) -> bool:
    """Whether the first row of a source is read without datasets or pandas, and can be read again."""
    path = Path(source).expanduser()
    if source == STDIN or not path.exists():
        return False
    names = SPLIT_NAMES[side] if options.split is None else (options.split,)
    files = [path] if path.is_file() else next(filter(None, (_split_files(path, name) for name in names)), [])
    is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    return not is_saved and not any(file.name.endswith((".parquet", ".xlsx")) for file in files)


def title(source: str) -> str:
    """The source's name in messages and records."""
    return "standard input" if source == STDIN else source


def has_split(source: str | None, side: str, options: DataSettings = ANY) -> bool:
    """Whether a folder or Hub dataset has a split for the side, other than `options.split`."""
    split = next(iter(_splits(source, side, options)), None)
    return split is not None and split != options.split


def named(source: str, side: str, options: DataSettings = ANY) -> str:
    """The source's name in the report of one side; of a folder with several splits for it, also which is read."""
    if not Path(source).expanduser().is_dir() or options.split is not None:
        return title(source)
    first, *others = _splits(source, side, options) or [""]
    return f"{source} ({first}, not {' or '.join(others)})" if others else source


def _splits(source: str | None, side: str, options: DataSettings) -> list[str]:
    """The splits of a folder or Hub dataset that could be the side; the first is read."""
    if source is None or source == STDIN:
        return []
    path = Path(source).expanduser()
    if path.is_dir():
        names = _saved_splits(path) or [name for name in SPLIT_NAMES[side] if _split_files(path, name)]
    else:
        names = _hub_splits(source, options) if not path.exists() and _is_hub_name(source) else []
    return [name for name in SPLIT_NAMES[side] if name in names]


def _is_hub_name(source: str) -> bool:
    """Whether a name that is not a local path may be the id of a Hub dataset."""
    return not source.endswith(SUFFIXES) and not source.startswith((".", "/", "~")) and source.count("/") < 2


def _read_file(path: Path) -> Rows:
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise PerlError(f"{path}: unknown file type", f"supported endings: {', '.join(SUFFIXES)}")
    if fault := _placeholder(path):
        raise PerlError(*fault)
    if suffix == ".xlsx":
        return read_excel(path)
    return _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)


def _placeholder(path: Path) -> tuple[str, str] | None:
    """What is wrong with a file that a download left in place of the data, and what to do; None if nothing is."""
    try:
        with path.open("rb") as stream:
            start = stream.read(100).lstrip().lower()
    except OSError as error:
        raise _cant_read(path, error) from error
    if start.startswith(b"version https://git-lfs."):
        return f"{path} is a pointer of Git LFS, not the data", "git lfs pull in its repository"
    if start.startswith((b"<!doctype html", b"<html")):
        return f"{path} is a web page, not data", "download the file itself, on the Hub by its resolve/ address"
    return None


def _read_text(path: Path, suffix: str) -> Rows:
    reader = read_csv if suffix in TABLES else read_json
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield from _read_stream(cast(BinaryIO, stream), str(path), reader)
    except (OSError, EOFError, zlib.error) as error:
        raise _cant_read(path, error) from error


def _read_stream(stream: BinaryIO, name: str, reader: Callable[[BufferedReader, str], Rows]) -> Rows:
    with as_utf8(stream) as content:
        yield from reader(content, name)


def _read_lines(stream: BufferedReader, name: str) -> Rows:
    """The rows of standard input. Raises PerlError if it starts like a table: it has no name that says what it is."""
    start = stream.peek(1)[:100].decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    if start and start[0] not in "{[":
        problem = f"{name} must be JSON lines, not {shorten(start.splitlines()[0])}"
        raise PerlError(problem, "give a file of another type by its name, whose ending says what it is")
    return read_json(stream, name)


def _cant_read(source: object, error: Exception) -> PerlError:
    return PerlError(f"Can't read {source}: {line(error.__cause__ or error)}")


@contextmanager
def _parsing(source: object) -> Iterator[None]:
    """Raises PerlError for any error: the parsers that datasets uses have error types without a common base."""
    try:
        yield
    except Exception as error:
        raise _cant_read(source, error) from error


def _read_parquet(path: Path) -> Rows:
    """The rows as a stream of datasets: nothing is copied to its cache, and one batch is in memory."""
    import datasets

    with _parsing(path):
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True, batch_size=BATCH)
    yield from _numbered(rows, str(path))


def _read_folder(path: Path, side: str, options: DataSettings) -> Rows:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _read_saved(path, side, options)
    names = SPLIT_NAMES[side] if options.split is None else (options.split,)
    for name in names:
        if files := _split_files(path, name):
            others = _similar_files(path, name) if options.split is None else []
            if fault := _files_fault(files, others, path):
                hint = "give the file itself, or join the files to one"
                more = (
                    f"; --split {name} reads {name}.* only"
                    if side == "train" and not _files_fault(files, [], path)
                    else ""
                )
                raise PerlError(fault, hint + more)
            return (row for file in files for row in _read_file(file))
    present = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    wanted = " or ".join(f"{name}.*" for name in names)
    hint = "give the file itself" if options.split is None else "--split takes the name of a file without its ending"
    raise PerlError(f"{path} contains no {wanted} ({', '.join(SUFFIXES)}): found {present}", hint)


def _split_files(path: Path, name: str) -> list[Path]:
    """The files in a folder with the split's name, and its shards as the Hub stores them
    (`data/train-00000-of-00002.parquet`)."""
    found = [file for suffix in SUFFIXES if (file := path / f"{name}{suffix}").is_file()]
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    return found + sorted(file for folder in folders for file in folder.iterdir() if _shard(file.name, name))


def _similar_files(path: Path, name: str) -> list[Path]:
    """Files in a folder that are named like more of the split, such as `train_2.jsonl` next to `train.jsonl`."""
    more = re.compile(rf"{re.escape(name)}(?:[-_. ]|(?=\d))")
    names = [file for file in path.iterdir() if file.name.endswith(SUFFIXES) and more.match(file.name)]
    return sorted(file for file in names if file.name.removeprefix(name) not in SUFFIXES)


def _files_fault(files: list[Path], others: list[Path], folder: Path) -> str:
    """Why it is unclear which rows a split has; empty if these files are one file, or all its shards."""
    shards = [shard for file in files if (shard := SHARD.search(file.name))]
    more = [file for file in others if file not in files]
    if (len(files) > 1 and len(shards) < len(files)) or more:
        names = ", ".join(str(file.relative_to(folder)) for file in [*files, *more])
        return f"{folder} has several files for one split: {clip(names, 300)}"
    counts = {shard[1] for shard in shards}
    if len(counts) > 1 or any(len(files) != int(count) for count in counts):
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        return f"{folder} has {len(files)} of {' or '.join(sorted(counts))} shards of one split: {clip(names, 300)}"
    return ""


def _shard(file: str, split: str) -> bool:
    return file.startswith(f"{split}-") and bool(SHARD.search(file)) and file.endswith(SUFFIXES)


def _saved_splits(path: Path) -> list[str]:
    """The splits of a folder that datasets saved; none if it can't be read, which is reported when it is read."""
    try:
        return list(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _read_saved(path: Path, side: str, options: DataSettings) -> Rows:
    import datasets

    with _parsing(f"{path} as a saved dataset"):
        loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, datasets.Dataset):
        loaded = loaded[_split_of(str(path), list(loaded), side, options)]
    elif options.split is not None:
        raise PerlError(f"--split {options.split}: {path} is a saved dataset without splits", "leave out --split")
    with _parsing(path):
        loaded.data.validate(full=True)  # Arrow would crash while reading a damaged table
    return _numbered(loaded, str(path))


def _numbered(rows: Dataset | IterableDataset, source: str) -> Rows:
    with _parsing(source):
        for number, row in enumerate(rows, start=1):
            yield SourceRow(f"{source}, row {number}", {name: _without_nulls(value) for name, value in row.items()})


def _without_nulls(value: object) -> object:
    """A nested value without the null fields that Arrow gives all objects of a column if one of them has the field."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _split_of(source: str, splits: list[str], side: str, options: DataSettings) -> str:
    wanted = SPLIT_NAMES[side] if options.split is None else (options.split,)
    name = next((name for name in wanted if name in splits), None)
    if name is None:
        asked = side if options.split is None else options.split
        raise PerlError(f"{source} has no {asked} split: found {', '.join(splits)}", "choose one with --split")
    return name


def _read_hub(source: str, side: str, options: DataSettings) -> Rows:
    """The rows of a Hub dataset, from the cache of datasets, so that a second run needs no network. A split may be a
    slice or a sum in the syntax of datasets, like `train[:1000]`."""
    is_part = options.split is not None and any(mark in options.split for mark in "[+")
    split = options.split if is_part else _split_of(source, _hub_splits(source, options), side, options)
    import datasets

    with _from_hub(source):
        return _numbered(datasets.load_dataset(source, split=split, **_subset(source, options)), source)


def _hub_splits(source: str, options: DataSettings) -> list[str]:
    import datasets

    with _from_hub(source):
        chosen = _subset(source, options)
        return list(datasets.get_dataset_split_names(source, chosen.pop("name", None), **chosen))


def _subset(source: str, options: DataSettings) -> dict[str, str]:
    """The subset as an argument of datasets: a configuration's name, else a folder, as in Anthropic/hh-rlhf and SHP."""
    if options.subset is None:
        return {}
    import datasets

    known = datasets.get_dataset_config_names(source)
    if options.subset in known:
        return {"name": options.subset}
    if len(known) > 1:
        hint = nearest(options.subset, known) or "choose one with --subset"
        raise PerlError(f"{source} has no subset {options.subset}: found {', '.join(known[:20])}", hint)
    return {"data_dir": options.subset}


@contextmanager
def _from_hub(source: str) -> Iterator[None]:
    """Raises PerlError for any error: the Hub client raises a different type for each way a request can fail."""
    try:
        yield
    except PerlError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise PerlError(
            f"--data {source} is not a local file or folder, and reading it from the Hub failed: {reason}",
            "check the spelling and your network connection",
        ) from error

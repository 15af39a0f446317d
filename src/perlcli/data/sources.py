"""Where rows come from: files, folders, standard input and hub data sets. Errors name the file and the row or line."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO, cast

from perlcli.data.files import read_csv, read_json
from perlcli.data.rows import Found
from perlcli.errors import PerlError, line, nearest
from perlcli.settings import DataSettings

STREAMED = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz")
SUFFIXES = (*STREAMED, ".parquet")
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "dev", "eval")}
STDIN = "-"
BATCH = 1000  # rows of Parquet in memory at once; by default datasets takes a row group, and fails on an empty one
ANY = DataSettings()
Rows = Generator[Found, None, None]  # to be closed where it isn't read to its end: files are open behind it


def read(source: str, side: str, options: DataSettings = ANY) -> Rows:
    """The rows of a local file or folder, of standard input or of a hub data set, one by one as the source has them.

    `side` ("train" or "test") chooses among the splits of a folder or hub data set where `options.split` names none.
    Raises PerlError where nothing can be read; a row that can't be is a fault in its place.
    """
    if not source:
        raise PerlError("--data is empty", "give a file, a folder, the id of a hub data set, or - for standard input")
    path = Path(source).expanduser()
    is_local = source == STDIN or path.exists()
    if options.subset is not None and is_local:
        raise PerlError(f"--subset {options.subset} is of hub data sets, and {title(source)} is none")
    if source == STDIN:
        _refuse_split(source, options)
        return _standard_input()
    if path.is_dir():
        return _read_folder(path, side, options)
    if path.is_file():
        _refuse_split(source, options)
        return _read_file(path)
    if is_local:
        raise PerlError(f"--data {source} is neither a file nor a folder")
    if not _is_hub_name(source):
        raise PerlError(f"--data {source} does not exist", "give a file, a folder, or the id of a hub data set")
    return _read_hub(source, side, options)


def title(source: str) -> str:
    """The source's name in messages and records."""
    return "standard input" if source == STDIN else source


def has_split(source: str | None, side: str, options: DataSettings = ANY) -> bool:
    """Whether a folder or hub data set has a split for the side, other than the one that it is read for anyway."""
    if source is None or source == STDIN:
        return False
    path = Path(source).expanduser()
    if path.is_dir():
        names = _saved_splits(path) or [name for name in SPLIT_NAMES[side] if _split_files(path, name)]
    else:
        names = _hub_splits(source, options) if not path.exists() and _is_hub_name(source) else []
    found = next((name for name in SPLIT_NAMES[side] if name in names), None)
    return found is not None and found != options.split


def _is_hub_name(source: str) -> bool:
    """Whether a name that is nothing here may be a hub data set's."""
    return not source.endswith(SUFFIXES) and not source.startswith((".", "/", "~")) and source.count("/") < 2


def _refuse_split(source: str, options: DataSettings) -> None:
    if options.split is not None:
        raise PerlError(
            f"--split {options.split} is of folders and hub data sets, and {title(source)} is one file",
            "leave --split out",
        )


def _standard_input() -> Rows:
    yield from read_json(sys.stdin.buffer, title(STDIN))


def _read_file(path: Path) -> Rows:
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise PerlError(f"{path}: unknown kind of file", f"known endings: {', '.join(SUFFIXES)}")
    return _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)


def _read_text(path: Path, suffix: str) -> Rows:
    reader = read_csv if suffix.startswith(".csv") else read_json
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield from reader(cast(BinaryIO, stream), str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise _cant_read(path, error) from error


def _cant_read(source: object, error: Exception) -> PerlError:
    return PerlError(f"Can't read {source}: {line(error.__cause__ or error)}")


def _read_parquet(path: Path) -> Rows:
    """Rows by datasets as a stream: nothing is copied to its cache, or held in memory but one batch."""
    import datasets

    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True, batch_size=BATCH)
        for number, row in enumerate(rows, start=1):
            yield Found(f"{path}, row {number}", row)
    except Exception as error:  # the parsers below raise types of their own, without a common base
        raise _cant_read(path, error) from error


def _read_folder(path: Path, side: str, options: DataSettings) -> Rows:
    if _is_saved(path):
        return _read_saved(path, side, options)
    names = SPLIT_NAMES[side] if options.split is None else (options.split,)
    files = next((files for name in names if (files := _split_files(path, name))), [])
    if not files:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        wanted = " or ".join(f"{name}.*" for name in names)
        hint = (
            "name the file itself" if options.split is None else "--split takes the name of a file without its ending"
        )
        raise PerlError(f"{path} holds no {wanted} ({', '.join(SUFFIXES)}): found {found}", hint)
    return (row for file in files for row in _read_file(file))


def _split_files(path: Path, name: str) -> list[Path]:
    """The split's file in a folder, or its shards as the hub stores them (`data/train-00000-of-00002.parquet`)."""
    single = next((place for suffix in SUFFIXES if (place := path / f"{name}{suffix}").is_file()), None)
    if single is not None:
        return [single]
    return sorted(
        place for folder in (path, path / "data") if folder.is_dir() for place in folder.iterdir()
        if place.name.startswith(f"{name}-") and "-of-" in place.name and place.name.endswith(SUFFIXES)
    )  # fmt: skip


def _is_saved(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _saved_splits(path: Path) -> list[str]:
    """The splits of a folder that datasets saved; none where it has no splits or can't be read, which reading tells."""
    try:
        return list(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _read_saved(path: Path, side: str, options: DataSettings) -> Rows:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # as for a table
        raise PerlError(f"Can't read {path} as a saved data set: {line(error)}") from error
    if isinstance(loaded, datasets.Dataset):
        if options.split is not None:
            raise PerlError(f"--split {options.split}: {path} is a saved data set without splits", "leave --split out")
        return _sound(loaded, str(path))
    return _sound(loaded[_split_of(str(path), list(loaded), side, options)], str(path))


def _sound(rows: Any, source: str) -> Rows:
    """The rows of a table from the disk; raises PerlError for a damaged one, at which Arrow would crash."""
    try:
        rows.data.validate(full=True)
    except Exception as error:  # as for a table
        raise _cant_read(source, error) from error
    return _numbered(rows, source)


def _numbered(rows: Any, source: str) -> Rows:
    try:
        for number, row in enumerate(rows, start=1):
            yield Found(f"{source}, row {number}", row)
    except Exception as error:  # as for a table
        raise _cant_read(source, error) from error


def _split_of(source: str, found: list[str], side: str, options: DataSettings) -> str:
    wanted = SPLIT_NAMES[side] if options.split is None else (options.split,)
    name = next((name for name in wanted if name in found), None)
    if name is None:
        asked = side if options.split is None else options.split
        raise PerlError(f"{source} has no {asked} split: found {', '.join(found)}", "--split NAME chooses one")
    return name


def _read_hub(source: str, side: str, options: DataSettings) -> Rows:
    """Rows of a hub data set, from the disk: datasets keeps what it loaded, and a second run needs no network.

    A split may be a part of one in datasets' words, like `train[:1000]`.
    """
    is_part = options.split is not None and any(mark in options.split for mark in "[+")
    split = options.split if is_part else _split_of(source, _hub_splits(source, options), side, options)
    import datasets

    try:
        return _numbered(datasets.load_dataset(source, split=split, **_subset(source, options)), source)
    except PerlError:
        raise
    except Exception as error:  # the hub's client raises a different type for each way a request can fail
        raise _no_hub(source, error) from error


def _hub_splits(source: str, options: DataSettings) -> list[str]:
    import datasets

    try:
        chosen = dict(_subset(source, options))
        return list(datasets.get_dataset_split_names(source, chosen.pop("name", None), **chosen))
    except PerlError:
        raise
    except Exception as error:  # as above
        raise _no_hub(source, error) from error


def _subset(source: str, options: DataSettings) -> dict[str, str]:
    """A subset as datasets wants it: the name of a configuration, else a folder, as in Anthropic/hh-rlhf and SHP."""
    if options.subset is None:
        return {}
    import datasets

    known = datasets.get_dataset_config_names(source)
    if options.subset in known:
        return {"name": options.subset}
    if len(known) > 1:
        hint = nearest(options.subset, known) or "--subset takes one of them"
        raise PerlError(f"{source} has no subset {options.subset}: found {', '.join(known[:20])}", hint)
    return {"data_dir": options.subset}


def _no_hub(source: str, error: Exception) -> PerlError:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return PerlError(
        f"--data {source} is neither a local file or folder nor a hub data set that can be read: {reason}",
        "check the spelling and the network",
    )

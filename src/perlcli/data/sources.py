"""Where rows come from: local files and folders, and hub data sets. Errors name the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perlcli.errors import PerlError, shorten

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".parquet")
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "dev", "eval")}


def read(source: str, split: str) -> list[dict[str, Any]]:
    """All rows of a local file or folder, or of a hub data set, as the source has them.

    `split` ("train" or "test") chooses among the splits of a folder or hub data set. Raises PerlError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _read_folder(path, split)
    elif path.is_file():
        rows = _read_file(path)
    elif source.endswith(SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise PerlError(f"--data {source} does not exist", "give a file, a folder, or the id of a hub data set")
    else:
        rows = _read_hub(source, split)
    if not rows:
        raise PerlError(f"{source} holds no rows")
    return rows


def has_split(source: str | None, split: str) -> bool:
    """Whether a local folder has a file for the split, so that it can be read without being named."""
    return source is not None and Path(source).is_dir() and _split_file(Path(source), split) is not None


def _read_file(path: Path) -> list[dict[str, Any]]:
    if not path.name.endswith(SUFFIXES):
        raise PerlError(f"{path}: unknown kind of file", f"known endings: {', '.join(SUFFIXES)}")
    if path.name.endswith((".csv", ".parquet")):
        return _read_table(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")  # Windows tools put a mark first
    except UnicodeDecodeError as error:
        raise PerlError(f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise PerlError(f"Can't read {path}: {error}") from error
    return list(_objects(path, text))


def _objects(path: Path, text: str) -> Iterator[dict[str, Any]]:
    if text.lstrip()[:1] == "[":
        yield from (_object(row, f"{path}, row {n}") for n, row in enumerate(_parse(path, text, 1), start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _object(_parse(path, line, number), f"{path}, line {number}")


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        problem = f"{path}, line {line}, column {error.colno}: not valid JSON ({error.msg})"
        begin = text.split("\n")[error.lineno - 1][:60]
        raise PerlError(problem, f"the line begins {shorten(begin)}") from error
    except RecursionError as error:
        raise PerlError(f"{path}, line {first_line}: nested too deeply") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise PerlError(f"{path}, line {first_line}: {error}") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PerlError(f"{place}: expected an object with named columns, found {shorten(value)}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can spell what no text in UTF-8 holds, and tokenizers refuse it
        half = error.object[error.start].encode("unicode_escape").decode()
        raise PerlError(f"{place}: {half} is half a character", "drop it, or write both halves") from error
    return value


def _read_table(path: Path) -> list[dict[str, Any]]:
    import datasets

    is_csv = path.suffix == ".csv"
    reader = datasets.Dataset.from_csv if is_csv else datasets.Dataset.from_parquet
    options = {"keep_default_na": False, "na_values": [""]} if is_csv else {}  # None and NA are words, too
    try:
        return list(reader(str(path), keep_in_memory=True, **options))
    except Exception as error:  # the parsers below raise types of their own, without a common base
        if "corresponds to no data" in str(error):  # a header without rows, in the words of datasets
            return []
        raise PerlError(f"Can't read {path}: {' '.join(str(error.__cause__ or error).split())[:300]}") from error


def _read_folder(path: Path, split: str) -> list[dict[str, Any]]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # as for a table
            raise PerlError(f"Can't read {path} as a saved data set: {' '.join(str(error).split())[:300]}") from error
        return list(loaded if isinstance(loaded, datasets.Dataset) else loaded[_split_of(path, list(loaded), split)])
    file = _split_file(path, split)
    if file is None:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        wanted = " or ".join(f"{name}.*" for name in SPLIT_NAMES[split])
        raise PerlError(f"{path} holds no {wanted} ({', '.join(SUFFIXES)}): found {found}", "name the file itself")
    return _read_file(file)


def _split_file(path: Path, split: str) -> Path | None:
    places = (path / f"{name}{suffix}" for name in SPLIT_NAMES[split] for suffix in SUFFIXES)
    return next((place for place in places if place.is_file()), None)


def _split_of(source: object, found: list[str], split: str) -> str:
    name = next((name for name in SPLIT_NAMES[split] if name in found), None)
    if name is None:
        raise PerlError(f"{source} has no {split} split: found {', '.join(found)}")
    return name


def _read_hub(source: str, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        names = datasets.get_dataset_split_names(source)
        return list(datasets.load_dataset(source, split=_split_of(source, names, split)))
    except PerlError:
        raise
    except Exception as error:  # the hub's client raises a different type for each way a request can fail
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise PerlError(
            f"--data {source} is neither a local file or folder nor a hub data set that can be read: {reason}",
            "check the spelling and the network",
        ) from error

"""Tokens kept between runs, by the texts and the tokenizer they come from. What is damaged is made again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

Ids = list[int]
FOLDER = "perlcli-tokens"
FEWEST = 64  # texts that are worth a file
CHECKSUM = 4  # bytes at the end of a file
MOST = 5 * 10**9  # bytes that the folder may take
LOOK = MOST // 20  # bytes written between two looks at its size


class TokenCache:
    """Files of tokens in the cache folder of Hugging Face's datasets, one for each batch of texts."""

    def __init__(self, tokenizer: str) -> None:
        self.folder = cache_folder() / FOLDER
        self._start = hashlib.sha256(tokenizer.encode())
        self._unlooked = LOOK  # so that the first write looks

    def ids(self, texts: Sequence[str], kind: str, encode: Callable[[], list[Ids]]) -> list[Ids]:
        """The ids of each text: from the file of exactly these texts, else by `encode`, and then kept.

        `kind` tells apart what else decides the ids. A cache that can't be written is no error.
        """
        if len(texts) < FEWEST:
            return encode()
        mark = self._start.copy()
        mark.update(json.dumps([kind, *texts]).encode())
        path = self.folder / f"{mark.hexdigest()[:40]}.ids"
        found = read(path, len(texts))
        if found is not None:
            with suppress(OSError):
                os.utime(path)  # used now
            return found
        found = encode()
        with suppress(OSError):
            self._unlooked += write(path, found)
            if self._unlooked >= LOOK:
                make_room(self.folder)
                self._unlooked = 0
        return found


def cache_folder() -> Path:
    """Where Hugging Face's datasets keeps its files, by the variables that it reads."""
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    hub = os.environ.get("HF_HOME", f"{home}/huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE", f"{hub}/datasets")).expanduser()


def make_room(folder: Path) -> None:
    """Delete the files that were not used for longest, until the others take no more than `MOST`."""
    found = [(status.st_mtime, status.st_size, path) for path in folder.iterdir() if (status := _status(path))]
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= MOST:
            return
        path.unlink(missing_ok=True)
        total -= size


def _status(path: Path) -> os.stat_result | None:
    """What the system knows of a file; None where another run has just deleted it."""
    try:
        return path.stat()
    except OSError:
        return None


def write(path: Path, rows: list[Ids]) -> int:
    """Write the length of each row, then all ids, then a checksum; to the side, and renamed when it is whole. Gives
    the bytes written."""
    content = array("i", [len(row) for row in rows])
    for row in rows:
        content.extend(row)
    whole = content.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as side:
        try:
            side.write(whole + zlib.crc32(whole).to_bytes(CHECKSUM, "little"))
            side.close()
            os.replace(side.name, path)
            return len(whole) + CHECKSUM
        except BaseException:
            Path(side.name).unlink(missing_ok=True)
            raise


def read(path: Path, count: int) -> list[Ids] | None:
    """The rows of a file; None where it isn't there, isn't whole or holds another number of rows."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    content = array("i")
    body, checksum = whole[:-CHECKSUM], whole[-CHECKSUM:]
    if len(body) % content.itemsize or zlib.crc32(body).to_bytes(CHECKSUM, "little") != checksum:
        return None
    content.frombytes(body)
    lengths, place, rows = content[:count], count, []
    if count + sum(lengths) != len(content):
        return None
    for length in lengths:
        rows.append(content[place : place + length].tolist())
        place += length
    return rows

"""A cache of token ids between runs, keyed by the texts and the tokenizer. A damaged file is encoded again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from perlcli.run.disk import grant

Ids = list[int]
FOLDER = "perlcli-tokens"
FEWEST = 64  # texts for which a file is worthwhile
CHECKSUM = 4  # bytes at the end of a file
MOST = 5 * 10**9  # bytes that the folder may take up
LOOK = MOST // 20  # bytes written between two checks of its size


class TokenCache:
    """Files of token ids in the cache folder of Hugging Face datasets, one for each batch of texts."""

    def __init__(self, tokenizer: str) -> None:
        self.folder = cache_folder() / FOLDER
        self._start = hashlib.sha256(tokenizer.encode())
        self._unchecked = LOOK  # bytes written since the last check; the first write checks

    def ids(self, texts: Sequence[str], kind: str, encode: Callable[[], list[Ids]], lists: int = 1) -> list[Ids]:
        """The ids of each text: from the file of exactly these texts, else from `encode`, and then cached. `kind` is
        part of the key, for whatever else the ids depend on. With more `lists` of a text, those of all texts follow
        each other. A cache that can't be written is not an error."""
        if len(texts) < FEWEST:
            return encode()
        key = self._start.copy()
        key.update(json.dumps([kind, *texts]).encode())
        path = self.folder / f"{key.hexdigest()[:40]}.ids"
        cached = read(path, lists * len(texts))
        if cached is not None:
            with suppress(OSError):
                os.utime(path)  # mark it as used
            return cached
        ids = encode()
        with suppress(OSError):
            self._unchecked += write(path, ids)
            if self._unchecked >= LOOK:
                make_room(self.folder)
                self._unchecked = 0
        return ids


def cache_folder() -> Path:
    """The cache folder of Hugging Face datasets, by the environment variables that it reads."""
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    hub = os.environ.get("HF_HOME", f"{home}/huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE", f"{hub}/datasets")).expanduser()


def make_room(folder: Path) -> None:
    """Delete the least recently used files until the others take up no more than `MOST` bytes."""
    files = []
    for path in folder.iterdir():
        with suppress(OSError):  # another run may just have deleted it
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MOST:
            return
        path.unlink(missing_ok=True)
        total -= size


def write(path: Path, rows: list[Ids]) -> int:
    """Write the length of each row, then all ids, then a checksum, and return the number of bytes. The file is written
    under a temporary name and renamed when it is complete."""
    content = array("i", [len(row) for row in rows])
    for row in rows:
        content.extend(row)
    body = content.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as temporary:
        try:
            temporary.write(body + zlib.crc32(body).to_bytes(CHECKSUM, "little"))
            temporary.close()
            grant(Path(temporary.name))
            os.replace(temporary.name, path)
            return len(body) + CHECKSUM
        except BaseException:
            Path(temporary.name).unlink(missing_ok=True)
            raise


def read(path: Path, count: int) -> list[Ids] | None:
    """The rows of a file; None if it is missing or damaged, or has another number of rows."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content = array("i")
    body, checksum = stored[:-CHECKSUM], stored[-CHECKSUM:]
    if len(body) % content.itemsize or zlib.crc32(body).to_bytes(CHECKSUM, "little") != checksum:
        return None
    content.frombytes(body)
    lengths, ids = content[:count], iter(content[count:])
    if count + sum(lengths) != len(content):
        return None
    return [list(islice(ids, length)) for length in lengths]

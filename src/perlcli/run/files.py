"""The files in a run's folder: their names, and how to write and read them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from perlcli.redaction import hidden_in
from perlcli.run import checkpoints, disk
from perlcli.settings.types import is_plain

RECORD, SETTINGS, METRICS, SAMPLES = "record.json", "settings.yaml", "metrics.jsonl", "samples.jsonl"
CARD, PROOF, MERGE = "README.md", "proof.json", "merge"
REWARD_ERRORS = "reward-errors.jsonl"  # completions that could not be scored
TEXTS = (SAMPLES, REWARD_ERRORS)  # keep the texts of data and model as they are
CHECKPOINTS, PROMPTS = "checkpoints", "prompts.bin"
HALF = ".half"  # ends the name of a file that is being written


def write_json(path: Path, content: Any) -> None:
    """Write JSON without the user's home and secrets, completely or not at all."""
    write_whole(path, [json.dumps(hidden_in(content), indent=2, ensure_ascii=False, default=str) + "\n"])


def write_whole(path: Path, parts: Iterable[str | bytes]) -> None:
    """Write text or bytes to a temporary file and rename it, so that a reader never sees half of it. What can't be
    UTF-8, half of a surrogate pair from an error's text, is written as a question mark."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=HALF, delete=False) as side:
        try:
            side.writelines(part.encode(errors="replace") if isinstance(part, str) else part for part in parts)
            side.flush()
            os.fsync(side.fileno())  # else a crash of the machine could leave an empty file
            disk.grant(Path(side.name))
            os.replace(side.name, path)
        except BaseException:
            Path(side.name).unlink(missing_ok=True)
            raise


def is_half_written(path: Path) -> bool:
    """Whether a file was left by `write_whole` when it was killed."""
    return path.name.startswith(".") and path.name.endswith(HALF) and path.is_file()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, without half-written ones of a killed run."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return list(valid_rows(lines))


def valid_rows(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """The rows in these lines of JSON; lines that are not a row are left out."""
    for line in lines:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and is_plain(row):
                yield row


def file_bytes(folder: Path) -> dict[str, int]:
    """Bytes of a run's weights, and of the optimiser's state in its last checkpoint."""
    states = [path / "optimizer.pt" for path in checkpoints.found(folder / CHECKPOINTS)[:1]]
    files = {"weights": list(folder.glob("*.safetensors")), "optimizer": [path for path in states if path.exists()]}
    return {name: sum(path.stat().st_size for path in paths) for name, paths in files.items() if paths}

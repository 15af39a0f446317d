"""Rows of data, from any source and in any known format, and the tokens they become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perlcli import coffee
from perlcli.data import sources
from perlcli.data.formats import SET_ASIDE, convert
from perlcli.data.render import Renderer
from perlcli.data.rows import Content, DataReport, Demonstration, Preference, Prompt, Row, Thumb
from perlcli.errors import PerlError

__all__ = [
    "Content",
    "Data",
    "Demonstration",
    "Preference",
    "Prompt",
    "Renderer",
    "Thumb",
    "fit",
    "gold_check",
    "load",
    "text_of",
]

COFFEE = "coffee"  # the name that `--data` knows the embedded data by
EMBEDDED = "coffee world (embedded)"
FRESH = 1  # the test rows' seed: the world's documents and settings were chosen on seed 0
EMBEDDED_ROWS: dict[tuple[str, str], Callable[[], list[dict[str, Any]]]] = {
    ("sft", "train"): coffee.demonstrations,
    ("sft", "test"): lambda: coffee.demonstrations("test", 200, FRESH),
    ("reward", "train"): coffee.preferences,
    ("reward", "test"): lambda: coffee.preferences("test", 500, FRESH),
    ("rl", "train"): coffee.prompts,
    ("rl", "test"): lambda: coffee.prompts("test", 400, FRESH),
}


@dataclass
class Data:
    """Rows of one kind, and the report of what became of the source's rows."""

    rows: list[Row]
    numbers: list[int]  # each row's number in its source, from 1
    report: DataReport


def load(source: str | None, use: str, *, split: str = "train", chat: bool = True) -> Data:
    """Read a source for a use ("sft", "reward", "rl"); None or `coffee` is the embedded data. Raises PerlError."""
    embedded = is_embedded(source)
    raws = EMBEDDED_ROWS[use, split]() if embedded else sources.read(str(source), split)
    name = f"{EMBEDDED}, {split}" if embedded else str(source)
    format_name, rows = convert(raws, use, name, chat=chat)
    kept = [(number, row) for number, row in enumerate(rows, start=1) if row is not None]
    report = DataReport(name, format_name, read=len(rows), kept=len(rows), fingerprint=_fingerprint(rows))
    for number, row in enumerate(rows, start=1):
        if row is None:
            report.drop(SET_ASIDE[use], number)
    if not kept:
        raise PerlError(f"{name}: no row is left to use: {report.line()}")
    return Data([row for _, row in kept], [number for number, _ in kept], report)


def is_embedded(source: str | None) -> bool:
    """Whether a source is the data that perlcli brings."""
    return source is None or (source == COFFEE and not Path(source).exists())


def fit(data: Data, longest: int, tokens: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row's tokens by `tokens`, without the rows that are longer than `longest`, which the report counts.

    `tokens` gives a row's columns for the trainer; each list of ids among them counts.
    """
    rendered = []
    for number, row in zip(data.numbers, data.rows, strict=True):
        item = tokens(row)
        if max(len(ids) for ids in item.values() if isinstance(ids, list)) > longest:
            data.report.drop(f"longer than {longest} tokens", number)
        else:
            rendered.append(item)
    if not rendered:
        raise PerlError(
            f"{data.report.source}: every row is longer than {longest} tokens",
            "raise --max-length, or shorten the rows",
        )
    return rendered


def gold_check(row: Prompt) -> Callable[[str], bool] | None:
    """The program that tells a right answer to this prompt from a wrong one, where the data has one."""
    order = row.extra.get("order")
    if isinstance(order, str) and order.startswith("add_order_item("):
        return lambda completion: coffee.gold(completion, order)
    return None


def text_of(content: Content) -> str:
    """A content as one readable text, for samples."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return content[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)


def _fingerprint(rows: list[Row | None]) -> str:
    """A digest of the rows' content and order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row) if row else None, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]

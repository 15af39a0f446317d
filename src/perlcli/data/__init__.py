"""Rows of data, from any source and in any known format, and the tokens they become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perlcli import coffee
from perlcli.data import sources
from perlcli.data.formats import convert
from perlcli.data.published import shp_limits
from perlcli.data.render import Renderer
from perlcli.data.rows import Content, DataReport, Demonstration, Found, Preference, Prompt, Row, Thumb
from perlcli.errors import PerlError
from perlcli.settings import DataSettings

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


def load(
    source: str | None, use: str, *, split: str = "train", chat: bool = True, options: DataSettings | None = None
) -> Data:
    """Read a source for a use ("sft", "reward", "rl"); None or `coffee` is the embedded data. Raises PerlError.

    `split` is the side that the rows are for, "train" or "test"; `options` say what the source itself doesn't, such as
    the format, and the limits of SHP, which hold for held-out data of that format, too.
    """
    options = options or DataSettings()
    name = f"{EMBEDDED}, {split}" if is_embedded(source) else sources.title(str(source))
    limits = (options.shp_score_ratio, options.shp_per_post)
    with closing(_read(source, use, split, options)) as found:
        done = convert(found, use, name, chat=chat, name=options.data_format, limit=shp_limits(*limits))
    if not done.format:
        raise PerlError(f"{name} holds no rows")
    if any(limits) and done.format != "shp" and source == options.data:
        raise PerlError(f"--shp-score-ratio and --shp-per-post are of the format shp, and {name} is {done.format}")
    read = len(done.rows) + sum(map(len, done.dropped.values()))
    report = DataReport(name, done.format, read=read, kept=read, fingerprint=_fingerprint(done.rows))
    for reason, numbers in done.dropped.items():
        for number in numbers:
            report.drop(reason, number)
    if not done.rows:
        raise PerlError(f"{name}: no row is left to use: {report.line()}")
    return Data(done.rows, done.numbers, report)


def _read(source: str | None, use: str, split: str, options: DataSettings) -> sources.Rows:
    """The source's rows as they are."""
    if not is_embedded(source):
        return sources.read(str(source), split, options)
    if options.subset is not None or options.split is not None:
        raise PerlError("--subset and --split are of your own data, not of the embedded coffee data")
    rows = EMBEDDED_ROWS[use, split]()
    return (Found(f"{EMBEDDED}, row {number}", row) for number, row in enumerate(rows, start=1))


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


def _fingerprint(rows: list[Row]) -> str:
    """A digest of the rows' content and order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]

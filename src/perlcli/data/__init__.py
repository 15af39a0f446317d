"""Rows of data, from any source and in any known format, and the tokens they become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from perlcli import coffee
from perlcli.data import checks, sources
from perlcli.data.checks import drop_repeats, overlap
from perlcli.data.fitting import fit
from perlcli.data.formats import SET_ASIDE, convert
from perlcli.data.render import Renderer
from perlcli.data.rows import Content, Data, DataReport, Demonstration, Preference, Prompt, Thumb
from perlcli.data.splits import hold_out
from perlcli.errors import PerlError

__all__ = [
    "Content",
    "Data",
    "Demonstration",
    "Preference",
    "Prompt",
    "Renderer",
    "Thumb",
    "drop_repeats",
    "fit",
    "gold_check",
    "hold_out",
    "load",
    "overlap",
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


def load(source: str | None, use: str, *, split: str = "train", chat: bool = True) -> Data:
    """Read a source for a use ("sft", "reward", "rl"); None or `coffee` is the embedded data. Raises PerlError."""
    embedded = is_embedded(source)
    raws = EMBEDDED_ROWS[use, split]() if embedded else sources.read(str(source), split)
    name = f"{EMBEDDED}, {split}" if embedded else str(source)
    format_name, rows = convert(raws, use, name, chat=chat)
    kept = [(number, row) for number, row in enumerate(rows, start=1) if row is not None]
    report = DataReport(name, format_name, read=len(rows), kept=len(rows), fingerprint=checks.fingerprint(rows))
    for number, row in enumerate(rows, start=1):
        if row is None:
            report.drop(SET_ASIDE[use], number)
    found = Data([row for _, row in kept], [number for number, _ in kept], report)
    checks.inspect(found)
    if not found.rows:
        raise PerlError(f"{name}: no row is left to use: {report.line()}")
    return found


def is_embedded(source: str | None) -> bool:
    """Whether a source is the data that perlcli brings."""
    return source is None or (source == COFFEE and not Path(source).exists())


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

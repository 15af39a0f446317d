"""Rows of data, from any source and in any known format, and the tokens they become."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from perlcli import coffee
from perlcli.data import checks, sources
from perlcli.data.checks import drop_repeats, overlap
from perlcli.data.fitting import fit
from perlcli.data.formats import convert
from perlcli.data.published import shp_limits
from perlcli.data.render import Renderer
from perlcli.data.rows import Content, Data, DataReport, Demonstration, Found, Preference, Prompt, Thumb
from perlcli.data.splits import hold_out
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
    with closing(_read(source, use, split, options)) as raws:
        done = convert(raws, use, name, chat=chat, name=options.data_format, limit=shp_limits(*limits))
    if not done.format:
        raise PerlError(f"{name} holds no rows")
    if any(limits) and done.format != "shp" and source == options.data:
        raise PerlError(f"--shp-score-ratio and --shp-per-post are of the format shp, and {name} is {done.format}")
    read = len(done.rows) + sum(map(len, done.dropped.values()))
    report = DataReport(name, done.format, read=read, kept=read, fingerprint=checks.fingerprint(done.rows))
    for reason, numbers in done.dropped.items():
        for number in numbers:
            report.drop(reason, number)
    found = Data(done.rows, done.numbers, report)
    checks.inspect(found)
    if not found.rows:
        raise PerlError(f"{name}: no row is left to use: {report.line()}")
    return found


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

"""Rows of data, from any source and in any known format, and the tokens they become."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from perlcli import coffee
from perlcli.data import checks, sources
from perlcli.data.checks import drop_repeats, overlap, prompts, unpacked
from perlcli.data.fitting import fit, fitted
from perlcli.data.formats import Converter
from perlcli.data.published import shp_limits
from perlcli.data.render import Renderer
from perlcli.data.rows import Content, Data, Demonstration, Found, Preference, Prompt, Row, Thumb
from perlcli.data.splits import hold_out
from perlcli.errors import PerlError
from perlcli.settings import DataSettings

__all__ = [
    "Content",
    "Data",
    "Demonstration",
    "Intake",
    "Preference",
    "Prompt",
    "Renderer",
    "Thumb",
    "drop_repeats",
    "fit",
    "fitted",
    "gold_check",
    "hold_out",
    "load",
    "overlap",
    "prompts",
    "read",
    "text_of",
    "unpacked",
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


class Intake:
    """What the rows of a source become for a use ("sft", "reward", "rl"), one after the other, with the report of all.

    `split` is the side that the rows are for, "train" or "test"; `options` say what the source itself doesn't, such as
    the format, and the limits of SHP, which hold for held-out data of that format, too.
    """

    def __init__(self, source: str | None, use: str, split: str, *, chat: bool, options: DataSettings) -> None:
        name = f"{EMBEDDED}, {split}" if is_embedded(source) else sources.title(str(source))
        self._limits = (options.shp_score_ratio, options.shp_per_post)
        self._is_limited = source == options.data and any(self._limits)
        limit = shp_limits(*self._limits)
        self._converter = Converter(use, name, chat=chat, name=options.data_format, limit=limit)
        self.report = self._converter.report

    def take(self, number: int, item: Found) -> list[Row]:
        """The rows that a row of the source becomes. Raises PerlError where its format doesn't serve the use."""
        found = self._converter.take(number, item)
        kept = [row for row in found if not checks.is_empty(row)]
        for _ in range(len(found) - len(kept)):
            self.report.drop(checks.EMPTY, number)
        return kept

    @property
    def is_faulty(self) -> bool:
        """Whether rows were found that are an error, which `end` tells."""
        return self._converter.faults.count > 0

    def end(self) -> None:
        """Raise PerlError where rows are faulty, or where none is left."""
        report = self.report
        self._converter.faults.tell()
        if not report.format:
            raise PerlError(f"{report.source} holds no rows")
        if self._is_limited and report.format != "shp":
            raise PerlError(
                f"--shp-score-ratio and --shp-per-post are of the format shp, and {report.source} is {report.format}"
            )
        if not report.kept:
            raise PerlError(f"No row is left to use: {report.line()}")


def load(
    source: str | None, use: str, *, split: str = "train", chat: bool = True, options: DataSettings | None = None
) -> Data:
    """All rows of a source for a use, by `Intake`; None or `coffee` is the embedded data. Raises PerlError."""
    options = options or DataSettings()
    intake = Intake(source, use, split, chat=chat, options=options)
    rows, numbers = [], []
    with closing(read(source, use, split, options)) as raws:
        for number, item in enumerate(raws, start=1):
            for row in intake.take(number, item):
                rows.append(row)
                numbers.append(number)
    intake.end()
    found = Data(rows, numbers, intake.report)
    checks.tally(found)
    return found


def read(source: str | None, use: str, split: str, options: DataSettings) -> sources.Rows:
    """The source's rows as they are, to be closed; of the embedded data alone they depend on the use."""
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

"""Loads the rows of a source for a use ("sft", "reward" or "rl"): read, converted, checked and reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from perlcli import coffee
from perlcli.data import checks, sources
from perlcli.data.formats import Converter
from perlcli.data.published import shp_limits
from perlcli.data.rows import Data, Prompt, Row, SourceRow
from perlcli.errors import PerlError
from perlcli.settings import DataSettings

COFFEE = "coffee"  # `--data coffee` is the embedded data
EMBEDDED = "coffee world (embedded)"
TEST_SEED = 1  # the world's documents and settings were chosen on seed 0
EMBEDDED_ROWS: dict[tuple[str, str], Callable[[], Sequence[Mapping[str, object]]]] = {
    ("sft", "train"): coffee.demonstrations,
    ("sft", "test"): lambda: coffee.demonstrations("test", 200, TEST_SEED),
    ("reward", "train"): coffee.preferences,
    ("reward", "test"): lambda: coffee.preferences("test", 500, TEST_SEED),
    ("rl", "train"): coffee.prompts,
    ("rl", "test"): lambda: coffee.prompts("test", 400, TEST_SEED),
}


class Intake:
    """Turns the rows of a source into rows for a use, one at a time; `report` counts them.

    `split` is the side that the rows are for, "train" or "test". `options` says how the source is read; its limits for
    SHP also apply to held-out data in that format.
    """

    def __init__(self, source: str | None, use: str, split: str, *, chat: bool, options: DataSettings) -> None:
        name = f"{EMBEDDED}, {split}" if is_embedded(source) else sources.title(str(source))
        limits = (options.shp_score_ratio, options.shp_per_post)
        self._must_be_shp = source == options.data and any(limits)
        self._converter = Converter(use, name, chat=chat, name=options.data_format, limit=shp_limits(*limits))
        self.report = self._converter.report

    def take(self, number: int, item: SourceRow) -> list[Row]:
        """The rows that a row of the source becomes. Raises PerlError if its format does not serve the use."""
        kept = []
        for row in self._converter.take(number, item):
            if checks.is_empty(row):
                self.report.drop(checks.EMPTY, number)
            else:
                kept.append(row)
        return kept

    @property
    def is_faulty(self) -> bool:
        """Whether some rows have errors, which `end` raises."""
        return self._converter.faults.count > 0

    def end(self) -> None:
        """Raises PerlError if rows have errors, or if no row is left."""
        report = self.report
        self._converter.faults.check()
        if not report.format:
            raise PerlError(f"{report.source} has no rows")
        if self._must_be_shp and report.format != "shp":
            raise PerlError(
                "--shp-score-ratio and --shp-per-post only apply to the format shp, but "
                f"{report.source} is in the format {report.format}"
            )
        if not report.kept:
            raise PerlError(f"No rows left to use: {report.line()}")


def load(
    source: str | None, use: str, *, split: str = "train", chat: bool = True, options: DataSettings | None = None
) -> Data:
    """All rows of a source for a use, with their report; None or `coffee` is the embedded data. Raises PerlError if the
    source can't be read, if rows have errors, or if none is left."""
    options = options or DataSettings()
    intake = Intake(source, use, split, chat=chat, options=options)
    rows, numbers = [], []
    with closing(read(source, use, split, options)) as items:
        for number, item in enumerate(items, start=1):
            for row in intake.take(number, item):
                rows.append(row)
                numbers.append(number)
    intake.end()
    data = Data(rows, numbers, intake.report)
    checks.tally(data)
    return data


def read(source: str | None, use: str, split: str, options: DataSettings) -> sources.Rows:
    """The source's rows as they are, which the caller must close; only the embedded rows depend on the use. Raises
    PerlError if the source can't be read."""
    if not is_embedded(source):
        return sources.read(str(source), split, options)
    if options.subset is not None or options.split is not None:
        raise PerlError("--subset and --split do not work with the embedded coffee data")
    rows = EMBEDDED_ROWS[use, split]()
    return (SourceRow(f"{EMBEDDED}, row {number}", row) for number, row in enumerate(rows, start=1))


def is_embedded(source: str | None) -> bool:
    """Whether a source is the data that comes with perlcli."""
    return source is None or (source == COFFEE and not Path(source).exists())


def gold_check(row: Prompt) -> Callable[[str], bool] | None:
    """A program that says whether a completion of this prompt is right; None if the data has no such check."""
    order = row.extra.get("order")
    if isinstance(order, str) and order.startswith("add_order_item("):
        return lambda completion: coffee.gold(completion, order)
    return None

"""Loads the rows of a source for a use ("sft", "reward" or "rl"): read, converted, checked and reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from perlcli import coffee
from perlcli.data import checks, formats, sources
from perlcli.data.fields import BadField, SetAside
from perlcli.data.files import Rows
from perlcli.data.published import shp_limits
from perlcli.data.rows import Data, DataReport, Prompt, Row, SourceRow, is_empty
from perlcli.errors import PerlError
from perlcli.settings import DataSettings
from perlcli.text import counted

EMPTY = "with an empty completion"
SHOWN_FAULTS = 10
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
    """Turns the rows of a source into rows for a use, one at a time; `report` counts them, `fault_count` the errors.
    `split` is the side that the rows are for, "train" or "test", and `chat` says whether conversations can be rendered.
    `options` says how the source is read; its limits for SHP also apply to held-out data in that format."""

    def __init__(self, source: str | None, use: str, split: str, *, chat: bool, options: DataSettings) -> None:
        name = f"{EMBEDDED}, {split}" if is_embedded(source) else sources.title(str(source))
        limits = (options.shp_score_ratio, options.shp_per_post)
        self.use, self.chat, self._wanted = use, chat, options.data_format
        self.report, self.fault_count = DataReport(name, ""), 0
        self._must_be_shp, self._limit = source == options.data and any(limits), shp_limits(*limits)
        self._format: formats.Format | None = None
        self._faults: list[str] = []  # the first ones
        self._is_misfit = False  # whether some rows could be read, but not in the format

    def take(self, number: int, item: SourceRow) -> list[Row]:
        """The rows that a row of the source becomes: none if it is dropped or has an error, both of which are counted.
        Raises PerlError for the first row if its format does not serve the use."""
        if item.raw is None:
            return self._refuse(f"{item.place}: {item.fault}")
        if self._format is None:
            self._format = formats.choose(item.raw, self.use, self.report.source, self._wanted)
            self.report.format = self._format.name
        try:
            if self._format.name == "shp":
                self._limit(item.raw)
            rows = formats.converted(self._format, item.raw, self.use, self.chat)
        except SetAside as reason:
            self.report.take()
            self.report.drop(str(reason), number)
            return []
        except BadField as fault:
            self._is_misfit = True
            return self._refuse(f"{item.place}: {fault}")
        self.report.take(len(rows))
        kept = [row for row in rows if not is_empty(row)]
        for _ in range(len(rows) - len(kept)):
            self.report.drop(EMPTY, number)
        return kept

    def _refuse(self, fault: str) -> list[Row]:
        self.fault_count += 1
        if self.fault_count <= SHOWN_FAULTS:
            self._faults.append(fault)
        return []

    def check_faults(self) -> None:
        """Raises PerlError with the first errors and how many more there are, if there are any."""
        if self.fault_count:
            more = self.fault_count - len(self._faults)
            hint = f"the data was read as {self.report.format}; use --data-format for another format"
            rest = [f"… and {counted(more, 'more row')}"] if more else []
            raise PerlError("\n".join(self._faults + rest), hint if self._is_misfit else "")

    def end(self) -> None:
        """Raises PerlError if rows have errors, or if no row is left."""
        self.check_faults()
        report = self.report
        if not report.format:
            raise PerlError(f"{report.source} has no rows")
        if self._must_be_shp and report.format != "shp":
            problem = "--shp-score-ratio and --shp-per-post only apply to the format shp, but "
            raise PerlError(problem + f"{report.source} is in the format {report.format}")
        if not report.kept:
            raise PerlError(f"No rows left to use: {report.line()}")


def load(
    source: str | None, use: str, *, split: str = "train", chat: bool = True, options: DataSettings = sources.ANY
) -> Data:
    """All rows of a source for a use, with their report; None or `coffee` is the embedded data. Raises PerlError if the
    source can't be read, if rows have errors, or if none is left."""
    intake = Intake(source, use, split, chat=chat, options=options)
    data = Data([], [], intake.report)
    with closing(read(source, use, split, options)) as items:
        for number, item in enumerate(items, start=1):
            rows = intake.take(number, item)
            data.rows += rows
            data.numbers += [number] * len(rows)
    intake.end()
    checks.tally(data)
    return data


def read(source: str | None, use: str, split: str, options: DataSettings) -> Rows:
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

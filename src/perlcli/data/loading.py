"""Loads the rows of a source for a use ("sft", "reward" or "rl"): read, converted, checked and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from perlcli import coffee
from perlcli.data import checks, sources
from perlcli.data.choice import choose
from perlcli.data.columns import Watched, chosen, decoded, ignored, not_used, parse
from perlcli.data.fields import BadField, SetAside, is_null
from perlcli.data.files import Rows
from perlcli.data.formats import NAMES, PAIR, Format, detect
from perlcli.data.readers.messages import READ, keys_of
from perlcli.data.readers.plain import TIES, contradicted, strange_status
from perlcli.data.readers.published import shp_limits
from perlcli.data.readers.ranked import CONTEXT, together
from perlcli.data.readers.reading import TIED, reading
from perlcli.data.rows import Data, DataReport, Prompt, Raw, Row, SourceRow, completions, is_blank, is_empty
from perlcli.data.uses import OWN, converted, has_prompt
from perlcli.errors import PerlError
from perlcli.settings import DataSettings
from perlcli.text import counted, shorten

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
        name = f"{EMBEDDED}, {split}" if is_embedded(source) else sources.named(str(source), split, options)
        limits = (options.shp_score_ratio, options.shp_per_post)
        self.use, self.how, self._wanted = use, reading(options, chat=chat), options.data_format
        self.report, self.fault_count = DataReport(name, ""), 0
        self._must_be_shp, self._limit = source == options.data and any(limits), shp_limits(*limits)
        self._format: Format | None = None
        self._faults: list[str] = []  # the first ones
        self._is_misfit = False  # whether some rows could be read, but not in the format
        self._used: set[str] = set()  # columns that were read in some row
        self._unused: dict[str, None] = {}  # columns that were not read in some row, in order
        self._keys: set[str] = set()  # of messages

    def take(self, number: int, item: SourceRow) -> list[Row]:
        """The rows that a row of the source becomes: none if it is dropped or has an error, both of which are counted.
        Raises PerlError for the first row if its format does not serve the use, and for a column that would be ignored
        although it is part of the question."""
        if item.raw is None:
            return self._refuse(f"{item.place}: {item.fault}")
        if self._format is None:
            self._format = choose(item.raw, self.use, self.report.source, self._wanted)
            self.report.format = self._format.name
        is_pair = set(PAIR) <= set(self._format.columns)
        watched = Watched(item.raw, TIES if is_pair else ())
        try:
            if self._format.name == "shp":
                self._limit(item.raw)
            made = converted(self._format, watched, self.use, self.how, {**item.raw, **item.rest, **item.renamed})
        except SetAside as why:
            made = [str(why)]
        except BadField as fault:
            self._is_misfit = True
            return self._refuse(f"{item.place}: {fault}")
        if is_pair:
            self._note_scores(number, item.raw, is_tie=TIED in made)
        rows = [row for row in made if not isinstance(row, str)]
        self._note_prompts(number, item.raw, rows)
        self._note(item, watched, rows)
        self.report.take(len(made), item.count)
        for reason in made:
            if isinstance(reason, str):
                self.report.drop(reason, number)
        kept = [row for row in rows if not is_empty(row)]
        for _ in range(len(rows) - len(kept)):
            self.report.drop(EMPTY, number)
        return kept

    def _note(self, item: SourceRow, watched: Watched, rows: list[Row]) -> None:
        """Note what was not read of a row. Raises PerlError if that is part of the question."""
        unused = watched.unused()
        self._used |= watched.used
        self._unused |= dict.fromkeys([*unused, *item.rest, *(item.renamed if self.use == "rl" else ())])
        self._keys |= keys_of(decoded(value) for name, value in (item.raw or {}).items() if name in watched.used)
        column = ignored(unused, self.use, rows) if unused else None
        if column and self._format:
            raise not_used(self.report.source, column, self._format.name, self.use, item.raw or {})

    def _note_scores(self, number: int, raw: Raw, *, is_tie: bool) -> None:
        """Note what the scores of a pair say: they are used for ties, and do not change which answer is chosen."""
        if is_tie:
            self._used |= TIES
        kept = ", and the pair is kept as it is"
        if names := contradicted(raw):
            self._find(f"{names[0]} is lower than {names[1]}{kept}", number)
        if status := strange_status(raw):
            self._find(f"the status is {shorten(status, 30)}{kept}", number)

    def _note_prompts(self, number: int, raw: Raw, rows: list[Row]) -> None:
        """Note rows that would be chats if their prompt weren't missing or empty."""
        is_there = "prompt" in raw and self.how.chat and self.use != "rl"
        if is_there and any(row.prompt is None and isinstance(completions(row)[0], str) for row in rows):
            self._find("no prompt, so its text is not part of a chat", number)
        if is_there and any(row.prompt is not None and is_blank(row.prompt) for row in rows):
            self._find("an empty prompt, which becomes an empty user turn", number)

    def _find(self, text: str, number: int) -> None:
        self.report.findings.setdefault(text, []).append(number)

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
            hint = self.how.labels.hint or hint
            rest = [f"… and {counted(more, 'more row')}"] if more else []
            raise PerlError("\n".join(self._faults + rest), hint if self._is_misfit else "")

    def end(self) -> None:
        """Complete the report. Raises PerlError if rows have errors, or if no row is left."""
        self.check_faults()
        report = self.report
        unused = tuple(name for name in self._unused if name not in self._used)
        if self.use == "rl":
            report.passed = tuple(name for name in unused if name not in OWN)
        else:
            report.unused = unused
        report.unused_keys = tuple(sorted(self._keys.difference(READ)))
        report.template_keys = tuple(sorted(self._keys.intersection(READ)))
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
        for number, item in numbered(items, options):
            rows = intake.take(number, item)
            data.rows += rows
            data.numbers += [number] * len(rows)
    intake.end()
    data.report.serves = serves(data, use)
    checks.tally(data)
    return data


def check_given(source: str | None, model: str) -> None:
    """Raises PerlError if no data is given for another model than the embedded one."""
    if source is None:
        hint = f"--data FILE, or --data {COFFEE} for the embedded data"
        raise PerlError(f"--data is missing for the model {model}", hint)


def check_start(source: str | None, use: str, split: str, options: DataSettings) -> None:
    """Raises PerlError if a source can't be there, or if its first row is in no format for the use, as far as that can
    be seen without loading a library: of Parquet, Excel, Hub datasets and standard input it can't."""
    if is_embedded(source):
        return
    name = str(source)
    if name and name != sources.STDIN:
        sources.check_there(name)
    if name and not sources.is_quick(name, split, options):
        return
    with closing(read(source, use, split, options)) as items:
        _, first = next(numbered(items, options), (0, None))
    if first is not None and first.raw is not None:
        choose(first.raw, use, sources.named(name, split, options), options.data_format)


def serves(data: Data, use: str) -> tuple[str, ...]:
    """The stages that the rows can be used for, as far as their format and their prompts show."""
    uses = NAMES[data.report.format].uses if data.report.format in NAMES else (use,)
    return tuple(each for each in uses if each != "rl" or all(map(has_prompt, data.rows)))


def read(source: str | None, use: str, split: str, options: DataSettings) -> Rows:
    """The source's rows as they are, which the caller must close; only the embedded rows depend on the use. Raises
    PerlError if the source can't be read."""
    if not is_embedded(source):
        return sources.read(str(source), split, options)
    if options.subset is not None or options.split is not None:
        raise PerlError("--subset and --split do not work with the embedded coffee data")
    if options.columns is not None and options.data == source:
        raise PerlError("--columns does not work with the embedded coffee data")
    rows = EMBEDDED_ROWS[use, split]()
    return (SourceRow(f"{EMBEDDED}, row {number}", row) for number, row in enumerate(rows, start=1))


def numbered(items: Rows, options: DataSettings) -> Iterator[tuple[int, SourceRow]]:
    """Rows with their numbers in the source, from 1, under the names that --columns gives them. In formats that have a
    row for each answer, adjacent rows with the same prompt are put together. Raises PerlError for a --columns that
    can't be read."""
    names = parse(options.columns)
    key: str | None = None
    group: list[SourceRow] = []
    start = 0
    for number, source_row in enumerate(items, start=1):
        item = _renamed(source_row, names) if names else source_row
        if key is None and item.raw is not None:
            known = NAMES[options.data_format] if options.data_format else detect(item.raw)
            key = known.key if known and not is_null(item.raw.get(known.key)) else ""
        if group and not _continues(group[0], item, key):
            yield start, _grouped(group, key)
            group = []
        start = start if group else number
        group.append(item)
    if group:
        yield start, _grouped(group, key)


def _renamed(item: SourceRow, names: Mapping[str, str]) -> SourceRow:
    if item.raw is None:
        return item
    try:
        taken, rest, renamed = chosen(item.raw, names)
    except BadField as fault:
        return SourceRow(item.place, None, str(fault))
    return SourceRow(item.place, taken, rest=rest, renamed=renamed)


def _continues(first: SourceRow, item: SourceRow, key: str | None) -> bool:
    if not key or first.raw is None or item.raw is None:
        return False
    return key in first.raw and all(first.raw.get(name) == item.raw.get(name) for name in (key, *CONTEXT))


def _grouped(group: list[SourceRow], key: str | None) -> SourceRow:
    first = group[0]
    if not key or first.raw is None:
        return first
    raw = together([item.raw for item in group if item.raw is not None], key)
    place = first.place if len(group) == 1 else f"{first.place} to {group[-1].place.rpartition(', ')[2]}"
    return SourceRow(place, raw, count=len(group), rest=first.rest, renamed=first.renamed)


def is_embedded(source: str | None) -> bool:
    """Whether a source is the data that comes with perlcli."""
    return source is None or (source == COFFEE and not Path(source).exists())


def gold_check(row: Prompt) -> Callable[[str], bool] | None:
    """A program that says whether a completion of this prompt is right; None if the data has no such check."""
    order = row.extra.get("order")
    if isinstance(order, str) and order.startswith("add_order_item("):
        return lambda completion: coffee.gold(completion, order)
    return None

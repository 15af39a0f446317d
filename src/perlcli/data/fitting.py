"""Turns rows into token columns within a length, and drops, truncates or refuses longer rows."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from perlcli.data.chat import RowRefused
from perlcli.data.checks import percentiles, restrict
from perlcli.data.dialogs import LossOn
from perlcli.data.render import IGNORED, NOT_ITS_TOKENIZER, Columns, Renderer
from perlcli.data.rows import Content, Data, DataReport, Row
from perlcli.errors import PerlError, listing
from perlcli.text import counted

Tokens = Callable[[Any], Columns]  # makes the columns of a row of the stage's kind
Numbered = tuple[int, Row]  # a row, and its number in the source
NAMED_ROWS = 10
UNLEARNED = "with nothing to learn (weight: 0, or no answer)"
BATCH = 128  # rows encoded at once: a tokenizer needs some hundred bytes per token for it


@dataclass(frozen=True)
class Room:
    """The tokens that a row may have: --max-length, less what is kept free for a completion. Raises PerlError if that
    leaves none."""

    max_length: int
    completion: int = 0  # of --max-completion-length

    def __post_init__(self) -> None:
        if self.tokens <= 0:
            problem = f"--max-length {self.max_length} leaves no room for a prompt before --max-completion-length"
            raise PerlError(f"{problem} {self.completion}", "use a higher --max-length")

    @property
    def tokens(self) -> int:
        """The most tokens of a row."""
        return self.max_length - self.completion

    @property
    def excess(self) -> str:
        """What is wrong with a longer row, with the arithmetic."""
        less = f" (--max-length {self.max_length} less {self.completion} for the completion)" if self.completion else ""
        return f"longer than {self.tokens} tokens{less}"


class Fitting:
    """Turns rows into token columns, a batch at a time; the report counts rows that have no room. `on_long` says what
    happens to these: "drop" drops them, "truncate" cuts their prompts from the left with `render`, "error" refuses the
    data. None drops them too, but refuses data most of whose rows are too long. `learn` is the --loss-on of
    demonstrations."""

    def __init__(
        self,
        report: DataReport,
        room: Room,
        tokens: Tokens,
        *,
        on_long: str | None = None,
        render: Renderer | None = None,
        learn: LossOn | None = None,
    ) -> None:
        self.report, self.room, self.tokens, self.on_long, self.render = report, room, tokens, on_long, render
        self.learn = learn
        self._lengths: Counter[int] = Counter()
        self._refused: list[int] = []
        self._left_out = 0
        self._unembedded: RowRefused | None = None
        self.faults: list[tuple[int, RowRefused]] = []  # rows that can't be rendered

    def take(self, rows: Sequence[Numbered]) -> Iterator[tuple[int, Row, Columns]]:
        """The rows that fit or are cut to fit, each as its place in `rows`, the row as it is used, and its columns."""
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            if self.render:
                self.render.foresee([row for _, row in part], self.learn)
            for place, (number, row) in enumerate(part, start):
                try:
                    used, item = self._fit(number, row)
                except RowRefused as fault:
                    self.faults.append((number, fault))
                    continue
                if used is not None:
                    yield place, used, item

    def _fit(self, number: int, row: Row) -> tuple[Row | None, Columns]:
        """A row as it is used, None if it is not, and its columns. Raises RowRefused if it can't be rendered."""
        item = self.tokens(row)
        for ids in item.values():
            if self.render and isinstance(ids, list) and (fault := self.render.unembedded(ids)):
                self._unembedded = self._unembedded or RowRefused(fault, NOT_ITS_TOKENIZER)
                raise self._unembedded  # with the same token for all rows, so that they are one fault
        self._note(number, row)
        length = length_of(item)
        self._lengths[length] += 1
        if all(label == IGNORED for label in item.get("labels", [0])):
            self.report.drop(UNLEARNED, number)
            return None, item
        used = row if length <= self.room.tokens else self._shorten(number, row)
        return used, item if used is row or used is None else self.tokens(used)

    def _note(self, number: int, row: Row) -> None:
        """Report how a row was rendered."""
        if self.render is None:
            return
        how = self.render.how(row)
        if how and how not in self.report.rendered:
            self.report.rendered.append(how)
        for finding in dict.fromkeys(self.render.findings):
            self.report.findings.setdefault(finding, []).append(number)

    def _shorten(self, number: int, row: Row) -> Row | None:
        """A row that is too long as it is used; None if it is not used."""
        shorter = None
        if self.on_long == "truncate" and self.render is not None:
            shorter = truncate(row, self.room.tokens, self.tokens, self.render)
        if shorter is None:
            self._left_out += 1
            self.report.drop(self._reason, number)
        else:
            self.report.truncated.append(number)
        if self.on_long == "error":
            self._refused.append(number)
        return shorter

    def end(self) -> None:
        """Complete the report. Raises PerlError if no row is left, if rows can't be rendered, or if the data is refused
        for its longer rows."""
        if self.faults:
            raise self._unrendered()
        if self._lengths:
            self.report.tokens = percentiles(self._lengths)
        if self.render:
            note_unread_keys(self.report, self.render)
        if numbers := self._refused:
            shown = ", ".join(map(str, numbers[:NAMED_ROWS])) + ("…" if len(numbers) > NAMED_ROWS else "")
            raise PerlError(
                f"{self.report.source}: {counted(len(numbers), 'row')} {self.room.excess}, the longest with "
                f"{self.report.tokens['max']:,}: {'row' if len(numbers) == 1 else 'rows'} {shown}",
                "use a higher --max-length, --on-long drop or --on-long truncate",
            )
        if self.report.kept <= 0:
            hint = "use a higher --max-length, or shorten the rows"
            raise PerlError(f"{self.report.source}: every row is {self._reason}", hint)
        if self.on_long is None and 2 * self._left_out > (tried := self._lengths.total()):
            enough = self.report.tokens["p90"] + self.room.completion
            raise PerlError(
                f"{self.report.source}: {self._left_out:,} of {tried:,} rows are {self._reason}",
                f"--max-length {enough} keeps 90 % of the rows, --on-long truncate cuts prompts, --on-long drop leaves "
                f"{counted(tried - self._left_out, 'row')}",
            )

    def columns(self, data: Data, most: int | None = None) -> Iterator[Columns]:
        """The columns of the rows that have room, one by one, the first `most` if given; after the last one, `data` has
        only those rows. Raises PerlError as `end` does."""
        places = []
        for place, used, item in islice(self.take(list(zip(data.numbers, data.rows, strict=True))), most):
            data.rows[place] = used
            places.append(place)
            yield item
        self.end()
        restrict(data, places)
        if self.render:
            self.render.forget()

    def _unrendered(self) -> PerlError:
        """The error for rows that can't be rendered, each different problem with its first row and how many have it."""
        rows: dict[str, list[int]] = {}
        for number, fault in self.faults:
            rows.setdefault(fault.problem, []).append(number)
        faults = [
            f"{self.report.source}, row {numbers[0]}"
            + (f" and {counted(len(numbers) - 1, 'more row')}" if len(numbers) > 1 else "")
            + f": {problem}"
            for problem, numbers in rows.items()
        ]
        return PerlError(listing(faults), self.faults[0][1].hint)

    @property
    def _reason(self) -> str:
        return self.room.excess + (" even with the prompt cut" if self.on_long == "truncate" else "")


def length_of(item: Columns) -> int:
    """A row's length in tokens: that of the longest list of ids among its columns."""
    return max(len(ids) for ids in item.values() if isinstance(ids, list))


def truncate(row: Row, longest: int, tokens: Tokens, render: Renderer) -> Row | None:
    """The row with as much of its prompt cut from the left as needed to fit; None if no cut is enough. The content is
    cut, not its ids, so that the row gives the same tokens wherever it is rendered later. What the tokenizer or the
    chat template puts first stays, and so do system messages and all completions. In a conversation the oldest turns
    are removed first, then the start of the oldest remaining user turn."""
    full = row.prompt
    if full is None:
        return None
    starts = _starts(full)
    fits = bisect_left(starts, True, key=lambda start: _excess(row, _from(full, start), longest, tokens) <= 0)
    for start in starts[max(0, fits - 1) : fits + 1]:  # the one before the first that fits may be cut to fit
        prompt = _from(full, start)
        cut: Content | None = prompt
        excess, total = _excess(row, prompt, longest, tokens), 0
        while excess > 0 and cut is not None:
            total += excess  # the rest can have a few more tokens when the text starts at another place
            cut = _without_start(prompt, total, render)
            excess = 0 if cut is None else _excess(row, cut, longest, tokens)
        if cut is not None:
            return replace(row, prompt=cut)
    return None


def _excess(row: Row, prompt: Content, longest: int, tokens: Tokens) -> int:
    return length_of(tokens(replace(row, prompt=prompt))) - longest


def _starts(prompt: Content) -> list[int]:
    """Where a prompt can start: at 0, and a conversation at each later user turn, not counting system messages."""
    if isinstance(prompt, str):
        return [0]
    turns = [message for message in prompt if message["role"] != "system"]
    return [0, *(place for place, message in enumerate(turns) if place and message["role"] == "user")]


def _from(prompt: Content, start: int) -> Content:
    """The prompt from the turn `start` on, with its system messages."""
    if not start or isinstance(prompt, str):
        return prompt
    system = [message for message in prompt if message["role"] == "system"]
    turns = [message for message in prompt if message["role"] != "system"]
    return [*system, *turns[start:]]


def _without_start(prompt: Content, count: int, render: Renderer) -> Content | None:
    """The prompt without the first `count` tokens of its text, or of its first turn; None if nothing would be left."""
    if isinstance(prompt, str):
        return render.without_start(prompt, count)
    place = next((n for n, message in enumerate(prompt) if message["role"] != "system"), None)
    content = None if place is None else prompt[place].get("content")
    text = render.without_start(content, count) if isinstance(content, str) else None
    if place is None or text is None:
        return None
    return [*prompt[:place], {**prompt[place], "content": text}, *prompt[place + 1 :]]


def note_unread_keys(report: DataReport, render: Renderer) -> None:
    """Add the keys of messages that the chat template does not read to those that nothing reads."""
    source = str(render.tokenizer.chat_template)
    unread = [key for key in report.template_keys if key not in source]
    report.unused_keys = tuple(sorted({*report.unused_keys, *unread}))

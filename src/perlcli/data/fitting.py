"""Rows as token columns within a length, and what becomes of those that are longer."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from perlcli.data.checks import percentiles, restrict
from perlcli.data.render import Renderer
from perlcli.data.rows import Content, Data, DataReport, Row
from perlcli.errors import PerlError
from perlcli.text import counted

Columns = dict[str, Any]
Tokens = Callable[[Any], Columns]
Numbered = tuple[int, Row]  # a row, and its number in the source
NAMED_ROWS = 10
BATCH = 128  # rows that are encoded at once: a tokenizer takes some hundred bytes a token for it


class Fitting:
    """Rows as token columns within a length, some at a time; the report counts what becomes of the others.

    No list of ids among the columns by `tokens` is above `longest`. What becomes of a longer row is `on_long`'s choice:
    "drop" leaves it out, "truncate" cuts its prompt from the left with `render`, "error" refuses the data.
    """

    def __init__(
        self, report: DataReport, longest: int, tokens: Tokens, *, on_long: str = "drop", render: Renderer | None = None
    ) -> None:
        self.report, self.longest, self.tokens, self.on_long, self.render = report, longest, tokens, on_long, render
        self._lengths: Counter[int] = Counter()
        self._refused: list[int] = []

    def take(self, rows: Sequence[Numbered]) -> Iterator[tuple[int, Row, Columns]]:
        """Of rows that fit or are cut to fit: the place among these, the row as it is used, its columns."""
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            if self.render:
                self.render.foresee([row for _, row in part])
            for place, (number, row) in enumerate(part, start):
                item = self.tokens(row)
                length = length_of(item)
                self._lengths[length] += 1
                used = row if length <= self.longest else self._shorten(number, row)
                if used is not None:
                    yield place, used, item if used is row else self.tokens(used)

    def _shorten(self, number: int, row: Row) -> Row | None:
        """A row that is too long as it is used, None where it isn't."""
        is_cut = self.on_long == "truncate" and self.render is not None
        shorter = truncate(row, self.longest, self.tokens, self.render) if is_cut and self.render else None
        if shorter is None:
            self.report.drop(_reason(self.longest, self.on_long), number)
        else:
            self.report.truncated.append(number)
        if self.on_long == "error":
            self._refused.append(number)
        return shorter

    def end(self) -> None:
        """Complete the report; raises PerlError where no row is left, or where longer ones are refused."""
        if self._lengths:
            self.report.tokens = percentiles(self._lengths)
        if self._refused:
            self._refuse()
        if self.report.kept <= 0:
            hint = "raise --max-length, or shorten the rows"
            raise PerlError(f"{self.report.source}: every row is {_reason(self.longest, self.on_long)}", hint)

    def _refuse(self) -> None:
        numbers = self._refused
        shown = ", ".join(map(str, numbers[:NAMED_ROWS])) + ("…" if len(numbers) > NAMED_ROWS else "")
        raise PerlError(
            f"{self.report.source}: {counted(len(numbers), 'row')} longer than {self.longest} tokens, the longest has "
            f"{self.report.tokens['max']:,}: {'row' if len(numbers) == 1 else 'rows'} {shown}",
            "raise --max-length, or take --on-long drop or truncate",
        )


def fit(
    data: Data, longest: int, tokens: Tokens, *, on_long: str = "drop", render: Renderer | None = None
) -> list[Columns]:
    """The columns of all rows that `Fitting` leaves; `data` keeps those rows. Raises PerlError."""
    return list(fitted(data, longest, tokens, on_long=on_long, render=render))


def fitted(
    data: Data, longest: int, tokens: Tokens, *, on_long: str = "drop", render: Renderer | None = None
) -> Iterator[Columns]:
    """The same, one row's after the other; `data` and its report are whole after the last."""
    fitting = Fitting(data.report, longest, tokens, on_long=on_long, render=render)
    rows, numbers = [], []
    for place, used, item in fitting.take(list(zip(data.numbers, data.rows, strict=True))):
        rows.append(used)
        numbers.append(data.numbers[place])
        yield item
    fitting.end()
    restrict(data, rows, numbers)
    if render:
        render.forget()


def length_of(item: Columns) -> int:
    """A row's length in tokens: that of the longest list of ids among its columns."""
    return max(len(ids) for ids in item.values() if isinstance(ids, list))


def _reason(longest: int, on_long: str) -> str:
    cut = ", which no cut of the prompt mends" if on_long == "truncate" else ""
    return f"longer than {longest} tokens{cut}"


def truncate(row: Row, longest: int, tokens: Tokens, render: Renderer) -> Row | None:
    """The row with so much of its prompt cut off from the left that it fits; None where no cut is enough.

    It is the prompt's content that is cut, not its ids, so that all who render the row later give it the same tokens:
    what the tokenizer or the chat template puts first stays, and so do system messages and all completions. In a
    conversation the oldest turns go first, then the beginning of the oldest person's turn that is left.
    """
    starts = _starts(row.prompt)
    fits = bisect_left(starts, True, key=lambda start: _excess(row, _from(row.prompt, start), longest, tokens) <= 0)
    for start in starts[max(0, fits - 1) : fits + 1]:  # before the first that fits whole, the next can be cut to fit
        prompt = _from(row.prompt, start)
        cut: Content | None = prompt
        excess, total = _excess(row, prompt, longest, tokens), 0
        while excess > 0 and cut is not None:
            total += excess  # cut in another place, the rest may become some tokens more
            cut = _without_start(prompt, total, render)
            excess = 0 if cut is None else _excess(row, cut, longest, tokens)
        if cut is not None:
            return replace(row, prompt=cut)
    return None


def _excess(row: Row, prompt: Content, longest: int, tokens: Tokens) -> int:
    return length_of(tokens(replace(row, prompt=prompt))) - longest


def _starts(prompt: Content | None) -> list[int]:
    """Where a prompt can begin: at 0, and a conversation at each later turn of the person, system messages aside."""
    if prompt is None or isinstance(prompt, str):
        return [] if prompt is None else [0]
    turns = [message for message in prompt if message["role"] != "system"]
    return [0, *(place for place, message in enumerate(turns) if place and message["role"] == "user")]


def _from(prompt: Any, start: int) -> Any:
    """What is left of a prompt that begins there."""
    if not start:
        return prompt
    system = [message for message in prompt if message["role"] == "system"]
    turns = [message for message in prompt if message["role"] != "system"]
    return [*system, *turns[start:]]


def _without_start(prompt: Content, count: int, render: Renderer) -> Content | None:
    """The prompt without the first `count` tokens of its text (a conversation: of its first turn), or None."""
    if isinstance(prompt, str):
        return render.without_start(prompt, count)
    place = next((n for n, message in enumerate(prompt) if message["role"] != "system"), None)
    text = None if place is None else render.without_start(prompt[place]["content"], count)
    if place is None or text is None:
        return None
    return [*prompt[:place], {**prompt[place], "content": text}, *prompt[place + 1 :]]

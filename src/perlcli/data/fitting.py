"""Rows as token columns within a length, and what becomes of those that are longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from perlcli.data.checks import percentiles, restrict
from perlcli.data.render import Renderer
from perlcli.data.rows import Content, Data, Row
from perlcli.errors import PerlError

Columns = dict[str, Any]
Tokens = Callable[[Any], Columns]
NAMED_ROWS = 10
BATCH = 128  # rows that are encoded at once: a tokenizer takes some hundred bytes a token for it


def fit(
    data: Data, longest: int, tokens: Tokens, *, on_long: str = "drop", render: Renderer | None = None
) -> list[Columns]:
    """Each row's columns by `tokens`, no list of ids among them longer than `longest`. Raises PerlError.

    What becomes of a longer row is `on_long`'s choice: "drop" leaves it out, "truncate" cuts its prompt from the left
    with `render`, "error" refuses the data. The report counts them, and `data` keeps the rows that are used.
    """
    found = list(fitted(data, longest, tokens, on_long=on_long, render=render))
    if render:
        render.forget()
    return found


def fitted(
    data: Data, longest: int, tokens: Tokens, *, on_long: str = "drop", render: Renderer | None = None
) -> Iterator[Columns]:
    """The same, one row at a time; the report is whole after the last."""
    rows: list[Row] = []
    numbers, lengths, refused = [], [], []
    for place, (number, row) in enumerate(zip(data.numbers, data.rows, strict=True)):
        if render and place % BATCH == 0:
            render.foresee(data.rows[place : place + BATCH])
        used, item = row, tokens(row)
        lengths.append(length_of(item))
        if lengths[-1] > longest:
            refused.append(number)
            shorter = truncate(row, longest, tokens, render) if on_long == "truncate" and render else None
            if shorter is None:
                data.report.drop(_reason(longest, on_long), number)
                continue
            data.report.truncated.append(number)
            used, item = shorter, tokens(shorter)
        rows.append(used)
        numbers.append(number)
        yield item
    data.report.tokens = percentiles(lengths)
    if refused and on_long == "error":
        _refuse(data, longest, refused)
    if not rows:
        hint = "raise --max-length, or shorten the rows"
        raise PerlError(f"{data.report.source}: every row is {_reason(longest, on_long)}", hint)
    restrict(data, rows, numbers)


def length_of(item: Columns) -> int:
    """A row's length in tokens: that of the longest list of ids among its columns."""
    return max(len(ids) for ids in item.values() if isinstance(ids, list))


def _reason(longest: int, on_long: str) -> str:
    cut = ", which no cut of the prompt mends" if on_long == "truncate" else ""
    return f"longer than {longest} tokens{cut}"


def _refuse(data: Data, longest: int, numbers: list[int]) -> None:
    shown = ", ".join(map(str, numbers[:NAMED_ROWS])) + ("…" if len(numbers) > NAMED_ROWS else "")
    raise PerlError(
        f"{data.report.source}: {len(numbers):,} rows are longer than {longest} tokens, the longest has "
        f"{data.report.tokens['max']:,}: rows {shown}",
        "raise --max-length, or take --on-long drop or truncate",
    )


def truncate(row: Row, longest: int, tokens: Tokens, render: Renderer) -> Row | None:
    """The row with so much of its prompt cut off from the left that it fits; None where no cut is enough.

    It is the prompt's content that is cut, not its ids, so that all who render the row later give it the same tokens:
    what the tokenizer or the chat template puts first stays, and so do system messages and all completions. In a
    conversation the oldest turns go first, then the beginning of the oldest person's turn that is left.
    """
    for prompt in _later_starts(row.prompt):
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


def _later_starts(prompt: Content | None) -> Iterator[Content]:
    """The prompt, and for a conversation what is left of it when it begins at each later turn of the person."""
    if prompt is None:
        return
    yield prompt
    if isinstance(prompt, str):
        return
    system = [message for message in prompt if message["role"] == "system"]
    turns = [message for message in prompt if message["role"] != "system"]
    for place, message in enumerate(turns):
        if place and message["role"] == "user":
            yield [*system, *turns[place:]]


def _without_start(prompt: Content, count: int, render: Renderer) -> Content | None:
    """The prompt without the first `count` tokens of its text (a conversation: of its first turn), or None."""
    if isinstance(prompt, str):
        return render.without_start(prompt, count)
    place = next((n for n, message in enumerate(prompt) if message["role"] != "system"), None)
    text = None if place is None else render.without_start(prompt[place]["content"], count)
    if place is None or text is None:
        return None
    return [*prompt[:place], {**prompt[place], "content": text}, *prompt[place + 1 :]]

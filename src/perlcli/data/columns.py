"""The columns of a source: which ones a reader used, and which ones `--columns` gives other names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from perlcli.data.fields import BadField, is_missing
from perlcli.data.files import DECODER
from perlcli.data.rows import Raw, Row, completions, text_of
from perlcli.errors import PerlError
from perlcli.text import clip, shorten

# What `--columns` can name: the columns of TRL's formats and what readers add to them.
TARGETS = (
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "score",
    "messages",
    "conversations",
    "text",
    "system",
    "history",
    "tools",
    "margin",
)
# Columns that are part of the question, or change what a row means: a reader that doesn't use them would be wrong.
QUESTIONS = ("system", "system_prompt", "instruction", "input", "question", "context", "history", "tools")
MEANINGS = ("kto_tag", "weight", "margin", "train", "role")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Watched(Mapping[str, object]):
    """A row that notes in `used` which of its columns were read, but for those in `apart`."""

    def __init__(self, raw: Raw, apart: Collection[str] = ()) -> None:
        self._raw, self._apart = raw, apart
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> object:
        value = self._raw[name]
        if name not in self._apart:
            self.used.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def unused(self) -> dict[str, object]:
        """The columns with a value that were not read."""
        return {name: value for name, value in self._raw.items() if name not in self.used and not is_empty(value)}


def is_empty(value: object) -> bool:
    """Whether a column says nothing: it is missing, or an empty list or object."""
    return is_missing(value) or value in ([], {})


def decoded(value: object) -> object:
    """A list of messages that a table has as JSON text; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return DECODER.decode(value.strip())
    except (ValueError, RecursionError):
        return value


def ignored(unused: Raw, use: str, rows: Sequence[Row]) -> str | None:
    """The first unused column that is part of the question or changes what the row means; None if there is none. A
    column whose text is also in one of the rows was used through another column."""
    names = (*MEDIA, *QUESTIONS, *(() if use == "rl" else MEANINGS))
    found = [name for name in names if name in unused]
    if not found or not rows:
        return None
    texts = [text_of(content) for row in rows for content in (row.prompt or "", *completions(row))]
    return next((name for name in found if not _is_within(unused[name], texts)), None)


def _is_within(value: object, texts: Sequence[str]) -> bool:
    return isinstance(value, str) and any(value.strip() in text for text in texts)


def not_used(source: str, column: str, format_name: str, use: str, raw: Raw) -> PerlError:
    """The error for a column that would be ignored; the hint leaves it out of the row's other columns."""
    problem = f"{source} has the column {column}, which the format {format_name} does not read"
    why = "only text can be used" if column in MEDIA else "it may be part of the question, or change what a row means"
    if column == "role":
        why = "the messages of a conversation belong into one row, as a list called messages"
    return PerlError(problem, f"{why}: {_without(column, raw, use)}")


def _without(column: str, raw: Raw, use: str) -> str:
    """A --columns with everything that the row has under the names of a format, but for one column."""
    formats = (("prompt",), ("messages",)) if use == "rl" else NAMED
    fitting = (names for names in formats if column not in names and all(name in raw for name in names))
    names = next(fitting, ())
    if not names:
        return f"name the columns to use with --columns {COLUMNS[use]}"
    more = [name for name in KEPT if name in raw and name != column and (use != "rl" or name != "margin")]
    given = ",".join(f"{name}={name}" for name in (*names, *more))
    return f"to leave it out, --columns {given}"


NAMED = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "completion", "label"),
    ("prompt", "completion", "score"),
    ("prompt", "completion"),
    ("messages",),
    ("text",),
)
KEPT = ("system", "history", "tools", "margin")  # what else these formats read
COLUMNS = {
    "sft": "prompt=COLUMN,completion=COLUMN",
    "reward": "prompt=COLUMN,chosen=COLUMN,rejected=COLUMN",
    "rl": "prompt=COLUMN",
}


# --- --columns


def parse(given: str | None) -> dict[str, str]:
    """The source's column for each name that `--columns` gives. Raises PerlError if it can't be read."""
    found: dict[str, str] = {}
    for item in _items(given) if given is not None else ():
        name, _, column = item.partition("=")
        name, column = name.strip(), _unquoted(column.strip())
        if name not in TARGETS or not column or name in found:
            problem = f"--columns must be NAME=COLUMN, comma-separated, not {shorten(given, 200)}"
            wrong = f"{shorten(name)} is not one of {', '.join(TARGETS)}" if name not in TARGETS else ""
            again = f"{name} is there twice" if name in found else f"{name} has no column"
            raise PerlError(problem, wrong or again)
        found[name] = column
    return found


def _items(given: str) -> list[str]:
    """The parts between commas that are outside quotes."""
    return re.findall(r"""((?:[^,"']|"[^"]*"|'[^']*'|["'])+)""", given) or [given]


def _unquoted(name: str) -> str:
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'" else name


def chosen(raw: Raw, names: Mapping[str, str]) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
    """The columns of a row that `--columns` names, under their new names; the other columns; and the column of the
    completion under its own name, as reward functions know it. Raises BadField if the row lacks one."""
    taken = {name: at(raw, column) for name, column in names.items()}
    tops = {name: column if column in raw else column.partition(".")[0] for name, column in names.items()}
    answer = tops.get("completion", "completion")
    own = {answer: raw[answer]} if answer not in names and list(tops.values()).count(answer) == 1 else {}
    return taken, {name: value for name, value in raw.items() if name not in tops.values()}, own


def at(raw: Raw, path: str) -> object:
    """The value of a column, or of a dotted path into nested objects and lists. Raises BadField if there is none."""
    if path in raw:
        return raw[path]
    value: object = raw
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isascii() and part.isdigit() and int(part[:9]) < len(value):
            value = value[int(part[:9])]
        else:
            raise BadField(f"the row has no {path} (--columns): it has {clip(', '.join(map(str, raw)), 300) or 'none'}")
    return value

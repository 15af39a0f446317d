"""Chooses the format of a source for a stage, by name or by its columns."""

from __future__ import annotations

from perlcli.data.columns import COLUMNS, proposal
from perlcli.data.formats import FORMATS, NAMES, Format, detect
from perlcli.data.rows import Raw
from perlcli.errors import PerlError
from perlcli.text import clip

# The columns that each stage accepts, for the error about a file with others.
NEEDS = {
    "sft": "prompt and completion, messages, or text",
    "reward": "chosen and rejected (prompt optional), or prompt, completion and label",
    "rl": "prompt (or any format that has one: prompt and completion, chosen and rejected, messages)",
}


class UnknownFormat(PerlError):
    """Columns that are of no format for a stage: `found` says that, `needed` what the stage needs; `way` is a
    --columns for them, if their names say enough."""

    def __init__(self, source: str, raw: Raw, use: str) -> None:
        self.found, self.needed = f"has the columns {shown(raw)}", f"`perl {use}` needs {NEEDS[use]}"
        self.way = proposal(raw, use)
        way = self.way or f"--columns {COLUMNS[use]}"
        super().__init__(
            f"{source} {self.found}; {self.needed}", f"name the columns, {way}; docs/data.md lists the formats"
        )


def shown(raw: Raw) -> str:
    """The names of a row's columns."""
    return clip(", ".join(map(str, raw)), 300) or "none"


def choose(raw: Raw, use: str, source: str, name: str | None) -> Format:
    """The format with this name, else that of `raw`, the first row of a source. Raises PerlError if it does not serve
    the use."""
    if name is None:
        known = detect(raw, use)
        if known is None or use not in known.uses:
            raise UnknownFormat(source, raw, use)
        return known
    known = NAMES[name]
    if use not in known.uses:
        problem = f"--data-format {name} does not work with `perl {use}`, which needs {NEEDS[use]}"
        serving = ", ".join(item.name for item in FORMATS if use in item.uses)
        raise PerlError(problem, f"formats for perl {use}: {serving}")
    if not set(known.columns) <= set(raw):
        problem = f"--data-format {name} needs the columns {', '.join(known.columns)}; {source} has {shown(raw)}"
        other = detect(raw)
        hint = f"it looks like {other.name}; leave out --data-format" if other else "name the columns with --columns"
        raise PerlError(problem, hint)
    return known

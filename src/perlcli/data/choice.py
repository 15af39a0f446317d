"""Chooses the format of a source for a stage, by name or by its columns."""

from __future__ import annotations

from collections.abc import Mapping

from perlcli.data.columns import COLUMNS
from perlcli.data.formats import FORMATS, NAMES, Format, detect
from perlcli.data.proposals import proposal, rivals
from perlcli.data.rows import Raw, quoted
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
        problem = "" if self.way else rivals(raw, use)
        self.is_specific = bool(self.way or problem)  # whether the hint is about these columns
        hint = problem or f"name the columns, {self.way or f'--columns {COLUMNS[use]}'}"
        super().__init__(f"{source} {self.found}; {self.needed}", f"{hint}; docs/data.md lists the formats")


def _is_by_column(raw: Raw) -> bool:
    """Whether a row is a table by columns, as pandas writes it: `{"prompt": {"0": …, "1": …}, …}`."""
    keys = [set(value) if isinstance(value, Mapping) else set() for value in raw.values()]
    return bool(keys) and bool(keys[0]) and all(own == keys[0] and all(map(str.isdigit, own)) for own in keys)


def shown(raw: Raw) -> str:
    """The names of a row's columns."""
    return clip(", ".join(quoted(str(name)) for name in raw), 300) or "none"


def choose(raw: Raw, use: str, source: str, name: str | None) -> Format:
    """The format with this name, else that of `raw`, the first row of a source. Raises PerlError if it does not serve
    the use."""
    if _is_by_column(raw):
        problem = f"{source} is one object that has a list of values for each column, not rows"
        raise PerlError(problem, 'write rows, with pandas: to_json("data.jsonl", orient="records", lines=True)')
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

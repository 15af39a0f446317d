"""`perl data convert`: data of any known format as JSONL in TRL's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from perlcli import settings
from perlcli.commands import data_file
from perlcli.data import Demonstration, Preference, Prompt, Thumb
from perlcli.data.formats import detect
from perlcli.data.rows import Row
from perlcli.errors import PerlError
from perlcli.run.files import write_whole
from perlcli.terminal import say
from perlcli.text import counted


def run(given: settings.DataConvert) -> None:
    """Write the rows and say what became of them. Raises PerlError."""
    file = data_file.name_of(given)
    path = Path(given.run.output or f"{Path(file).name.partition('.')[0]}-trl.jsonl").expanduser()
    check_path(path, file, overwrite=given.run.overwrite)
    use, found = data_file.load(given, given.convert.for_, chat=not given.convert.text)
    rows = [as_trl(row) for row in found.rows]
    write_whole(path, (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    for line in found.report.lines():
        say(line)
    say(f"Wrote {path}: {counted(len(rows), 'row')} of {', '.join(rows[0])}, for perl {use}")


def check_path(path: Path, file: str, *, overwrite: bool) -> None:
    """Raise PerlError where the output can't be written, or isn't to be."""
    if path.suffix != ".jsonl":
        raise PerlError(f"--output {path} must end in .jsonl: that is what is written")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in no folder: {path.parent} is not there"
        raise PerlError(f"--output {path} {what}", "name a file in a folder that exists")
    if path.exists() and Path(file).expanduser().exists() and path.samefile(Path(file).expanduser()):
        raise PerlError(f"--output {path} is the file that is read", "name another")
    if path.exists() and not overwrite:
        raise PerlError(f"--output {path} exists", "--overwrite to replace it, or another --output")


def as_trl(row: Row) -> dict[str, Any]:
    """The row under TRL's names: what is a list of messages is its conversational form, text its standard one."""
    if isinstance(row, Prompt):
        whole = {"prompt": row.prompt, **row.extra}  # what goes to reward functions
        found = detect(whole)
        return whole if found and found.name == "prompts" else {"prompt": row.prompt}
    prompt = {} if row.prompt is None else {"prompt": row.prompt}
    if isinstance(row, Preference):
        return {**prompt, "chosen": row.chosen, "rejected": row.rejected}
    if isinstance(row, Thumb):
        return {**prompt, "completion": row.completion, "label": row.label}
    return {**prompt, _name(row): row.completion}


def _name(row: Demonstration) -> str:
    if row.prompt is not None:
        return "completion"
    return "text" if isinstance(row.completion, str) else "messages"

"""`perl data convert`: data in any known format as JSONL in TRL's format."""

from __future__ import annotations

import json
from pathlib import Path

from perlcli import settings
from perlcli.commands import data_file, early
from perlcli.data import Preference, Prompt, Thumb
from perlcli.data.columns import QUESTIONS
from perlcli.data.formats import detect
from perlcli.data.rows import Row, Template
from perlcli.errors import PerlError
from perlcli.run import next_steps
from perlcli.run.files import write_whole
from perlcli.terminal import say
from perlcli.text import counted, shorten


def run(given: settings.DataConvert) -> None:
    """Write the converted rows and print the report. Raises PerlError if the rows can't be used or written."""
    file = early.file_name(given)
    path = Path(given.run.output or f"{Path(file).name.partition('.')[0]}-trl.jsonl").expanduser()
    check_path(path, file, overwrite=given.run.overwrite)
    use, loaded = data_file.load(given, given.convert.for_, chat=not given.convert.text)
    rows = [as_trl(row) for row in loaded.rows]
    write_whole(path, (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    for line in loaded.report.lines():
        say(line)
    say(f"Wrote {path}: {counted(len(rows), 'row')} with {', '.join(rows[0])}, for perl {use}")
    say(next_steps.after_convert(path, use))


def check_path(path: Path, file: str, *, overwrite: bool) -> None:
    """Raises PerlError if the output can't be written, or would replace a file without --overwrite."""
    if path.suffix != ".jsonl":
        raise PerlError(f"--output must end in .jsonl, not {shorten(path.name)}")
    if path.is_dir():
        raise PerlError(f"--output {path} is a folder", "name a file")
    if not path.parent.is_dir():
        problem = f"--output {path}: the folder {path.parent} does not exist"
        raise PerlError(problem, "name a file in an existing folder")
    source = Path(file).expanduser()
    if path.exists() and source.exists() and path.samefile(source):
        raise PerlError(f"--output {path} is also the input file", "choose another --output")
    if path.exists() and not overwrite:
        raise PerlError(f"--output {path} already exists", "use --overwrite to replace it, or choose another --output")


def as_trl(row: Row) -> dict[str, object]:
    """The row with TRL's column names: messages stay conversational, text stays standard."""
    more = columns_of(row.template)
    if isinstance(row, Prompt):
        detected = detect({"prompt": row.prompt, **row.extra})
        is_plain = detected is not None and detected.name == "prompts"
        extra = {name: value for name, value in row.extra.items() if is_plain and name not in READ}
        return {"prompt": row.prompt, **extra, **more}  # the extra columns go to reward functions
    prompt: dict[str, object] = {} if row.prompt is None else {"prompt": row.prompt}
    if isinstance(row, Preference):
        margin = {} if row.margin is None else {"margin": row.margin}
        return {**prompt, "chosen": row.chosen, "rejected": row.rejected, **margin, **more}
    if isinstance(row, Thumb):
        return {**prompt, "completion": row.completion, "label": row.label, **more}
    if prompt:
        return {**prompt, "completion": row.completion, **more}
    return {"text" if isinstance(row.completion, str) else "messages": row.completion, **more}


# Columns that are in the prompt already: read again, they would be there twice.
READ = (*QUESTIONS, "chat_template_kwargs")


def columns_of(template: Template) -> dict[str, object]:
    """What a row passes to the chat template, as columns."""
    options = {name: value for name, value in template.items() if name != "tools"}
    tools = {"tools": template["tools"]} if "tools" in template else {}
    return {**tools, **({"chat_template_kwargs": options} if options else {})}

"""`perl data check`: which commands can use a file, and what would become of its rows there."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from perlcli import data, data_file, settings
from perlcli.data import Renderer
from perlcli.data.sources import has_split
from perlcli.errors import PerlError

INDENT = " " * 18
STAGES: tuple[settings.Use, ...] = ("sft", "reward", "rl")
EVAL = {"reward": "a reward model, on the rows of perl reward", "rl": "a policy, on the prompts of perl rl"}


def run(given: settings.DataCheck) -> None:
    """Print for each command whether it can use the file, with the report. Raises PerlError where none can."""
    values = settings.resolve(given, {})
    settings.check(values)
    file, render = data_file.name_of(values), data_file.renderer(values)
    data_file.check_is_no_stream(file, "save it to a file first")
    found, faults = reports(values, file, render)
    if not found:
        raise failure(file, list(faults.values()))
    print(f"{file}, with the tokenizer of {values.model.model or 'the embedded coffee base'}\n")
    for use in STAGES:
        say(f"perl {use}", use in found, found.get(use) or faults[use].problem.splitlines())
    measured = [EVAL[use] for use in ("reward", "rl") if use in found]
    say("perl eval", bool(measured), ["; ".join(measured) or "it needs what perl reward or perl rl needs"])


def failure(file: str, faults: list[PerlError]) -> PerlError:
    """The error that tells why no command can use the file."""
    if data_file.is_same(faults):
        return faults[0]
    return PerlError("\n".join([f"No command can use {file}:", *(fault.problem for fault in faults)]))


def reports(
    values: settings.DataCheck, file: str, render: Renderer
) -> tuple[dict[str, list[str]], dict[str, PerlError]]:
    """What each stage says of the file, line by line, or why it can't use it.

    The stages go through the rows side by side, so that what one has encoded serves the others too.
    """
    found: dict[str, list[str]] = {}
    faults: dict[str, PerlError] = {}
    going = {use: report(values, file, use, render) for use in data_file.USES}
    while going:
        for use, steps in list(going.items()):
            try:
                next(steps)
            except StopIteration as end:
                found[use] = end.value
            except PerlError as fault:
                faults[use] = fault
            if use in found or use in faults:
                del going[use]
    return found, faults


def report(
    values: settings.DataCheck, file: str, use: settings.Use, render: Renderer
) -> Generator[None, None, list[str]]:
    """What a stage says of the file, and of its held-out side where it is a folder that has one; yields at each row."""
    options = data_file.options_of(values)
    train = data.load(file, use, chat=render.chat, options=options)
    sides = [train]
    if data.is_embedded(file) or has_split(file, "test", options):
        held_out = data.load(file, use, split="test", chat=render.chat, options=replace(options, split=None))
        held_out.report.overlap = data.overlap(train, held_out)
        sides.append(held_out)
    lines = []
    for name, rows in zip(("train: ", "eval: ") if len(sides) > 1 else ("",), sides, strict=True):
        for _ in data_file.columns(rows, use, render, values.length):
            yield
        lines += [name + line.removeprefix(f"{file}: ") for line in rows.report.lines()]
    return lines


def say(command: str, can: bool, lines: list[str]) -> None:
    """Print a command, whether it can use the file, and why."""
    print(f"{command:<13}{'yes' if can else 'no':<5}" + f"\n{INDENT}".join(lines), flush=True)

"""`perl data check`: which commands can use a file, and what would become of its rows there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice

from perlcli import data, settings
from perlcli.commands import data_file
from perlcli.data import Intake, Renderer
from perlcli.data.checks import Marks, Tally, prompt_mark
from perlcli.data.rows import Found
from perlcli.data.sources import has_split, title
from perlcli.errors import PerlError
from perlcli.terminal import say

INDENT = " " * 18
BATCH = 128  # rows of the source that the stages take by turns, so that what one has encoded serves the others too
STAGES: tuple[settings.Use, ...] = ("sft", "reward", "rl")
EVAL = {"reward": "a reward model, on the rows of perl reward", "rl": "a policy, on the prompts of perl rl"}
Numbered = tuple[int, Found]  # a row of the source with its number
Faults = dict[str, PerlError]  # why stages can't use the file


def run(given: settings.DataCheck) -> None:
    """Print for each command whether it can use the file, with the report. Raises PerlError where none can."""
    values = settings.resolve(given, {})
    settings.check(values)
    file, render = data_file.name_of(values), data_file.renderer(values)
    found, faults = reports(values, file, render)
    if not found:
        raise failure(title(file), list(faults.values()))
    say(f"{title(file)}, with the tokenizer of {values.model.model or 'the embedded coffee base'}\n")
    for use in STAGES:
        tell(f"perl {use}", use in found, found.get(use) or faults[use].problem.splitlines())
    measured = [EVAL[use] for use in ("reward", "rl") if use in found]
    tell("perl eval", bool(measured), ["; ".join(measured) or "it needs what perl reward or perl rl needs"])


def failure(file: str, faults: list[PerlError]) -> PerlError:
    """The error that tells why no command can use the file."""
    if data_file.is_same(faults):
        return faults[0]
    return PerlError("\n".join([f"No command can use {file}:", *(fault.problem for fault in faults)]))


class Look:
    """What one stage makes of one side of a file, some rows at a time: figures and digests stay, but no row."""

    def __init__(self, values: settings.DataCheck, use: settings.Use, split: str, render: Renderer) -> None:
        options = options_of(values, split)
        self.intake = Intake(options.data, use, split, chat=render.chat, options=options)
        self.fitting = data_file.fitting(self.intake.report, use, render, values.length)
        self.tally, self.prompts = Tally(), Marks()

    def take(self, batch: Iterable[Numbered], *, has_sides: bool) -> None:
        """Count rows of the source in. Raises PerlError where the stage can't use them."""
        rows = [(number, row) for number, item in batch for row in self.intake.take(number, item)]
        if self.intake.is_faulty:  # the rest is read for its faults alone
            return
        for place, _, _ in self.fitting.take(rows):
            number, row = rows[place]
            self.tally.add(number, row)
            if has_sides:
                self.prompts.add(prompt_mark(row), number)

    def end(self) -> None:
        """Complete the report. Raises PerlError where the stage can't use the rows."""
        self.intake.end()
        self.fitting.end()
        self.tally.put(self.intake.report)


def reports(values: settings.DataCheck, file: str, render: Renderer) -> tuple[dict[str, list[str]], Faults]:
    """What each stage says of the file, and of its held-out side where it has one, or why it can't use it."""
    has_sides = data.is_embedded(file) or has_split(file, "test", data_file.options_of(values))
    names = {"train": "train: ", "test": "eval: "} if has_sides else {"train": ""}
    faults: Faults = {}
    sides = [(name, look(values, split, render, faults, has_sides=has_sides)) for split, name in names.items()]
    found: dict[str, list[str]] = {}
    for use in (use for use in STAGES if use not in faults):
        if has_sides:
            (_, train), (_, test) = sides
            test[use].intake.report.overlap = test[use].prompts.found_in(train[use].prompts)
        told = [(name, line) for name, side in sides for line in side[use].intake.report.lines()]
        found[use] = [name + line.removeprefix(f"{title(file)}: ") for name, line in told]
    return found, faults


def look(
    values: settings.DataCheck, split: str, render: Renderer, faults: Faults, *, has_sides: bool
) -> dict[settings.Use, Look]:
    """What each stage without a fault makes of a side, for all of which the rows are read once; adds to the faults."""
    file, found = data_file.name_of(values), {}
    for use in (use for use in data_file.USES if use not in faults):
        with noted(faults, use):
            found[use] = Look(values, use, split, render)
    for together in [[use] for use in found] if data.is_embedded(file) else [list(found)]:
        for batch in batches(values, together[0], split) if together else ():
            going = [use for use in together if use not in faults]
            if not going:
                break
            for use in going:
                with noted(faults, use):
                    found[use].take(batch, has_sides=has_sides)
    for use in (use for use in found if use not in faults):
        with noted(faults, use):
            found[use].end()
    return found


@contextmanager
def noted(faults: Faults, use: settings.Use) -> Iterator[None]:
    """Keep a fault of one stage, as the others may go on."""
    try:
        yield
    except PerlError as fault:
        faults[use] = fault


def batches(values: settings.DataCheck, use: settings.Use, split: str) -> Iterator[list[Numbered]]:
    """A side's rows as the source has them, some at a time. Raises PerlError."""
    options = options_of(values, split)
    with closing(data.read(options.data, use, split, options)) as rows:
        numbered = enumerate(rows, start=1)
        while batch := list(islice(numbered, BATCH)):
            yield batch


def options_of(values: settings.DataCheck, split: str) -> settings.DataSettings:
    """How to read a side: --split is of the rows that train."""
    options = data_file.options_of(values)
    return options if split == "train" else replace(options, split=None)


def tell(command: str, can: bool, lines: list[str]) -> None:
    """Print a command, whether it can use the file, and why."""
    say(f"{command:<13}{'yes' if can else 'no':<5}" + f"\n{INDENT}".join(lines))

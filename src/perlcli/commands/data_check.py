"""`perl data check`: which commands can use a file, and what would become of its rows there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice

from perlcli import data, settings
from perlcli.commands import data_file, early
from perlcli.data import Intake, Renderer
from perlcli.data.checks import Digests, Tally, prompt_digest
from perlcli.data.choice import UnknownFormat
from perlcli.data.loading import numbered
from perlcli.data.rows import SourceRow
from perlcli.data.sources import has_split, title
from perlcli.errors import PerlError
from perlcli.terminal import say

INDENT = " " * 18
BATCH = 128  # rows of the source that the stages take in turn, so that they share what has been encoded
STAGES: tuple[settings.Use, ...] = ("sft", "reward", "rl")
EVAL = {"reward": "reward models, on the rows of perl reward", "rl": "policies, on the prompts of perl rl"}
Numbered = tuple[int, SourceRow]  # a row of the source with its number
Faults = dict[settings.Use, PerlError]  # why stages can't use the file


def run(given: settings.DataCheck) -> None:
    """Print for each command whether it can use the file, with the report. Raises PerlError if none can."""
    values = settings.resolve(given, data_file.proposed(given))
    settings.check(values)
    file, remarks, render = early.file_name(values), data_file.remarks(values), data_file.renderer(values)
    usable, faults = reports(values, file, render)
    if not usable:
        raise data_file.unusable(file, [faults[use] for use in data_file.USES])
    say(f"{title(file)}, with the tokenizer of {values.model.model or 'the embedded coffee base'}\n")
    for remark in remarks:
        say(f"{remark}\n")
    said: dict[str, str] = {}  # each fault once, with the first command that has it
    for use in STAGES:
        if use in usable:
            print_answer(f"perl {use}", True, usable[use])
            continue
        lines = fault_lines(faults[use], said.get(faults[use].problem))
        said.setdefault(faults[use].problem, use)
        print_answer(f"perl {use}", False, lines)
    measured = [EVAL[use] for use in ("reward", "rl") if use in usable]
    print_answer("perl eval", bool(measured), ["; ".join(measured) or "needs rows that perl reward or perl rl can use"])


class Look:
    """What one stage makes of one side of a file, a batch at a time; it keeps counts and digests, but no rows."""

    def __init__(
        self, values: settings.DataCheck, use: settings.Use, split: str, render: Renderer, *, has_sides: bool
    ) -> None:
        options = data_file.options_of(values, split)
        self.intake = Intake(options.data, use, split, chat=render.makes_turns, options=options)
        self.fitting = data_file.fitting(self.intake.report, use, render, values.length, values.model.loss_on)
        self.tally, self.prompts, self.has_sides = Tally(), Digests(), has_sides

    def take(self, batch: Iterable[Numbered]) -> None:
        """Count rows of the source. Raises PerlError if the stage can't use them."""
        rows = [(number, row) for number, item in batch for row in self.intake.take(number, item)]
        if self.intake.fault_count:  # the rest is only read for its errors
            return
        for place, _, _ in self.fitting.take(rows):
            number, row = rows[place]
            self.tally.add(number, row)
            if self.has_sides:
                self.prompts.add(prompt_digest(row), number)

    def end(self) -> None:
        """Complete the report. Raises PerlError if the stage can't use the rows."""
        self.intake.end()
        self.fitting.end()
        self.tally.put(self.intake.report)


def reports(values: settings.DataCheck, file: str, render: Renderer) -> tuple[dict[settings.Use, list[str]], Faults]:
    """What each stage reports about the file and its held-out side, if it has one; or why it can't use the file."""
    has_sides = data.is_embedded(file) or has_split(file, "test", data_file.options_of(values))
    names = {"train": "train: ", "test": "eval: "} if has_sides else {"train": ""}
    faults: Faults = {}
    sides = {split: look(values, split, render, faults, has_sides=has_sides) for split in names}
    usable: dict[settings.Use, list[str]] = {}
    for use in STAGES:
        if use in faults:
            continue
        if has_sides:
            test = sides["test"][use]
            test.intake.report.overlap = test.prompts.found_in(sides["train"][use].prompts)
        usable[use] = []
        for split, looks in sides.items():
            lines = looks[use].intake.report.lines()
            usable[use] += [names[split] + line.removeprefix(f"{title(file)}: ") for line in lines]
    return usable, faults


def look(
    values: settings.DataCheck, split: str, render: Renderer, faults: Faults, *, has_sides: bool
) -> dict[settings.Use, Look]:
    """What each stage without a fault makes of one side; adds new faults to `faults`."""
    looks: dict[settings.Use, Look] = {}
    for use in data_file.USES:
        if use not in faults:
            with noted(faults, use):
                looks[use] = Look(values, use, split, render, has_sides=has_sides)
    if data.is_embedded(early.file_name(values)):  # the embedded rows are different for each stage
        for use, stage in looks.items():
            take_all({use: stage}, batches(values, use, split), faults)
    elif looks:  # a file is read once for all stages
        take_all(looks, batches(values, next(iter(looks)), split), faults)
    for use, stage in looks.items():
        if use not in faults:
            with noted(faults, use):
                stage.end()
    return looks


def take_all(looks: dict[settings.Use, Look], rows: Iterator[list[Numbered]], faults: Faults) -> None:
    """Give all batches to the stages, each until its first fault."""
    for batch in rows:
        active = {use: stage for use, stage in looks.items() if use not in faults}
        if not active:
            return
        for use, stage in active.items():
            with noted(faults, use):
                stage.take(batch)


@contextmanager
def noted(faults: Faults, use: settings.Use) -> Iterator[None]:
    """Keep the error of one stage, so that the others can continue."""
    try:
        yield
    except PerlError as fault:
        faults[use] = fault


def batches(values: settings.DataCheck, use: settings.Use, split: str) -> Iterator[list[Numbered]]:
    """One side's rows as the source has them, in batches. Raises PerlError if the source can't be read."""
    options = data_file.options_of(values, split)
    with closing(data.read(options.data, use, split, options)) as rows:
        items = numbered(rows, options)
        while batch := list(islice(items, BATCH)):
            yield batch


def fault_lines(fault: PerlError, same_as: str | None) -> list[str]:
    """Why a stage can't use the file, unless that is what another stage said, and what to type."""
    if same_as:
        return [f"as for perl {same_as}"]
    is_of_use = bool(fault.hint) and not (isinstance(fault, UnknownFormat) and not fault.is_specific)
    return [*fault.problem.splitlines(), *([f"Hint: {fault.hint}"] if is_of_use else [])]


def print_answer(command: str, is_usable: bool, lines: list[str]) -> None:
    say(f"{command:<13}{'yes' if is_usable else 'no':<5}" + f"\n{INDENT}".join(lines))

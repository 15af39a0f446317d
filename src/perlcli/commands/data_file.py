"""The file that a `perl data` command is about: its rows for a stage, and the tokens that they become there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from perlcli import data, settings, upstream
from perlcli.commands import early
from perlcli.data import Data, Renderer
from perlcli.data.choice import UnknownFormat
from perlcli.data.columns import COLUMNS as COLUMN_WAYS
from perlcli.data.dialogs import LossOn
from perlcli.data.fitting import Fitting, Room
from perlcli.data.render import Columns, of_demonstration, of_preference, of_prompt
from perlcli.data.rows import DataReport
from perlcli.data.sources import STDIN, title
from perlcli.errors import PerlError
from perlcli.model import checks, context, quantised, sources
from perlcli.training import rendering

USES: tuple[settings.Use, ...] = ("reward", "sft", "rl")  # the first that can use a file says most about it
ToColumns = Callable[[Renderer, Any], Columns]  # for a row of the stage
COLUMNS: dict[str, ToColumns] = {"sft": of_demonstration, "reward": of_preference, "rl": of_prompt}


def renderer(given: settings.DataCheck | settings.DataShow) -> Renderer:
    """The renderer of `--model`, which reads no weights. Raises PerlError if the model or tokenizer can't be read."""
    upstream.hush_bars()
    trust = given.model.trust_remote_code
    source = sources.locate(given.model.model, trust_remote_code=trust)
    return rendering.renderer_of(given.model, source, trust_remote_code=trust)


def proposed(given: settings.DataCheck) -> dict[str, Any]:
    """What the model of `--model` proposes for options that are unset. Raises PerlError if it can't be read."""
    trust = given.model.trust_remote_code
    return context.proposed(sources.locate(given.model.model, trust_remote_code=trust), trust_remote_code=trust)


def remarks(values: settings.DataCheck) -> list[str]:
    """What a run would note about `--model`. Raises PerlError if it would refuse it."""
    trust = values.model.trust_remote_code
    source = sources.locate(values.model.model, trust_remote_code=trust)
    given = settings.ModelSettings(trust_remote_code=trust, **quantised.proposed(source))
    return checks.check(source, given, longest=values.length.max_length)


def options_of(given: settings.OfData, side: str = "train") -> settings.DataSettings:
    """How to read one side of the file, in the form that the stages use: --split only applies to the training rows."""
    values = asdict(given.file) | ({} if side == "train" else {"split": None})
    return settings.DataSettings(data=values.pop("file"), **values)


def load(given: settings.OfData, use: settings.Use | None, *, chat: bool) -> tuple[settings.Use, Data]:
    """The stage and its rows: the given stage, else the first that can use the file. Raises PerlError if none can."""
    file, options = early.file_name(given), options_of(given)
    if use is not None:
        return use, data.load(file, use, chat=chat, options=options)
    if file == STDIN:
        raise PerlError("Standard input can be read only once, so the stage must be given", "name the stage with --for")
    faults = []
    for name in USES:
        try:
            return name, data.load(file, name, chat=chat, options=options)
        except PerlError as fault:
            faults.append(fault)
    raise unusable(file, faults)


def unusable(file: str, faults: Sequence[PerlError]) -> PerlError:
    """The error for a file that no stage can use, by the errors of all stages, each of them given once."""
    problems = list(dict.fromkeys(fault.problem for fault in faults))
    if len(problems) == 1:
        return faults[0]  # the reason is in the file, not in what it is used for
    unknown = [fault for fault in faults if isinstance(fault, UnknownFormat)]
    if len(unknown) == len(faults):
        best = next((fault for fault in unknown if fault.is_specific), unknown[0])
        start = f"No command can use {title(file)}, which {best.found}:"
        ways = f"--columns {COLUMN_WAYS['sft']} for perl sft, {COLUMN_WAYS['reward']} for perl reward"
        hint = best.hint if best.is_specific else f"name the columns, {ways}; docs/data.md lists the formats"
        return PerlError("\n".join([start, *(fault.needed for fault in unknown)]), hint)
    in_rows = [fault for fault in faults if not isinstance(fault, UnknownFormat)]  # nearest to what can be used
    return PerlError("\n".join([f"No command can use {title(file)}:", *problems]), in_rows[0].hint)


def fitting(
    report: DataReport,
    use: settings.Use,
    render: Renderer,
    length: settings.LengthSettings,
    loss_on: LossOn = "assistant",
) -> Fitting:
    """Turns rows into a stage's token columns and counts them in the report. Raises PerlError if no prompt can fit."""
    room = Room(length.max_length or 0, length.max_completion_length or 0 if use == "rl" else 0)
    learn = loss_on if use == "sft" else None
    tokens = partial(of_demonstration, render, loss_on=loss_on) if learn else partial(COLUMNS[use], render)
    return Fitting(report, room, tokens, on_long=length.on_long, render=render, learn=learn)

"""The file that `perl data` looks at: its rows for a stage, and the tokens that they become there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from perlcli import data, settings, upstream
from perlcli.data import Data, Renderer
from perlcli.data.fitting import Columns, Fitting
from perlcli.data.rows import DataReport
from perlcli.data.sources import STDIN
from perlcli.data.tokens import of_demonstration, of_preference, of_prompt
from perlcli.errors import PerlError
from perlcli.model import sources, tokenizers

USES: tuple[settings.Use, ...] = ("reward", "sft", "rl")  # the first that can use a file says most about it
COLUMNS: dict[str, Callable[[Renderer, Any], Columns]] = {
    "sft": of_demonstration, "reward": of_preference, "rl": of_prompt,
}  # fmt: skip


def name_of(given: settings.OfData) -> str:
    """The FILE that was named. Raises PerlError."""
    if given.file.file is None:
        command = settings.command_of(given)
        raise PerlError(
            "FILE is missing", f"perl {command} FILE, or perl {command} {data.COFFEE} for the embedded data"
        )
    return given.file.file


def renderer(given: settings.DataCheck | settings.DataShow) -> Renderer:
    """The renderer of `--model`; reads no weights. Raises PerlError."""
    upstream.hush_bars()
    trust = given.model.trust_remote_code
    source = sources.locate(given.model.model, trust_remote_code=trust)
    return tokenizers.renderer(source, tokenizers.load_tokenizer(source, trust_remote_code=trust))


def options_of(given: settings.OfData) -> settings.DataSettings:
    """How to read the file, as the stages take it."""
    file = given.file
    return settings.DataSettings(
        data=file.file, data_format=file.data_format, subset=file.subset, split=file.split,
        shp_score_ratio=file.shp_score_ratio, shp_per_post=file.shp_per_post,
    )  # fmt: skip


def load(given: settings.OfData, use: settings.Use | None, *, chat: bool) -> tuple[settings.Use, Data]:
    """The rows for a stage, or for the first stage that can use them, and which that is. Raises PerlError."""
    file, options = name_of(given), options_of(given)
    if use is not None:
        return use, data.load(file, use, chat=chat, options=options)
    if file == STDIN:
        raise PerlError("Standard input can be read once, and each stage reads for itself", "name the stage with --for")
    faults = []
    for name in USES:
        try:
            return name, data.load(file, name, chat=chat, options=options)
        except PerlError as fault:
            faults.append(fault)
    raise faults[0] if is_same(faults) else PerlError("\n".join(fault.problem for fault in faults))


def is_same(faults: list[PerlError]) -> bool:
    """Whether the stages failed for one reason, which then lies in the file and not in what it is used for."""
    return len({fault.problem for fault in faults}) == 1


def fitting(report: DataReport, use: settings.Use, render: Renderer, length: settings.LengthSettings) -> Fitting:
    """What makes a stage's columns of rows, and tells the report. Raises PerlError."""
    longest = (length.max_length or 0) - (length.max_completion_length or 0 if use == "rl" else 0)
    if longest <= 0:
        raise PerlError("--max-length leaves no room for a prompt before --max-completion-length", "raise --max-length")
    return Fitting(report, longest, partial(COLUMNS[use], render), on_long=length.on_long, render=render)

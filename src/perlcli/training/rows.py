"""Loads a run's data and turns its rows into tables of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from perlcli import data, settings
from perlcli.data import Data
from perlcli.data.checks import FEWEST
from perlcli.data.fitting import Fitting, Room, Tokens
from perlcli.data.render import Columns
from perlcli.data.sources import has_split
from perlcli.model.sources import Source
from perlcli.run.files import PROMPTS
from perlcli.run.record import find_record
from perlcli.text import counted
from perlcli.training.prepare import Prepared, filled

PART = 1000  # rows that are held as Python lists at a time
Stage = settings.Training | settings.Eval


def load_data(prepared: Prepared[Stage], use: str, split: str = "train", source: str | None = None) -> Data:
    """The rows of `--data`, or of another `source`, for sft, reward or rl. Raises PerlError if they can't be read."""
    options = prepared.settings.data
    name = options.data if source is None else source
    if split == "test" and not isinstance(prepared.settings, settings.Eval):  # --split chooses what trains
        options = replace(options, split=None, subset=options.subset if name == options.data else None)
    rows = data.load(name, use, split=split, chat=prepared.renderer.makes_turns, options=options)
    if options.drop_duplicates:
        data.drop_repeats(rows)
    return rows


def load_sides(prepared: Prepared[settings.Training], use: str) -> tuple[Data, Data | None]:
    """The rows to train on and the held-out rows, None without any. Raises PerlError if they can't be read."""
    options, values = prepared.settings.data, prepared.settings.held_out
    train, source = load_data(prepared, use), options.data
    if values.eval_fraction:
        return data.hold_out(train, values.eval_fraction)
    if values.eval_fraction is None:
        if values.eval_data or data.is_embedded(source) or has_split(source, "test", options):
            held_out = load_data(prepared, use, "test", values.eval_data)
            held_out.report.overlap = data.overlap(train, held_out)
            return train, held_out
        if (sides := _hold_out_some(prepared, train)) is not None:
            return sides
    if values.max_eval_samples is not None:
        prepared.run.note("--max-eval-samples has no effect: no rows are held out (--eval-data, --eval-fraction).")
    return train, None


def _hold_out_some(prepared: Prepared[settings.Training], train: Data) -> tuple[Data, Data] | None:
    """Both sides where nothing says what to evaluate on, with a note; None if there are too few prompts, and for the
    rest of a run that began without held-out rows, as older versions did."""
    before = find_record(str(prepared.run.folder)) if prepared.settings.keep.resume else None
    if before is not None and not before.data.get("train", {}).get("held_out", 0):
        return None
    sides, least = data.hold_out_some(train), 3 * FEWEST
    if sides is None:
        few = f"at least {least} prompts, each with few of the rows"
        prepared.run.note(f"Nothing is held out for evaluation: by default that takes {few} (or --eval-data FILE).")
        return None
    rows = counted(len(sides[1].rows), "row")
    prepared.run.note(f"Held out {rows} for evaluation, chosen by prompt (--eval-fraction 0 trains on all).")
    return sides


def fit(
    prepared: Prepared[Stage], role: str, rows: Data, tokens: Tokens, *, completion: int = 0, most: int | None = None
) -> list[Columns]:
    """The token columns of the rows that fit in --max-length with a `completion` of so many tokens behind them, of
    held-out rows at most those that --max-eval-samples or --max-samples allow (`most` is their default); notes and
    records what became of the rows. `role` is train or eval. Raises PerlError for data that is refused for its longer
    rows."""
    return list(_fitted(prepared, role, rows, tokens, completion, most))


def dataset(prepared: Prepared[Stage], role: str, rows: Data, tokens: Tokens) -> Dataset:
    """The same as a table, which takes 8 bytes per token instead of a list's 40."""
    columns = _fitted(prepared, role, rows, tokens)
    parts = []
    while part := list(islice(columns, PART)):
        parts.append(Dataset.from_list(part))
    return concatenate_datasets(parts)


def _fitted(
    prepared: Prepared[Stage], role: str, rows: Data, tokens: Tokens, completion: int = 0, most: int | None = None
) -> Iterator[Columns]:
    trained, values, found = data.prompts(rows) if role == "train" else None, prepared.settings.data, len(rows.rows)
    room, (option, limit) = Room(filled(values.max_length), completion), _limit(prepared.settings)
    most = None if role == "train" else limit or most
    learn = prepared.settings.loss.loss_on if isinstance(prepared.settings, settings.Sft) else None
    fitting = Fitting(rows.report, room, tokens, on_long=values.on_long, render=prepared.renderer, learn=learn)
    yield from fitting.columns(rows, most)
    if most is not None and most < found:
        prepared.run.note(f"Evaluating on the first {len(rows.rows):,} rows that fit, of {found:,} ({option}).")
    if trained is not None:
        prepared.run.prompts = trained.packed(rows.numbers, trained_on(prepared.source))
    prepared.run.record.data[role] = rows.report.summary()
    for line in rows.report.lines():
        prepared.run.note(f"{role}: {line}")


def _limit(values: Stage) -> tuple[str, int | None]:
    """The option that limits the held-out rows, and its value."""
    if isinstance(values, settings.Eval):
        return "--max-samples", values.eval.max_samples
    return "--max-eval-samples", values.held_out.max_eval_samples


def trained_on(source: Source) -> bytes:
    """Digests of the prompts that a model saw in our training, including those of the model it started from."""
    path = Path(source.place) / PROMPTS
    return path.read_bytes() if path.is_file() else b""

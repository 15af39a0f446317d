"""Loads a run's data and turns its rows into tables of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from perlcli import data, settings
from perlcli.data import Data, checks
from perlcli.data.fitting import Tokens
from perlcli.data.render import Columns
from perlcli.data.sources import has_split
from perlcli.model.sources import Source
from perlcli.run.files import PROMPTS
from perlcli.training.prepare import Prepared, filled

PART = 1000  # rows that are held as Python lists at a time
Stage = settings.Training | settings.Eval


def load_data(prepared: Prepared[Stage], use: str, split: str = "train", source: str | None = None) -> Data:
    """The rows of `--data`, or of another `source`, for sft, reward or rl. Raises PerlError if they can't be read."""
    options = prepared.settings.data
    name = options.data if source is None else source
    if split == "test" and isinstance(prepared.settings, settings.Sft | settings.Reward):  # --split chooses what trains
        options = replace(options, split=None, subset=options.subset if name == options.data else None)
    rows = data.load(name, use, split=split, chat=prepared.renderer.makes_turns, options=options)
    if options.drop_duplicates:
        data.drop_repeats(rows)
    return rows


def load_sides(prepared: Prepared[settings.Sft | settings.Reward], use: str) -> tuple[Data, Data | None]:
    """The rows to train on and the held-out rows, None without any. Raises PerlError if they can't be read."""
    options, values = prepared.settings.data, prepared.settings.held_out
    train, source = load_data(prepared, use), options.data
    if values.eval_fraction is not None:
        train, held_out = data.hold_out(train, values.eval_fraction)
    elif values.eval_data or data.is_embedded(source) or has_split(source, "test", options):
        held_out = load_data(prepared, use, "test", values.eval_data)
        held_out.report.overlap = data.overlap(train, held_out)
    else:
        if values.max_eval_samples is not None:
            prepared.run.note("--max-eval-samples has no effect: no rows are held out (--eval-data, --eval-fraction).")
        return train, None
    return train, first_rows(prepared, held_out, values.max_eval_samples, "--max-eval-samples")


def first_rows(prepared: Prepared[Stage], rows: Data, limit: int | None, option: str) -> Data:
    """At most the first `limit` rows; a note names the `option` that leaves some out."""
    if limit is not None and len(rows.rows) > limit:
        prepared.run.note(f"Evaluating on the first {limit:,} of {len(rows.rows):,} rows ({option}).")
        checks.restrict(rows, range(limit))
    return rows


def fit(prepared: Prepared[Stage], role: str, rows: Data, tokens: Tokens, longest: int | None = None) -> list[Columns]:
    """The token columns of the rows that fit in --max-length, or `longest`; notes and records what became of the rows.
    `role` is train or eval. Raises PerlError for a row that is too long, with --on-long error."""
    return list(_fitted(prepared, role, rows, tokens, longest))


def dataset(prepared: Prepared[Stage], role: str, rows: Data, tokens: Tokens) -> Dataset:
    """The same as a table, which takes 8 bytes per token instead of a list's 40."""
    columns = _fitted(prepared, role, rows, tokens)
    parts = []
    while part := list(islice(columns, PART)):
        parts.append(Dataset.from_list(part))
    return concatenate_datasets(parts)


def _fitted(
    prepared: Prepared[Stage], role: str, rows: Data, tokens: Tokens, longest: int | None = None
) -> Iterator[Columns]:
    trained, values = data.prompts(rows) if role == "train" else None, prepared.settings.data
    longest = longest or filled(values.max_length)
    learn = prepared.settings.loss.loss_on if isinstance(prepared.settings, settings.Sft) else None
    yield from data.fitted(rows, longest, tokens, on_long=values.on_long, render=prepared.renderer, learn=learn)
    if trained is not None:
        prepared.run.prompts = trained.packed(rows.numbers, trained_on(prepared.source))
    prepared.run.record.data[role] = rows.report.summary()
    for line in rows.report.lines():
        prepared.run.note(f"{role}: {line}")


def trained_on(source: Source) -> bytes:
    """Digests of the prompts that a model saw in our training, including those of the model it started from."""
    path = Path(source.place) / PROMPTS
    return path.read_bytes() if path.is_file() else b""

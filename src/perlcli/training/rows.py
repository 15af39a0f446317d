"""Loads a run's data, and turns its rows into tables of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from perlcli import data
from perlcli.data import Data, checks
from perlcli.data.fitting import Tokens
from perlcli.data.sources import has_split
from perlcli.model.sources import Source
from perlcli.run.files import PROMPTS
from perlcli.run.lifecycle import Run
from perlcli.training.prepare import Prepared

PART = 1000  # rows that are lists of tokens at once


def load_data(prepared: Prepared, use: str, split: str = "train", source: str | None = None) -> Data:
    """The rows of `--data`, or of another source, for a use."""
    options = prepared.settings.data
    name = options.data if source is None else source
    if split == "test" and hasattr(prepared.settings, "held_out"):  # --split is of the rows that train
        options = replace(options, split=None, subset=options.subset if name == options.data else None)
    found = data.load(name, use, split=split, chat=prepared.renderer.chat, options=options)
    if options.drop_duplicates:
        data.drop_repeats(found)
    return found


def load_sides(prepared: Prepared, use: str) -> tuple[Data, Data | None]:
    """The rows that train, and those that measure; None where there is nothing to measure on."""
    options, values = prepared.settings.data, prepared.settings.held_out
    train = load_data(prepared, use)
    if values.eval_fraction is not None:
        train, held_out = data.hold_out(train, values.eval_fraction)
        return train, first_rows(prepared, held_out, values.max_eval_samples, "--max-eval-samples")
    source = options.data
    if values.eval_data is None and not data.is_embedded(source) and not has_split(source, "test", options):
        if values.max_eval_samples is not None:
            prepared.run.note("--max-eval-samples does nothing: no rows are held out (--eval-data, --eval-fraction).")
        return train, None
    held_out = load_data(prepared, use, "test", values.eval_data)
    held_out.report.overlap = data.overlap(train, held_out)
    return train, first_rows(prepared, held_out, values.max_eval_samples, "--max-eval-samples")


def first_rows(prepared: Prepared, rows: Data, limit: int | None, option: str) -> Data:
    """The first rows, `limit` at most; says so where that leaves some out."""
    if limit is not None and len(rows.rows) > limit:
        prepared.run.note(f"Measuring on the first {limit:,} of {len(rows.rows):,} rows ({option}).")
        checks.restrict(rows, rows.rows[:limit], rows.numbers[:limit])
    return rows


def fit(prepared: Prepared, role: str, rows: Data, tokens: Tokens, longest: int | None = None) -> list[dict[str, Any]]:
    """The rows' columns within --max-length, or within `longest`; says what became of the rows, and records it."""
    return list(_fitted(prepared, role, rows, tokens, longest))


def dataset(prepared: Prepared, role: str, rows: Data, tokens: Tokens) -> Dataset:
    """The same as a table, which holds a token in 8 bytes where lists take 40."""
    columns = _fitted(prepared, role, rows, tokens)
    parts = []
    while part := list(islice(columns, PART)):
        parts.append(Dataset.from_list(part))
    return concatenate_datasets(parts)


def _fitted(
    prepared: Prepared, role: str, rows: Data, tokens: Tokens, longest: int | None = None
) -> Iterator[dict[str, Any]]:
    values = prepared.settings.data
    trained = data.prompts(rows) if role == "train" else None
    longest = longest or values.max_length
    yield from data.fitted(rows, longest, tokens, on_long=values.on_long, render=prepared.renderer)
    if trained is not None:
        prepared.run.prompts = trained.packed(rows.numbers, trained_on(prepared.source))
    report_data(prepared.run, role, rows)


def trained_on(source: Source) -> bytes:
    """Digests of the prompts that a model of ours has seen in training, its start's among them, as `Run` keeps them."""
    path = Path(source.adapter or source.base) / PROMPTS
    return path.read_bytes() if path.is_file() else b""


def report_data(run: Run, role: str, rows: Data) -> None:
    """Say what became of the rows, and keep it in the record."""
    run.record.data[role] = rows.report.summary()
    for line in rows.report.lines():
        run.note(f"{role}: {line}")

"""Holds out a part of the training rows for evaluation, so that no prompt is on both sides."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

from perlcli.data.checks import prompt_digest, tally
from perlcli.data.rows import Data
from perlcli.errors import PerlError
from perlcli.text import counted


def hold_out(data: Data, fraction: float) -> tuple[Data, Data]:
    """The rows to train on, and about `fraction` of all rows to evaluate on.

    All rows of a prompt go to the same side. The prompts with the lowest digests are held out until they make up the
    fraction, so the choice depends only on the prompts, not on their order or a seed.

    Raises PerlError if no row would be left to train on.
    """
    digests = [prompt_digest(row) for row in data.rows]
    counts, wanted, taken = Counter(digests), fraction * len(digests), 0
    chosen: set[bytes] = set()
    for digest in sorted(counts):
        if chosen and taken + counts[digest] / 2 > wanted:  # include a prompt only if that comes nearer to the fraction
            break
        chosen.add(digest)
        taken += counts[digest]
    if len(chosen) == len(counts):
        raise PerlError(
            f"--eval-fraction {fraction:g} leaves no rows to train on: {data.report.source} has only "
            f"{counted(len(counts), 'distinct prompt')}, and rows with the same prompt stay together",
            "give held-out rows with --eval-data",
        )
    held_out = _side(data, [digest in chosen for digest in digests])
    train = _side(data, [digest not in chosen for digest in digests])
    train.report.held_out = taken
    held_out.report.source += f", {fraction:g} held out by prompt"
    held_out.report.read, held_out.report.extra, held_out.report.dropped = taken, 0, {}
    return train, held_out


def _side(data: Data, wanted: list[bool]) -> Data:
    rows = [row for row, is_wanted in zip(data.rows, wanted, strict=True) if is_wanted]
    numbers = [number for number, is_wanted in zip(data.numbers, wanted, strict=True) if is_wanted]
    report = deepcopy(data.report)  # each side counts separately
    report.kept = len(rows)
    side = Data(rows, numbers, report)
    tally(side)
    return side

"""A part of the training rows held out for evaluation, so that no prompt stands on both sides."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

from perlcli.data.checks import prompt_mark, tally
from perlcli.data.rows import Data
from perlcli.errors import PerlError


def hold_out(data: Data, fraction: float) -> tuple[Data, Data]:
    """The rows to train on, and about `fraction` of all to evaluate on. Raises PerlError where one side gets none.

    All rows of a prompt go to the same side. The prompts with the lowest digests are held out, until they have their
    share of the rows: what is chosen depends on the prompts alone, not on their order or a seed.
    """
    marks = [prompt_mark(row) for row in data.rows]
    counts, wanted, taken = Counter(marks), fraction * len(marks), 0
    chosen: set[bytes] = set()
    for mark in sorted(counts):
        if chosen and taken + counts[mark] / 2 > wanted:  # a group goes in where that comes nearer to the share
            break
        chosen.add(mark)
        taken += counts[mark]
    if len(chosen) == len(counts):
        raise PerlError(
            f"--eval-fraction {fraction:g} leaves nothing to train on: {data.report.source} has {len(counts):,} "
            "different prompts, and those of one prompt stay together",
            "give held-out rows by --eval-data",
        )
    sides = [_side(data, [mark in chosen for mark in marks]), _side(data, [mark not in chosen for mark in marks])]
    held_out, train = sides
    train.report.held_out = taken
    held_out.report.source += f", {fraction:g} held out by prompt"
    held_out.report.read, held_out.report.extra, held_out.report.dropped = taken, 0, {}
    return train, held_out


def _side(data: Data, wanted: list[bool]) -> Data:
    rows = [row for row, stays in zip(data.rows, wanted, strict=True) if stays]
    numbers = [number for number, stays in zip(data.numbers, wanted, strict=True) if stays]
    report = deepcopy(data.report)  # each side counts on its own
    report.kept = len(rows)
    side = Data(rows, numbers, report)
    tally(side)
    return side

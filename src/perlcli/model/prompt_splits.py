"""Batches in two parts: what rows start with, once for all rows that start alike, and the rest of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

Ids = torch.Tensor
Group = list[int]  # the rows of a batch that start alike, by their places


@dataclass(frozen=True)
class Split:
    """A batch in two parts: each group's start once, padded on the left, and the rest of each row, padded on the right.
    The rows of `rest` are ordered by group. All tensors of ids, masks and positions are (rows, tokens)."""

    groups: list[Group]
    start: Ids
    start_mask: torch.Tensor
    rest: Ids
    rest_mask: torch.Tensor  # with the start before it
    places: torch.Tensor  # (batch, tokens): where each token of the batch is among those of start and rest, in a line
    positions: tuple[torch.Tensor, torch.Tensor] | None = None  # of start and rest, if the model would count otherwise

    @property
    def tokens(self) -> int:
        """How many tokens the two parts have, with padding."""
        return self.start.numel() + self.rest.numel()


def split_columns(ids: Ids, mask: torch.Tensor, columns: int) -> Split | None:
    """The parts of a batch whose rows have a prompt in the first `columns`, padded on the left, and a completion in the
    others; None if no two rows have the same prompt."""
    table = torch.cat([ids[:, :columns] * mask[:, :columns], mask[:, :columns]], dim=1).tolist()
    groups = grouped([tuple(row) for row in table])
    if len(groups) == len(ids) or not 0 < columns < ids.shape[1]:
        return None
    order = [row for group in groups for row in group]
    first = [group[0] for group in groups]
    width = ids.shape[1] - columns
    at = torch.arange(len(groups) * columns, device=ids.device).view(len(groups), columns)
    behind = at.numel() + torch.arange(len(order) * width, device=ids.device).view(len(order), width)
    of_row = [index for index, group in enumerate(groups) for _ in group]
    places = torch.cat([at[of_row], behind], dim=1)[inverse(order)]
    return Split(groups, ids[first, :columns], mask[first, :columns], ids[order, columns:], mask[order], places)


def split_groups(ids: Ids, mask: torch.Tensor, numbers: Sequence[int]) -> Split | None:
    """The parts of a batch that is padded on the right, whose rows of one group may start with the same tokens; None if
    none do, or the batch is padded otherwise."""
    lengths = mask.sum(dim=1).tolist()
    if not torch.equal(mask, (torch.arange(ids.shape[1], device=ids.device) < mask.sum(dim=1, keepdim=True)).to(mask)):
        return None
    rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    groups = [part for group in grouped(list(numbers)) for part in _alike(rows, group)]
    if len(groups) == len(rows):
        return None
    common = [_common([rows[row] for row in group]) for group in groups]
    widest = max(count for count, group in zip(common, groups, strict=True) if len(group) > 1)
    return _ragged(ids, rows, groups, [min(count, widest) for count in common])


def _alike(rows: list[list[int]], group: Group) -> list[Group]:
    """A group, or if its rows have no start in common each row alone."""
    return [group] if _common([rows[row] for row in group]) else [[row] for row in group]


def _ragged(ids: Ids, rows: list[list[int]], groups: list[Group], common: list[int]) -> Split:
    """The parts of a batch whose groups start with so many common tokens."""
    lines = [(row, index) for index, group in enumerate(groups) for row in group]  # of the rest: row and its group
    before = [rows[group[0]][:count] for group, count in zip(groups, common, strict=True)]
    after = [rows[row][common[index] :] for row, index in lines]
    wide, deep = max(common), max(map(len, after))
    places = [[0] * ids.shape[1] for _ in lines]
    for line, (row, index) in enumerate(lines):
        first, second = index * wide + wide - common[index], len(before) * wide + line * deep
        own = [*range(first, first + common[index]), *range(second, second + len(after[line]))]
        places[row][: len(own)] = own
    start_mask = _table([[1] * count for count in common], wide, on_left=True)
    rest_mask = _table([[1] * len(part) for part in after], deep)
    start_positions = [[max(0, place - wide + count) for place in range(wide)] for count in common]
    rest_positions = [[common[index] + place for place in range(deep)] for _, index in lines]

    def tensor(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, device=ids.device)

    return Split(
        groups,
        start=tensor(_table(before, wide, on_left=True)),
        start_mask=tensor(start_mask),
        rest=tensor(_table(after, deep)),
        rest_mask=tensor([start_mask[index] + own for (_, index), own in zip(lines, rest_mask, strict=True)]),
        places=tensor(places),
        positions=(tensor(start_positions), tensor(rest_positions)),
    )


def _table(rows: list[list[int]], width: int, *, on_left: bool = False) -> list[list[int]]:
    padding = [[0] * (width - len(row)) for row in rows]
    return [pad + row if on_left else row + pad for row, pad in zip(rows, padding, strict=True)]


def grouped(keys: Sequence[Any]) -> list[Group]:
    """The places of equal keys, in the order of their first."""
    groups: dict[Any, Group] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def _common(rows: list[list[int]]) -> int:
    """How many tokens rows start with in common, but each keeps one that is its own."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return min(sum(1 for _ in same), min(map(len, rows)) - 1)


def inverse(order: list[int]) -> list[int]:
    """Where each row is in an order of rows."""
    return sorted(range(len(order)), key=order.__getitem__)

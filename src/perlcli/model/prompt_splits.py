"""Batches in parts: what rows start with, once for all rows that start alike, and the rest of each row. Rows of similar
length go through together, since padding costs as much as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

Ids = torch.Tensor
Group = list[int]  # the rows of a batch that start alike, by their places
# What a further pass through the model costs, in tokens: on a CPU little, on a GPU what its kernels take to start.
PASS = {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class Rest:
    """The rest of some rows behind their starts. Ids and positions are (rows, tokens), padded on the right."""

    owners: list[int]  # for each row, the row of the starts that comes before it
    ids: Ids
    mask: torch.Tensor  # with the start before it
    positions: torch.Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Some starts, each once, (starts, tokens), padded on the left; and the rows behind them."""

    start: Ids
    mask: torch.Tensor
    rests: list[Rest]
    positions: torch.Tensor | None = None  # if the model would count otherwise

    @property
    def tokens(self) -> int:
        """How many tokens the part has, with padding."""
        return self.start.numel() + sum(rest.ids.numel() for rest in self.rests)


@dataclass(frozen=True)
class Split:
    """A batch in parts."""

    parts: list[Part]
    # (batch, tokens): where each token of the batch is among those of all parts in a line, the start of each before its
    # rests. Padding on the right has the place of its row's last token.
    places: torch.Tensor

    @property
    def tokens(self) -> int:
        """How many tokens all parts have, with padding."""
        return sum(part.tokens for part in self.parts)


def split_columns(ids: Ids, mask: torch.Tensor, columns: int) -> Split | None:
    """The parts of a batch whose rows have a prompt in the first `columns`, padded on the left, and a completion in the
    others, padded on the right; None if no two rows have the same prompt."""
    table = torch.cat([ids[:, :columns] * mask[:, :columns], mask[:, :columns]], dim=1).tolist()
    groups = grouped([tuple(row) for row in table])
    width = ids.shape[1] - columns
    if len(groups) == len(ids) or not 0 < columns < ids.shape[1]:
        return None
    owner = {row: index for index, group in enumerate(groups) for row in group}
    last = (mask[:, columns:] * torch.arange(1, width + 1, device=mask.device)).amax(dim=1)
    lengths = [max(1, length) for length in last.tolist()]
    order = sorted(owner, key=lambda row: (-lengths[row], owner[row]))
    first = [group[0] for group in groups]
    places = ids.new_zeros(ids.shape)
    of_start = torch.arange(len(groups) * columns, device=ids.device).view(len(groups), columns)
    places[:, :columns] = of_start[[owner[row] for row in range(len(ids))]]
    rests: list[Rest] = []
    behind = of_start.numel()
    for begin, end in _cut([(0, lengths[row], 1) for row in order], _pass(ids)):
        rows, longest = sorted(order[begin:end], key=lambda row: (owner[row], row)), lengths[order[begin]]
        at = torch.arange(len(rows) * longest, device=ids.device).view(len(rows), longest)
        kept = torch.tensor([lengths[row] - 1 for row in rows], device=ids.device).unsqueeze(1)
        within = torch.arange(width, device=ids.device).expand(len(rows), width).minimum(kept)
        places[rows, columns:] = behind + at.gather(1, within)
        here = slice(columns, columns + longest)
        rests.append(Rest([owner[row] for row in rows], ids[rows, here], mask[rows, : columns + longest]))
        behind += at.numel()
    return Split([Part(ids[first, :columns], mask[first, :columns], rests)], places)


def split_groups(ids: Ids, mask: torch.Tensor, numbers: Sequence[int]) -> Split | None:
    """The parts of a batch that is padded on the right, whose rows of one group may start with the same tokens; None if
    none do, or the batch is padded otherwise."""
    lengths = mask.sum(dim=1).tolist()
    if min(lengths) < 2:  # nothing of such a row could be shared
        return None
    if not torch.equal(mask, (torch.arange(ids.shape[1], device=ids.device) < mask.sum(dim=1, keepdim=True)).to(mask)):
        return None
    rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    groups = [part for group in grouped(list(numbers)) for part in _alike(rows, group)]
    if len(groups) == len(rows):
        return None
    common = [_common([rows[row] for row in group]) for group in groups]
    widest = max(count for count, group in zip(common, groups, strict=True) if len(group) > 1)
    common = [min(count, widest) for count in common]
    sizes = [
        (start, max(len(rows[row]) for row in group) - start, len(group))
        for start, group in zip(common, groups, strict=True)
    ]
    order = sorted(range(len(groups)), key=lambda index: (-sum(sizes[index][:2]), index))
    places = [[0] * ids.shape[1] for _ in rows]
    parts: list[Part] = []
    for begin, end in _cut([sizes[index] for index in order], _pass(ids)):
        chosen = [(groups[index], common[index]) for index in order[begin:end]]
        behind = sum(part.tokens for part in parts)
        parts.append(_ragged(rows, chosen, places, behind, lambda table: torch.tensor(table, device=ids.device)))
    return Split(parts, torch.tensor(places, device=ids.device))


def _ragged(
    rows: list[list[int]],
    chosen: list[tuple[Group, int]],
    places: list[list[int]],
    behind: int,
    tensor: Callable[[list[list[int]]], torch.Tensor],
) -> Part:
    """A part of some groups, each with the number of tokens that its rows start with. Fills in the places of its rows:
    `behind` those of earlier parts."""
    before = [rows[group[0]][:count] for group, count in chosen]
    lines = [(row, owner) for owner, (group, _) in enumerate(chosen) for row in group]
    common = [count for _, count in chosen]
    after = [rows[row][common[owner] :] for row, owner in lines]
    wide, deep = max(common), max(map(len, after))
    for line, (row, owner) in enumerate(lines):
        first, second = behind + owner * wide + wide - common[owner], behind + len(before) * wide + line * deep
        own = [*range(first, first + common[owner]), *range(second, second + len(after[line]))]
        places[row] = own + [own[-1]] * (len(places[row]) - len(own))
    start_mask = _table([[1] * count for count in common], wide, on_left=True)
    rest_mask = _table([[1] * len(own) for own in after], deep)
    rest = Rest(
        [owner for _, owner in lines],
        ids=tensor(_table(after, deep)),
        mask=tensor([start_mask[owner] + own for (_, owner), own in zip(lines, rest_mask, strict=True)]),
        positions=tensor([[common[owner] + place for place in range(deep)] for _, owner in lines]),
    )
    return Part(
        start=tensor(_table(before, wide, on_left=True)),
        mask=tensor(start_mask),
        rests=[rest],
        positions=tensor([[max(0, place - wide + count) for place in range(wide)] for count in common]),
    )


def _cut(sizes: Sequence[tuple[int, int, int]], spare: int) -> list[tuple[int, int]]:
    """Where to cut a list of groups, sorted by size, so that the fewest tokens are read with padding. A size is the
    tokens of a group's start, those of its longest rest, and its rows; each piece costs `spare` tokens more."""
    best: list[tuple[int, int]] = [(0, 0)]  # for the first so many groups: tokens, and where their last piece begins
    for end in range(1, len(sizes) + 1):
        start, rest, rows = 0, 0, 0
        found: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            start, rest = max(start, sizes[begin][0]), max(rest, sizes[begin][1])
            rows += sizes[begin][2]
            found.append((best[begin][0] + (end - begin) * start + rows * rest + spare, begin))
        best.append(min(found))
    pieces: list[tuple[int, int]] = []
    end = len(sizes)
    while end:
        pieces.insert(0, (best[end][1], end))
        end = best[end][1]
    return pieces


def _pass(ids: Ids) -> int:
    return PASS.get(ids.device.type, PASS["cuda"])


def _alike(rows: list[list[int]], group: Group) -> list[Group]:
    """A group, or if its rows have no start in common each row by itself."""
    return [group] if _common([rows[row] for row in group]) else [[row] for row in group]


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

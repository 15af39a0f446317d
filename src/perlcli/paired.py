"""Compares two policies on the same prompts: intervals of differences between pairs, clustered by prompt."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from perlcli.stats import Z95, t95

Groups = Sequence[Hashable]  # the prompt of each pair: pairs of one prompt are not independent


@dataclass(frozen=True)
class Difference:
    """A difference between two policies and its 95 % interval; above 0 the first policy has more."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """The difference and its interval as metrics of a record."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def net_share(signs: Sequence[int], groups: Groups) -> Difference:
    """The share of pairs with sign 1 minus the share with sign -1. The interval adds half a pair to each of the four
    kinds (Agresti and Min, 2005), so it also holds for few pairs and where one policy wins all; pairs of one prompt
    count as one cluster."""
    count = len(signs) + 2
    centre = sum(signs) / count
    spread = sum(rest**2 for rest in _sums([sign - centre for sign in signs], groups))
    spread += ((1 - centre) ** 2 + (1 + centre) ** 2) / 2 + centre**2
    margin = Z95 * math.sqrt(spread) / count
    return Difference(sum(signs) / len(signs), max(-1.0, centre - margin), min(1.0, centre + margin))


def mean_difference(
    differences: Sequence[float], groups: Groups, weights: Sequence[float] | None = None
) -> Difference | None:
    """The mean difference (sum of differences / sum of weights) with an interval by Student's t over prompts; None for
    fewer than two prompts. `weights` are 1, or how many tokens a difference is the sum of."""
    parts = [1.0] * len(differences) if weights is None else weights
    total = sum(parts)
    mean = sum(differences) / total
    rests = _sums([each - mean * part for each, part in zip(differences, parts, strict=True)], groups)
    if len(rests) < 2:
        return None
    variance = sum(rest**2 for rest in rests) * len(rests) / (len(rests) - 1)
    margin = t95(len(rests) - 1) * math.sqrt(variance) / total
    return Difference(mean, mean - margin, mean + margin)


def _sums(values: Sequence[float], groups: Groups) -> list[float]:
    """The sum of the values of each group."""
    sums: dict[Hashable, float] = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value
    return list(sums.values())


def sign_of(mine: float, theirs: float) -> int:
    """1 if the first is higher, -1 if it is lower, 0 for a tie."""
    return (mine > theirs) - (mine < theirs)

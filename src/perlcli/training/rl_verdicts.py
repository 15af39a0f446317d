"""What the steps of an RL run show: whether the reward rose beyond noise, at what KL, and whether length carried it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from perlcli import stats
from perlcli.run import disk
from perlcli.run.lifecycle import Run
from perlcli.run.metrics import BY_LENGTH

LEAST = 10  # steps that are compared at each end
PART = 4  # or a quarter of all steps, if that is more
RELATED = 0.3  # a correlation of reward with length from which a change of length may explain the reward
MOVED = 0.05  # a change of the truncated share that matters
LENGTH, TRUNCATED, KL = "completions/mean_length", "completions/clipped_ratio", "kl"
History = Sequence[Mapping[str, Any]]


def conclude(run: Run, history: History) -> None:
    """Print and record what the steps show."""
    for verdict in verdicts(history):
        run.record.verdicts.append(verdict)
        disk.tell(verdict)


def verdicts(history: History) -> list[str]:
    """Sentences on the first steps against the last ones, from the lines of `metrics.jsonl`."""
    steps = [row for row in history if row.get("reward") is not None]
    size = max(LEAST, len(steps) // PART)
    if len(steps) < 2 * LEAST:
        return [f"Reward rose beyond noise: can't say from {len(steps)} steps; {2 * LEAST} are needed."]
    rewards = _ends(steps, "reward", size)
    if rewards is None:
        return ["Reward rose beyond noise: can't say, as the reward of a step is not finite."]
    before, after, (low, high) = rewards
    answer = "yes" if low > 0 else "no, it fell" if high < 0 else f"can't say from {len(steps)} steps"
    text = (
        f"Reward rose beyond noise: {answer}. {before:.3g} in the first {size} steps, {after:.3g} in the last {size} "
        f"({after - before:+.3g}, 95 % interval {low:+.3g} to {high:+.3g}){_at_kl(steps[-size:])}."
    )
    return [text, *(_carried(steps, size) if low > 0 else [])]


def _ends(steps: History, key: str, size: int) -> tuple[float, float, stats.Interval] | None:
    """A figure's means over the first and the last steps, and the interval of the difference; None if it is missing at
    a step."""
    series = [float(row[key]) for row in steps if row.get(key) is not None and math.isfinite(row[key])]
    if len(series) < len(steps):
        return None
    return fmean(series[:size]), fmean(series[-size:]), stats.shift(series, size)


def _at_kl(last: History) -> str:
    kl = [row[KL] for row in last if row.get(KL) is not None]
    if not kl:
        return ", at an unknown KL (--beta 0 has no anchor)"
    lengths = [row[LENGTH] for row in last if row.get(LENGTH) is not None]
    per_completion = f", about {fmean(kl) * fmean(lengths):.3g} per completion" if lengths else ""
    return f", at a KL of {fmean(kl):.3g} per token{per_completion}"


def _carried(steps: History, size: int) -> list[str]:
    """Whether a change of length or of the truncated share may explain the rise."""
    length, truncated = _ends(steps, LENGTH, size), _ends(steps, TRUNCATED, size)
    if length is None:
        return []
    found = []
    related = [row[BY_LENGTH] for row in steps if row.get(BY_LENGTH) is not None]
    link = fmean(related) if related else 0.0
    tokens = f"{length[0]:.3g} to {length[1]:.3g} tokens"
    grew = (length[2][0] > 0) - (length[2][1] < 0)
    if abs(link) >= RELATED and grew * link > 0:
        kind = "longer" if grew > 0 else "shorter"
        found.append(
            f"Warning: length may have carried the reward. Completions got {kind} ({tokens}), and {kind} answers to a "
            f"prompt score higher (correlation {link:.2f})."
        )
    cut = ""
    if truncated is not None:
        cut = f"{truncated[0]:.1%} to {truncated[1]:.1%}".replace("%", " %")
        gap, (low, high) = truncated[1] - truncated[0], truncated[2]
        if abs(gap) >= MOVED and (low > 0 or high < 0):
            more = "More" if gap > 0 else "Fewer"
            found.append(f"Warning: truncation may have carried the reward. {more} completions are cut off ({cut}).")
    if found:
        return found
    both = f"length ({tokens})" + (f" nor truncation ({cut})" if cut else "")
    return [f"{'Neither ' if cut else 'Not '}{both} carried it; reward and length correlate by {link:.2f}."]

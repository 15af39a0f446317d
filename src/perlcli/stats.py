"""The figures that say how good a reward model or a policy is."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from statistics import fmean, median

Z95 = 1.959964  # the normal distribution's 97.5th percentile


def wilson(successes: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927), which also holds at 0 %, at 100 % and for few rows."""
    share = successes / total
    centre = share + Z95**2 / (2 * total)
    spread = Z95 * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2))
    scale = 1 + Z95**2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The probability that a positive scores above a negative; ties count half."""
    ordered = sorted(negative)
    wins = sum((bisect_left(ordered, p) + bisect_right(ordered, p)) / 2 for p in positive)
    return wins / (len(positive) * len(negative))


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's correlation; 0 if either side is constant."""
    mean_one, mean_other = fmean(one), fmean(other)
    cross = sum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    spread = math.sqrt(sum((a - mean_one) ** 2 for a in one) * sum((b - mean_other) ** 2 for b in other))
    return cross / spread if spread else 0.0


def pair_metrics(
    chosen: Sequence[float], rejected: Sequence[float], chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]
) -> dict[str, float]:
    """The figures of a reward model on held-out pairs. A tie counts as an error. Balanced accuracy is that of calling
    scores above the pooled median chosen and the others rejected."""
    right = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    low, high = wilson(right, len(chosen))
    cut = median([*chosen, *rejected])
    return {
        "rows": len(chosen),
        "accuracy": right / len(chosen),
        "accuracy_low": low,
        "accuracy_high": high,
        "auc": auc(chosen, rejected),
        "balanced_accuracy": (fmean(c > cut for c in chosen) + fmean(r <= cut for r in rejected)) / 2,
        "mean_margin": fmean(c - r for c, r in zip(chosen, rejected, strict=True)),
        "length_correlation": correlation([*chosen, *rejected], [*chosen_lengths, *rejected_lengths]),
    }


def thumb_metrics(scores: Sequence[float], labels: Sequence[bool], lengths: Sequence[int]) -> dict[str, float]:
    """The figures of a reward model on held-out thumbs: a score above 0 means thumbs up. AUC, balanced accuracy and
    margin need both kinds of rows and are left out if one is missing."""
    up = [score for score, label in zip(scores, labels, strict=True) if label]
    down = [score for score, label in zip(scores, labels, strict=True) if not label]
    right = sum(score > 0 for score in up) + sum(score <= 0 for score in down)
    low, high = wilson(right, len(scores))
    metrics = {"rows": len(scores), "accuracy": right / len(scores), "accuracy_low": low, "accuracy_high": high}
    if up and down:
        metrics["auc"] = auc(up, down)
        metrics["balanced_accuracy"] = (fmean(s > 0 for s in up) + fmean(s <= 0 for s in down)) / 2
        metrics["mean_margin"] = fmean(up) - fmean(down)
    return {**metrics, "share_thumbs_up": len(up) / len(scores), "length_correlation": correlation(scores, lengths)}


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """The share of different n-grams among all n-grams of the rows; 1 if nothing repeats."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0

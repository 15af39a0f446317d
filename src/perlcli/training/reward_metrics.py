"""The figures of a reward model on held-out rows, with 95 % intervals, and what they show in sentences.

`groups` has one value per row; rows of one prompt or dialog have the same and count as one draw (see `perlcli.stats`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean
from typing import Literal

from perlcli import stats
from perlcli.text import counted

Answer = Literal["yes", "unknown", "no"]
Figures = dict[str, float]
Groups = Sequence[Hashable]

CHANCE = 0.5  # of AUC, balanced accuracy and accuracy on pairs
NEGLIGIBLE = 0.55  # a figure that is certainly below is no better than chance for any use
FEW = 30  # rows of a kind, below which its figures say little
FOLLOWS_LENGTH = 0.4  # a correlation of score with length that is certainly beyond this is a bias
UNEVEN = 0.1  # so much accuracy that pairs with a longer better answer have more than the others is a bias
OVERFIT = 0.05  # so much that the figure on training rows is certainly higher is overfitting
UP, DOWN = "thumbs up", "thumbs down"


# Figures


def of_pairs(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    groups: Groups,
) -> Figures:
    """The figures of pairs from their scores and the lengths of their completions in tokens. A tie counts as an error,
    in the AUC as half; `share_ties` is there if there are any."""
    right = [c > r for c, r in zip(chosen, rejected, strict=True)]
    ties = fmean(c == r for c, r in zip(chosen, rejected, strict=True))
    longer = [a - b for a, b in zip(chosen_lengths, rejected_lengths, strict=True)]
    lengths, scores = [*chosen_lengths, *rejected_lengths], [*chosen, *rejected]
    found: Figures = {"rows": len(chosen), **_with("accuracy", fmean(right), stats.share(right, groups))}
    if ties:
        found["share_ties"] = ties
    found |= _with("auc", stats.auc(chosen, rejected), stats.auc_interval(chosen, rejected, (groups, groups)))
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    found["mean_margin"] = fmean(margins)
    found |= _follows_length(scores, lengths, groups)
    if any(longer):
        found["longer_wins"] = fmean((gap > 0) + (gap == 0) / 2 for gap in longer)
    for name, sign in (("accuracy_if_longer", 1), ("accuracy_if_shorter", -1)):
        places = [place for place, gap in enumerate(longer) if gap * sign > 0]
        own = [right[place] for place in places]
        if own:
            found |= _with(name, fmean(own), stats.share(own, [groups[place] for place in places]))
    return found


def of_thumbs(scores: Sequence[float], labels: Sequence[bool], lengths: Sequence[int], groups: Groups) -> Figures:
    """The figures of thumbs from their scores, labels and the lengths of their completions in tokens. A score above 0
    means thumbs up. What needs both kinds of rows is left out if one is missing."""
    right = [(score > 0) == label for score, label in zip(scores, labels, strict=True)]
    found: Figures = {"rows": len(scores), **_with("accuracy", fmean(right), stats.share(right, groups))}
    ups, downs = ([place for place, label in enumerate(labels) if label is kind] for kind in (True, False))
    up, down = ([scores[place] for place in part] for part in (ups, downs))
    if up and down:
        own = [groups[place] for place in ups], [groups[place] for place in downs]
        found |= _with("auc", stats.auc(up, down), stats.auc_interval(up, down, own))
        hits = [right[place] for place in ups], [right[place] for place in downs]
        found |= _with("balanced_accuracy", (fmean(hits[0]) + fmean(hits[1])) / 2, stats.balanced(*hits, own))
        found["mean_margin"] = fmean(up) - fmean(down)
        found["longer_auc"] = stats.auc([lengths[place] for place in ups], [lengths[place] for place in downs])
        majority = len(ups) >= len(downs)
        found["majority_accuracy"] = max(len(ups), len(downs)) / len(labels)
        gains = [float(hit) - (label is majority) for hit, label in zip(right, labels, strict=True)]
        found |= _with("accuracy_over_majority", fmean(gains), stats.mean(gains, groups))
    found["share_thumbs_up"] = len(ups) / len(labels)
    return found | _follows_length(scores, lengths, groups)


def of_training(figures: Figures) -> Figures:
    """What is kept of the figures of training rows: what the model is judged by, with its interval."""
    name = judged_by(figures)
    found = {"train_rows": figures["rows"]}
    return found | {f"train_{key}": figures[key] for key in (name, f"{name}_low", f"{name}_high") if key in figures}


def _with(name: str, value: float, interval: stats.Interval) -> Figures:
    if not all(abs(bound) < float("inf") for bound in interval):  # of a single prompt nothing is known
        return {name: value}
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _follows_length(scores: Sequence[float], lengths: Sequence[int], groups: Groups) -> Figures:
    value = stats.correlation(scores, lengths)
    return _with("length_correlation", value, stats.correlation_interval(value, len(set(groups))))


# What they show


def is_thumbs(metrics: Mapping[str, float]) -> bool:
    """Whether the figures are of thumbs."""
    return "share_thumbs_up" in metrics


def judged_by(metrics: Mapping[str, float]) -> str:
    """The figure that decides: of pairs the accuracy; of thumbs the AUC, as RL only uses the order of the scores."""
    return "auc" if is_thumbs(metrics) else "accuracy"


def better_than_chance(metrics: Mapping[str, float]) -> Answer | None:
    """Whether a reward model is better than chance on held-out rows; None if its metrics don't say: it was never
    measured, or all rows have the same label."""
    name = judged_by(metrics)
    if f"{name}_low" not in metrics:
        return None
    if metrics[f"{name}_low"] > CHANCE:
        return "yes"
    return "no" if metrics[f"{name}_high"] < NEGLIGIBLE else "unknown"


def verdicts(metrics: Mapping[str, float]) -> list[str]:
    """What the figures of held-out rows show, in sentences; the first says whether the model is better than chance."""
    found = [verdict(metrics)]
    if is_thumbs(metrics):
        found += _about_thumbs(metrics)
    found += _about_length(metrics)
    return found + _about_overfitting(metrics)


def verdict(metrics: Mapping[str, float]) -> str:
    """Whether a reward model is better than chance, in one sentence with the figure, its interval and the rows."""
    rows, name = int(metrics["rows"]), judged_by(metrics)
    noun = "row" if is_thumbs(metrics) else "pair"
    answer = better_than_chance(metrics)
    if answer is None:
        only = UP if metrics["share_thumbs_up"] else DOWN
        return f"Better than chance: unknown. The held-out rows are all {only}, which shows nothing."
    words = {"yes": "yes", "unknown": f"can't say from {counted(rows, noun)}", "no": "no"}[answer]
    if metrics[f"{name}_high"] < CHANCE:
        words += ", worse: it ranks answers the wrong way round"
    label = "AUC" if name == "auc" else name
    figure = f"{label} {_figure(metrics, name)} on {counted(rows, f'held-out {noun}')}"
    if metrics.get("share_ties"):
        figure += f" ({_percent(metrics['share_ties'])} ties, which count as errors)"
    return f"Better than chance: {words}. {figure[0].upper()}{figure[1:]}; chance is {_value(name, CHANCE)}."


def _about_thumbs(metrics: Mapping[str, float]) -> list[str]:
    share, rows = metrics["share_thumbs_up"], int(metrics["rows"])
    if "majority_accuracy" not in metrics:
        return []
    kind, few = (UP, round((1 - share) * rows)) if share >= 0.5 else (DOWN, round(share * rows))
    low, high = metrics.get("accuracy_over_majority_low"), metrics.get("accuracy_over_majority_high")
    compared = "no clear difference" if low is None or high is None or low <= 0 <= high else "better"
    compared = "worse" if high is not None and high < 0 else compared
    found = [
        f"Accuracy {_figure(metrics, 'accuracy')}; always saying {kind} scores "
        f"{_percent(metrics['majority_accuracy'])}: {compared}. "
        f"Balanced accuracy {_figure(metrics, 'balanced_accuracy')}; chance is 50 %."
    ]
    if few < FEW:
        other = DOWN if kind == UP else UP
        found.append(f"Warning: only {few} of {counted(rows, 'held-out row')} are {other}, so these figures are rough.")
    return found


def _about_length(metrics: Mapping[str, float]) -> list[str]:
    found = []
    low, high = metrics.get("length_correlation_low", -1.0), metrics.get("length_correlation_high", 1.0)
    if low > FOLLOWS_LENGTH or high < -FOLLOWS_LENGTH:
        kind = "longer" if low > 0 else "shorter"
        figure = _figure(metrics, "length_correlation")
        found.append(f"Warning: length bias. {kind.capitalize()} answers score higher: correlation {figure}.")
    if {"accuracy_if_longer_low", "accuracy_if_shorter_low"} <= set(metrics):
        sides = "accuracy_if_longer", "accuracy_if_shorter"
        values = [(metrics[name], (metrics[f"{name}_low"], metrics[f"{name}_high"])) for name in sides]
        gap = stats.difference(*values[0], *values[1])
        if gap[0] > UNEVEN or gap[1] < -UNEVEN:
            found.append(
                f"Warning: length bias. Accuracy is {_figure(metrics, sides[0])} where the better answer is longer, "
                f"but {_figure(metrics, sides[1])} where it is shorter."
            )
    return found + _against_length(metrics)


def _against_length(metrics: Mapping[str, float]) -> list[str]:
    """A warning if always preferring the longer (or the shorter) answer may be as good."""
    name, rule = ("auc", "longer_auc") if is_thumbs(metrics) else ("accuracy", "longer_wins")
    if rule not in metrics or better_than_chance(metrics) != "yes":
        return []
    by_length = max(metrics[rule], 1 - metrics[rule])
    if by_length < metrics[f"{name}_low"]:
        return []
    kind = "longer" if metrics[rule] >= 0.5 else "shorter"
    figure = f"{'AUC ' if name == 'auc' else ''}{_value(name, by_length)}"
    return [f"Warning: always preferring the {kind} answer scores {figure}, which may be as good as this model."]


def _about_overfitting(metrics: Mapping[str, float]) -> list[str]:
    name = judged_by(metrics)
    keys = [f"{prefix}{name}{bound}" for prefix in ("train_", "") for bound in ("", "_low", "_high")]
    if not set(keys) <= set(metrics):
        return []
    trained, own, held_out, its = metrics[keys[0]], keys[1:3], metrics[keys[3]], keys[4:]
    gap = stats.difference(trained, (metrics[own[0]], metrics[own[1]]), held_out, (metrics[its[0]], metrics[its[1]]))
    if gap[0] <= OVERFIT:
        return []
    label = "AUC" if name == "auc" else name
    rows = counted(int(metrics["train_rows"]), "training row")
    return [
        f"Warning: overfitting. {label[0].upper()}{label[1:]} is {_figure(metrics, keys[0])} on {rows}, but "
        f"{_figure(metrics, name)} on held-out ones."
    ]


def _figure(metrics: Mapping[str, float], name: str) -> str:
    """A figure with its interval, for a sentence."""
    value = _value(name, metrics[name])
    if f"{name}_low" not in metrics:
        return value
    return f"{value} (95 % interval {_value(name, metrics[f'{name}_low'])} to {_value(name, metrics[f'{name}_high'])})"


def _value(name: str, value: float) -> str:
    return f"{value:.2f}" if name.endswith(("auc", "correlation")) else _percent(value)


def _percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %").replace(".0 %", " %")

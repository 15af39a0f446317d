"""The labels of a classifier, and which of them is the reward: a text's reward is the logit of that label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perlcli.errors import PerlError
from perlcli.model import heads
from perlcli.model.sources import Source
from perlcli.text import clip, shorten

OPTION = "--reward-label"
NONE = "none"  # for a reward that has no labels to choose from
SHOWN = 20  # labels that an error lists


@dataclass(frozen=True)
class Label:
    """One of the labels of a classifier."""

    name: str
    index: int = 0
    of: int = 1

    @property
    def words(self) -> str:
        """The label in a note; empty if it is the only one."""
        return f"the logit of its label {self.name} (index {self.index} of {self.of} labels)" if self.of > 1 else ""


def names_of(source: Source) -> list[str]:
    """The names of a reward model's labels in the order of its head: as its config has them, otherwise LABEL_0 and so
    on, as transformers names them. Raises PerlError if config and head differ, or the weights can't be read."""
    known: object = source.config.id2label
    names = [str(known[index]) for index in sorted(known)] if isinstance(known, dict) else []
    count = heads.saved_labels(source)
    if source.adapter is None and count not in (None, len(names)):
        problem = f"{source.name} has {len(names)} labels in its config.json, but {count} in its weights"
        raise PerlError(problem, "correct id2label and label2id in config.json")
    if count is None and source.adapter is not None:
        return ["LABEL_0"]  # a head that can't be found: loading the adapter says so
    return names if count in (None, len(names)) else [f"LABEL_{index}" for index in range(count)]


def choose(asked: str | None, source: Source, model: str) -> Label:
    """The label of a reward model that `asked` names, or gives the index of: a name comes first. `model` is how the
    model was given. Raises PerlError if there is no such label, or if one of several must be named."""
    names = names_of(source)
    if asked is None or (asked == NONE and NONE not in names):
        if len(names) == 1:
            return Label(names[0])
        what = f"{model} is a classifier with {len(names)} labels, and a reward is a single score"
        raise PerlError(f"{what}: its labels are {_listed(names)}", f"{OPTION} NAME, or an index from 0")
    if names.count(asked) > 1:
        raise PerlError(f"{OPTION} {clip(asked, 80)}: {model} has several labels of that name", "give an index from 0")
    if asked in names:
        return Label(asked, names.index(asked), len(names))
    if asked.isascii() and asked.isdecimal() and int(asked) < len(names):
        return Label(names[int(asked)], int(asked), len(names))
    if len(names) == 1:
        raise PerlError(f"{OPTION} {clip(asked, 80)}: {model} has only one label, {names[0]}", "leave the option out")
    alike = next((name for name in names if name.casefold() == asked.casefold()), None)
    hint = f"Did you mean {alike}?" if alike else f"{OPTION} NAME, or an index from 0 to {len(names) - 1}"
    raise PerlError(f"{OPTION} must be one of {_listed(names)} for {model}, not {shorten(asked)}", hint)


def choose_all(given: Sequence[str], rewards: Sequence[tuple[str, Source | None]]) -> list[Label | None]:
    """The label of each reward, None for functions, which have no source: from the values of --reward-label, one for
    each --reward, or a single one for the only classifier of several labels. Raises PerlError for anything else."""
    asked: list[str | None] = [*given]
    several = [source is not None and len(names_of(source)) > 1 for _, source in rewards]
    if len(given) == 1 and len(rewards) > 1 and several.count(True) == 1:
        asked = [given[0] if own else None for own in several]
    asked = asked or [None] * len(rewards)
    if len(asked) != len(rewards):
        problem = f"{OPTION} must be given once for each --reward: {len(rewards)} times, not {len(given)}"
        raise PerlError(problem, f"{OPTION} {NONE} for a reward without labels")
    chosen: list[Label | None] = []
    for each, (name, source) in zip(asked, rewards, strict=True):
        if source is None and each not in (None, NONE):
            problem = f"{OPTION} {clip(str(each), 80)}: --reward {name} is a function or server, which has no labels"
            raise PerlError(problem, f"leave the option out, or {OPTION} {NONE} with several rewards")
        chosen.append(None if source is None else choose(each, source, f"--reward {name}"))
    return chosen


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(clip(name, 80) for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN:,} more" if len(names) > SHOWN else shown

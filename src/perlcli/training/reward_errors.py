"""Completions that a reward can't score, because it raises or gives NaN, an infinite value or None: each is named, and
`--on-reward-error` decides what becomes of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from perlcli.data import Prompt, Renderer, text_of
from perlcli.errors import PerlError, RunFailed
from perlcli.run import out_of_memory
from perlcli.text import clip

STOP, SKIP = "stop", "skip"
KWARGS = "--reward-kwargs"
SHOWN = 200  # characters of each text in an error
PATIENCE = 3  # batches in a row of which nothing could be scored: then the reward is broken, not a completion
Ids = list[int]
Opinions = list[float | None]  # one reward per completion; None: no opinion


class RewardRaised(PerlError):
    """A reward function that raised an error, maybe because of one of the completions that it was given."""


@dataclass(frozen=True)
class Scored:
    """The rewards of some completions: the weighted sum, and each reward on its own by name. A sum is NaN for a
    completion that is skipped; `faults` says by index why a completion could not be scored."""

    total: list[float]
    parts: dict[str, Opinions]
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def known(self) -> list[float]:
        """The sums of the completions that are not skipped."""
        return [value for value in self.total if not math.isnan(value)]


Score = Callable[[Sequence[Prompt], Sequence[Ids]], Scored]


@dataclass
class OnError:
    """What `--on-reward-error` decides: to stop, to skip a completion or to give it a reward. `barren` counts the last
    batches of which nothing could be scored; after `patience` of them the run stops in any case."""

    decision: str | float = STOP
    render: Renderer | None = None
    patience: int = PATIENCE
    barren: int = 0

    def scored(self, rows: Sequence[Prompt], written: Sequence[Ids], score: Score) -> Scored:
        """What `score` gives, with the completions that it can't score skipped or given the reward that was decided.
        Raises RewardRaised or RunFailed, which name the completion, if the run has to stop."""
        try:
            found = score(rows, written)
            found = Scored(found.total, found.parts, faults_of(found))
        except RewardRaised as error:
            if out_of_memory.failure(error) is not None:
                raise
            found = self._without_failing(rows, written, score, error)
        if found.faults and self.decision == STOP:
            index, fault = next(iter(found.faults.items()))
            raise RunFailed(f"{fault}: {self._shown(rows[index], written[index])}", self._hint())
        self.barren = self.barren + 1 if len(found.faults) == len(rows) else 0
        if self.barren >= self.patience:
            count = "none of the completions" if self.patience == 1 else f"nothing in {self.patience} batches in a row"
            raise RunFailed(f"The reward could score {count}: {found.faults[0]}", "check the reward")
        instead = math.nan if self.decision in (STOP, SKIP) else float(self.decision)
        total = [instead if index in found.faults else value for index, value in enumerate(found.total)]
        return Scored(total, found.parts, found.faults)

    def _without_failing(
        self, rows: Sequence[Prompt], written: Sequence[Ids], score: Score, error: RewardRaised
    ) -> Scored:
        """The rewards of the completions that don't make the function fail: it scores each on its own, then together
        those that are left. Raises RewardRaised for the first one if the run stops at errors."""
        faults: dict[int, str] = {}
        for index, (row, ids) in enumerate(zip(rows, written, strict=True)):
            try:
                score([row], [ids])
            except RewardRaised as failed:
                faults[index] = failed.problem
                if self.decision == STOP:
                    raise RewardRaised(f"{failed.problem}: {self._shown(row, ids)}", self._hint()) from error
        if self.decision == STOP:
            problem = f"{error.problem}: for {len(rows)} completions together, but for none of them on its own"
            raise RewardRaised(problem) from error
        left = [index for index in range(len(rows)) if index not in faults]
        found = Scored([], {})
        if left:
            try:
                found = score([rows[index] for index in left], [written[index] for index in left])
            except RewardRaised as again:
                faults, left = dict.fromkeys(range(len(rows)), again.problem), []
        faults |= {left[index]: fault for index, fault in faults_of(found).items()}
        total = [math.nan if value is None else value for value in _spread(found.total, left, len(rows))]
        return Scored(total, {name: _spread(part, left, len(rows)) for name, part in found.parts.items()}, faults)

    def _shown(self, row: Prompt, ids: Ids) -> str:
        """A completion and its prompt, as an error names them."""
        text = self.render.text(ids) if self.render is not None else str(ids)
        return f"the completion {clip(text, SHOWN)!r} of the prompt {clip(text_of(row.prompt), SHOWN)!r}"

    def _hint(self) -> str:
        return f"fix the reward, or --on-reward-error {SKIP} leaves such completions out"


def faults_of(found: Scored) -> dict[int, str]:
    """Why completions have no finite reward, by index: which reward is NaN or infinite, or that all gave None."""
    faults = {}
    for index, total in enumerate(found.total):
        wrong = {name: part[index] for name, part in found.parts.items() if not _is_fine(part[index])}
        if wrong:
            name, value = next(iter(wrong.items()))
            faults[index] = f"The reward {name} is {value}"
        elif not math.isfinite(total):
            faults[index] = "Every reward is None" if math.isnan(total) else "The reward is infinite"
    return faults


def _is_fine(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _spread(values: Sequence[float | None], places: Sequence[int], count: int) -> Opinions:
    """The values at their places among `count`, NaN elsewhere."""
    spread: Opinions = [math.nan] * count
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread

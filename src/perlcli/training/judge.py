"""The judge of what a policy writes: the reward function that TRL is given, and the probe before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from perlcli import data, settings
from perlcli.data import Prompt
from perlcli.errors import RunFailed
from perlcli.run.files import SAMPLES
from perlcli.run.lifecycle import Run
from perlcli.training import sampling
from perlcli.training.prepare import Prepared, filled
from perlcli.training.rewards import Scored
from perlcli.training.sampling import Sampling

REWARD, SUM = "reward", "weighted_sum"  # the judge's names, for one reward and for several
ROW = "perlcli_row"  # the column that leads from TRL's batches back to our rows
PROMPTS, PER_PROMPT = 4, 4  # what a probe samples; without groups as many completions of as many prompts
# How often the probe is taken again, on other prompts, where that may help: a function may be hard to please, and a
# policy that is sure of itself writes the same to a prompt each time, which says nothing of the reward.
ROUNDS = 5
Score = Callable[[Sequence[Prompt], Sequence[list[int]]], Scored]


class Judge:
    """The reward function that TRL calls: scores what the policy wrote, keeps samples, stops where one is no number."""

    def __init__(
        self, run: Run, prepared: Prepared[settings.Rl], score: Score, rows: list[Prompt], name: str = REWARD
    ) -> None:
        self.run, self.score, self.rows, self.render = run, score, rows, prepared.renderer
        self.__name__ = name  # TRL names its metrics by it

    def __call__(
        self, completion_ids: Sequence[list[int]], trainer_state: Any, log_metric: Any, **columns: Any
    ) -> list[float]:
        """One reward a completion of the batch."""
        rows = [self.rows[index] for index in columns[ROW]]
        found = self.score(rows, completion_ids)
        check_finite(found.total)
        for name, part in found.parts.items() if len(found.parts) > 1 else ():
            log_metric(f"rewards/{name}/mean", fmean(part))
        texts = [self.render.text(ids) for ids in completion_ids]
        gold = [check(text) for row, text in zip(rows, texts, strict=True) if (check := data.gold_check(row))]
        if gold:
            log_metric("gold", fmean(gold))
        self._sample(trainer_state, rows[0], texts[0], found.total[0])
        return found.total

    def _sample(self, state: Any, row: Prompt, text: str, reward: float) -> None:
        every = max(1, state.max_steps // 20)
        if state.global_step % every == 0:
            sample = {
                "step": state.global_step + 1,
                "prompt": data.text_of(row.prompt),
                "policy": text,
                "reward": reward,
            }
            self.run.append(SAMPLES, sample)


def check_finite(rewards: Sequence[float]) -> None:
    """Raise RunFailed where a reward is not a finite number."""
    if not all(map(math.isfinite, rewards)):
        raise RunFailed("The reward is not a finite number for some completions", "check the reward model or function")


@dataclass(frozen=True)
class Probe:
    """What the policy wrote to a few prompts before it learned, and what the reward thinks of it."""

    prompts: list[list[int]]
    written: list[list[int]]
    scored: Scored

    def differs(self, part: slice) -> bool:
        """Whether different completions got different rewards: equal ones differ by rounding, which teaches nothing."""
        texts = [(*prompt, -1, *ids) for prompt, ids in zip(self.prompts[part], self.written[part], strict=True)]
        rewards = dict(zip(texts, self.scored.total[part], strict=True)).values()
        return max(rewards) > min(rewards)

    def varies(self, part: slice) -> bool:
        """Whether there are different completions."""
        return len({tuple(ids) for ids in self.written[part]}) > 1

    def summary(self) -> dict[str, Any]:
        """The probe as a run's record keeps it."""
        rewards = self.scored.total
        return {
            "completions": len(rewards), "reward_low": min(rewards), "reward_mean": fmean(rewards),
            "reward_high": max(rewards),
        }  # fmt: skip


def probe(
    model: Any,
    prepared: Prepared[settings.Rl],
    score: Score,
    prompts: Sequence[tuple[Prompt, list[int]]],
    *,
    is_function: bool,
) -> Probe:
    """Sample and score a few prompts before the first step. Raises RunFailed where all get the same reward.

    RLOO learns from differences between completions of one prompt, so a reward model that sees none in any prompt is
    a fault too. A function, and a policy that writes the same each time, get `ROUNDS` probes.
    """
    values = prepared.settings
    groups = values.rl.algorithm == "rloo"
    size = min(PER_PROMPT, filled(values.rl.num_generations)) if groups else 1
    count = PROMPTS if groups else PROMPTS * PER_PROMPT
    for turn in range(ROUNDS):
        part = [prompts[(turn * count + i) % len(prompts)] for i in range(count) for _ in range(size)]
        found = _answer(model, prepared, score, part, values.run.seed + turn)
        check_finite(found.scored.total)
        width = len(part) if is_function or not groups else size
        slices = [slice(start, start + width) for start in range(0, len(part), width)]
        if any(map(found.differs, slices)):
            _tell_idle(prepared.run, found.scored)
            return found
        if not is_function and any(map(found.varies, slices)):
            break
    raise RunFailed(*_no_difference(found, len(prompts[:count]), size))


def _answer(
    model: Any, prepared: Prepared[settings.Rl], score: Score, part: Sequence[tuple[Prompt, list[int]]], seed: int
) -> Probe:
    values = prepared.settings
    size = filled(values.train.per_device_train_batch_size)
    written: list[list[int]] = []
    prompts = [ids for _, ids in part]
    for start in range(0, len(part), size):
        longest = filled(values.sampling.max_completion_length)
        how = Sampling(filled(values.sampling.temperature), longest, seed + start)
        written += sampling.sample(model, prepared.renderer, prompts[start : start + size], how)
    return Probe(prompts, written, score([row for row, _ in part], written))


def _no_difference(found: Probe, prompts: int, size: int) -> tuple[str, str]:
    rewards = found.scored.total
    if not found.differs(slice(None)) and found.varies(slice(None)):
        what = f"The reward gives all {len(rewards)} completions the same value ({rewards[0]:.4g}): nothing to learn"
        return what, "check that the reward fits the data and tells good completions from bad ones"
    same = len({tuple(ids) for ids in found.written}) <= prompts
    what = f"The reward gives the {size} completions of each of {prompts} prompts the same value: nothing to learn"
    why = "the policy writes the same to a prompt each time: " if same else ""
    return what, f"{why}raise --temperature or --num-generations, or check the reward"


def _tell_idle(run: Run, scored: Scored) -> None:
    """Say which of several rewards gives everything the same value."""
    for name, part in scored.parts.items() if len(scored.parts) > 1 else ():
        if max(part) == min(part):
            run.note(f"The reward {name} gives all {len(part)} completions the same value: so far it adds nothing.")

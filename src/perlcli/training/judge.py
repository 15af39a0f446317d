"""Judges what a policy writes: the reward function that TRL calls, and the probe before the first step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from datasets import Dataset
from transformers import TrainerState

from perlcli import data, settings, stats
from perlcli.data import Prompt
from perlcli.errors import RunFailed
from perlcli.model.roles import Model
from perlcli.rollouts import engines
from perlcli.rollouts.engines import Engine
from perlcli.rollouts.how import Ids
from perlcli.rollouts.stops import Ends
from perlcli.run.files import REWARD_ERRORS, SAMPLES, read_rows
from perlcli.run.lifecycle import Run
from perlcli.run.metrics import BY_LENGTH
from perlcli.text import counted, shorten
from perlcli.training import sampling
from perlcli.training.prepare import Prepared, filled
from perlcli.training.reward_errors import SKIP, STOP, Scored
from perlcli.training.reward_functions import Calling
from perlcli.training.rewards import Weighted

REWARD, SUM = "reward", "weighted_sum"  # the judge's names in TRL's metrics, for one reward and for several
ROW = "perlcli_row"  # the column that leads from TRL's batches back to our rows
PROMPTS, PER_PROMPT = 4, 4  # what a probe samples; without groups it takes one completion of 16 prompts
# How many times to probe, on other prompts each time, if that may help: a function can be hard to please, and a policy
# that writes the same to a prompt every time says nothing about the reward.
ROUNDS = 5
UNSCORED = "unscored"  # in the metrics of a step: share of its completions; in the record's guards: their count
SAMPLES_PER_RUN = 20
Asked = tuple[Prompt, Ids]  # a prompt with its token ids
LogMetric = Callable[[str, float], None]


class Judge:
    """The reward function that TRL calls: scores completions, keeps samples and the completions without a reward."""

    def __init__(
        self, prepared: Prepared[settings.Rl], score: Weighted, rows: list[Prompt], name: str = REWARD
    ) -> None:
        self.run, self.render = prepared.run, prepared.renderer
        self.score, self.rows = score, rows
        self.ends = Ends(prepared.renderer, prepared.settings.sampling.stop)
        self.decision = prepared.settings.sampling.on_reward_error
        self.__name__ = name  # TRL names its metrics by it

    def dataset(self) -> Dataset:
        """The token ids of the prompts for TRL, which passes each one's `ROW` back with its completions."""
        prompts = [self.render.prompt_ids(row.prompt, row.template) for row in self.rows]
        return Dataset.from_list([{"prompt": ids, ROW: index} for index, ids in enumerate(prompts)])

    def __call__(
        self, completion_ids: Sequence[Ids], trainer_state: TrainerState, log_metric: LogMetric, **columns: Any
    ) -> list[float | None]:
        """One reward per completion of the batch, None for one that is skipped; `columns` are those of the dataset.
        Raises PerlError for one that can't be scored, unless `--on-reward-error` says otherwise."""
        rows: list[Prompt] = [self.rows[index] for index in columns[ROW]]
        logged: dict[str, list[Any]] = {}
        read = [self.ends.answer(ids) for ids in completion_ids]
        scored = self.score(rows, read, Calling(trainer_state, logged.__setitem__, log_metric))
        if len(scored.parts) > 1:
            for name, rewards in scored.parts.items():
                if known := [reward for reward in rewards if reward is not None and math.isfinite(reward)]:
                    log_metric(f"rewards/{name}/mean", fmean(known))
        texts = [self.render.text(ids) for ids in read]
        checks = [data.gold_check(row) for row in rows]
        gold = [check(text) for check, text in zip(checks, texts, strict=True) if check]
        if gold:
            log_metric("gold", fmean(gold))
        step, sums = trainer_state.global_step + 1, [None if math.isnan(value) else value for value in scored.total]
        for index, fault in scored.faults.items():
            row = {"prompt": data.text_of(rows[index].prompt), "policy": texts[index], "reward": sums[index]}
            self.run.append(REWARD_ERRORS, {"step": step, **row, "problem": fault})
        if link := by_length(scored.total, completion_ids, columns[ROW]):
            log_metric(BY_LENGTH, link)
        if self.decision != STOP:
            log_metric(UNSCORED, len(scored.faults) / len(rows))
        if trainer_state.global_step % max(1, trainer_state.max_steps // SAMPLES_PER_RUN) == 0:
            sample = {"prompt": data.text_of(rows[0].prompt), "policy": texts[0], "reward": sums[0]}
            extra = {name: values[0] for name, values in logged.items() if name not in ("step", *sample)}
            self.run.append(SAMPLES, {"step": step, **sample, **plain(extra)})
        return sums


def by_length(rewards: Sequence[float], written: Sequence[Ids], prompts: Sequence[int]) -> float:
    """The correlation of reward with length among the completions of a prompt, of those with a reward; 0 if either
    doesn't vary."""
    known = [place for place, value in enumerate(rewards) if not math.isnan(value)]
    if not known:
        return 0.0
    lengths, groups = [len(written[place]) for place in known], [prompts[place] for place in known]
    return stats.correlation_within([rewards[place] for place in known], lengths, groups)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as JSON has them; anything else as text."""
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: object) -> object:
    try:
        return json.loads(json.dumps(value, default=shorten))
    except (ValueError, RecursionError):  # thousands of digits, or of levels
        return shorten(value)


def note_unscored(run: Run, decision: str | float) -> None:
    """Note how many completions had no reward of their own in a run, and count them in the record."""
    count = len(read_rows(run.folder / REWARD_ERRORS))
    if decision == STOP:
        return
    run.record.guards[UNSCORED] = count
    if count:
        what = "were skipped" if decision == SKIP else f"got {float(decision):g}"
        run.note(f"{counted(count, 'completion')} could not be scored and {what}: see {run.folder / REWARD_ERRORS}.")


@dataclass(frozen=True)
class Probe:
    """What the policy wrote to a few prompts before it learned, and how the reward scored it."""

    prompts: list[Ids]
    written: list[Ids]
    scored: Scored

    def differs(self, part: slice) -> bool:
        """Whether different completions got different rewards; equal ones differ by rounding, which teaches nothing."""
        texts = [(*prompt, -1, *ids) for prompt, ids in zip(self.prompts[part], self.written[part], strict=True)]
        rewards = dict(zip(texts, self.scored.total[part], strict=True)).values()
        known = [value for value in rewards if not math.isnan(value)]
        return bool(known) and max(known) > min(known)

    def varies(self, part: slice) -> bool:
        """Whether there are different completions."""
        return len({tuple(ids) for ids in self.written[part]}) > 1

    def summary(self) -> dict[str, float]:
        """The probe as a run's record keeps it."""
        rewards = self.scored.known
        figures = {"reward_low": min(rewards), "reward_mean": fmean(rewards), "reward_high": max(rewards)}
        return {"completions": len(rewards), **figures}


def probe(
    model: Model,
    prepared: Prepared[settings.Rl],
    score: Weighted,
    prompts: Sequence[Asked],
    engine: Engine | None = None,
    *,
    is_function: bool,
) -> Probe:
    """Sample and score a few prompts before the first step. Raises RunFailed if all get the same reward. RLOO learns
    from differences between completions of one prompt, so a reward model that sees none within any prompt fails too. A
    reward function, and a policy that writes the same each time, get up to `ROUNDS` probes."""
    values = prepared.settings
    is_grouped = values.rl.algorithm == "rloo"
    per_prompt = min(PER_PROMPT, filled(values.rl.num_generations)) if is_grouped else 1
    count = PROMPTS if is_grouped else PROMPTS * PER_PROMPT
    for turn in range(ROUNDS):
        part = [prompts[(turn * count + i) % len(prompts)] for i in range(count) for _ in range(per_prompt)]
        result = _answer(model, prepared, score, part, (engine, values.run.seed + turn))
        width = per_prompt if is_grouped and not is_function else len(part)
        groups = [slice(start, start + width) for start in range(0, len(part), width)]
        if any(map(result.differs, groups)):
            for name, rewards in result.scored.parts.items():
                if len(result.scored.parts) > 1 and len(set(rewards)) == 1:
                    same = f"gives all {len(rewards)} completions the same value: it has no effect so far."
                    prepared.run.note(f"The reward {name} {same}")
            if result.scored.faults:
                failed = f"{len(result.scored.faults)} of {len(part)} completions before the first step"
                prepared.run.note(f"The reward could not score {failed}: {next(iter(result.scored.faults.values()))}")
            return result
        if not is_function and any(map(result.varies, groups)):
            break
    raise _no_difference(result, len(prompts[:count]), per_prompt)


def _answer(
    model: Model,
    prepared: Prepared[settings.Rl],
    score: Weighted,
    part: Sequence[Asked],
    sampled: tuple[Engine | None, int],
) -> Probe:
    values, (engine, seed) = prepared.settings, sampled
    how, ends = sampling.asked(values.sampling, seed), Ends(prepared.renderer, values.sampling.stop)
    prompts = [ids for _, ids in part]
    size = filled(values.train.per_device_train_batch_size)
    batches = engines.sample_batches(engine, model, prepared.renderer, prompts, how, size)
    written = [ids for batch in batches for ids in batch]
    return Probe(prompts, written, score([row for row, _ in part], [ends.answer(ids) for ids in written]))


def _no_difference(result: Probe, prompts: int, per_prompt: int) -> RunFailed:
    rewards, everything = result.scored.known, slice(None)
    if not rewards:
        return RunFailed(f"The reward could score no completion: {result.scored.faults[0]}", "check the reward")
    if not result.differs(everything) and result.varies(everything):
        return RunFailed(
            f"The reward gives all {len(rewards)} completions the same value ({rewards[0]:.4g}): nothing to learn",
            "check that the reward suits the data and distinguishes good completions from bad ones",
        )
    is_certain = len({tuple(ids) for ids in result.written}) <= prompts
    cause = "the policy writes the same completion to a prompt every time: " if is_certain else ""
    return RunFailed(
        f"The reward gives the {per_prompt} completions of each of {prompts} prompts the same value: nothing to learn",
        f"{cause}raise --temperature or --num-generations, or check the reward",
    )

"""`perl rl`: RLOO against a reward, the policy anchored to where it started, all on one frozen base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from perlcli import data, plots, policies, rewards, roles, settings
from perlcli.data import Prompt
from perlcli.errors import RunFailed
from perlcli.meter import train
from perlcli.prepare import Prepared, load_data, prepare, preview, require
from perlcli.record import METRICS, SAMPLES, Run, RunRecord, recording
from perlcli.training import trl_config

ROW = "perlcli_row"  # the column that leads from TRL's batches back to our rows
FLAT_BATCHES = 3  # how often a function may give equal rewards to all before that counts as a fault
LAST = 10  # steps whose mean is the run's final figure


def run(given: settings.Rl) -> RunRecord | None:
    """Train the policy's adapter against the reward; None for a dry run."""
    prepared = prepare(given)
    require(prepared, policy=True)
    config = trainer_args(prepared.settings)
    reward = rewards.find(prepared.settings.sampling.reward, prepared)
    rows = load_data(prepared, "rl", "train")
    assert rows is not None
    prompts = [row for row, _ in policies.fitting_prompts(prepared, rows, "train")]
    if prepared.is_dry:
        preview(prepared, config)
        return None
    with recording(prepared.run) as run:
        model = policies.start(prepared)
        score = rewards.attach(reward, model, prepared, config.per_device_train_batch_size)
        dataset = Dataset.from_list([{"prompt": row.prompt, ROW: index} for index, row in enumerate(prompts)])
        judge: Any = Judge(run, prepared, score, prompts, is_function=reward.function is not None)
        trainer: Any = RLOOTrainer(model, judge, config, train_dataset=dataset, processing_class=prepared.tokenizer)
        if not prepared.settings.lora.full:
            roles.keep_only_policy_trainable(trainer.model)
            roles.set_adapter_dropout(trainer.model, prepared.settings.lora.lora_dropout or 0.0)
        run.record.trl_settings = trainer.args.to_dict()
        run.record.trainable_parameters, run.record.total_parameters = roles.count_parameters(trainer.model)
        marks = checksums(trainer.model)
        train(trainer, run, lambda model: policies.save(prepared, model))
        compare(marks, checksums(trainer.model))
        run.record.metrics = summary(trainer.state.log_history)
        plots.curves("rl", run.folder / METRICS, run.folder / "plots" / "training.png")
    return run.record


def trainer_args(given: settings.Rl) -> RLOOConfig:
    """The TRL config of these settings."""
    extra = {
        "beta": given.rl.beta, "temperature": given.sampling.temperature, "num_generations": given.rl.num_generations,
        "max_completion_length": given.sampling.max_completion_length,
        "disable_dropout": True,  # else policy and anchor differ by chance where they are equal, and so do samples
    }  # fmt: skip
    return trl_config(RLOOConfig, given, extra)


class Judge:
    """The reward function that TRL calls: scores what the policy wrote, keeps samples, stops a run that can't learn."""

    def __init__(
        self, run: Run, prepared: Prepared, score: Callable[..., list[float]], rows: list[Prompt], *, is_function: bool
    ) -> None:
        self.run, self.score, self.rows, self.render = run, score, rows, prepared.renderer
        self.penalty = prepared.settings.rl.missing_eos_penalty or 0.0
        self.patience = FLAT_BATCHES if is_function else 1
        self.__name__ = "reward"  # TRL names its metrics by it

    def __call__(
        self, completion_ids: Sequence[list[int]], trainer_state: Any, log_metric: Any, **columns: Any
    ) -> list[float]:
        """One reward a completion of the batch."""
        rows = [self.rows[index] for index in columns[ROW]]
        found = self.score(rows, completion_ids)
        self._check(found)
        taken = [r - self.penalty * (not self.render.ended(ids)) for r, ids in zip(found, completion_ids, strict=True)]
        texts = [self.render.text(ids) for ids in completion_ids]
        gold = [check(text) for row, text in zip(rows, texts, strict=True) if (check := data.gold_check(row))]
        if gold:
            log_metric("gold", fmean(gold))
        self._sample(trainer_state, rows[0], texts[0], taken[0])
        return taken

    def _check(self, found: list[float]) -> None:
        if not all(map(math.isfinite, found)):
            raise RunFailed(
                "The reward is not a finite number for some completions", "check the reward model or function"
            )
        if max(found) > min(found):
            self.patience = -1  # rewards differ: from here on equal batches are no fault
        elif self.patience > 0 and len(found) > 1:
            self.patience -= 1
            if self.patience == 0:
                raise RunFailed(
                    f"The reward gives all {len(found)} completions the same value ({found[0]:.4g}): nothing to learn",
                    "check that the reward fits the data, raise --temperature or --num-generations",
                )

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


def checksums(model: Any) -> dict[str, str]:
    """A digest for each role on the base; under full tuning of the policy alone."""
    adapters = list(getattr(model, "peft_config", {}))
    if not adapters:
        return {roles.POLICY: roles.checksum(model, "")}
    return {"": roles.checksum(model, ""), **{name: roles.checksum(model, name) for name in adapters}}


def compare(before: dict[str, str], after: dict[str, str]) -> None:
    """The policy must have moved, and nothing else."""
    roles.assert_moved(before[roles.POLICY], after[roles.POLICY], "The policy")
    words = {"": "The base", roles.ANCHOR: "The anchor", roles.REWARD: "The reward adapter"}
    for name, word in words.items():
        if name in before:
            roles.assert_still(before[name], after[name], word)


def summary(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the run's last steps, and the reward that it began with."""
    steps = [row for row in history if "reward" in row]
    if not steps:
        return {}
    names = {
        "reward": "reward", "kl": "kl_per_token", "completions/mean_length": "completion_length",
        "completions/clipped_ratio": "share_truncated", "gold": "gold",
    }  # fmt: skip
    metrics = {"first_reward": steps[0]["reward"]}
    for theirs, ours in names.items():
        values = [row[theirs] for row in steps[-LAST:] if row.get(theirs) is not None]
        if values:
            metrics[ours] = fmean(values)
    return metrics

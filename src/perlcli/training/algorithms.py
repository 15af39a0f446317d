"""The two RL algorithms as TRL trainers on one base: RLOO, and REINFORCE with the paper's value model. Both override
methods of TRL's `RLOOTrainer` that TRL's own subclasses override too (trl/trainer/rloo_trainer.py, TRL 1.16). The paper
is PERL, arXiv 2403.10704."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from trl import RLOOConfig

from perlcli.errors import RunFailed
from perlcli.model import roles
from perlcli.model.prompt_splits import grouped
from perlcli.model.roles import Model
from perlcli.model.shared_prompts import Sharer
from perlcli.model.tokenizers import padded
from perlcli.rollouts.engines import Engine
from perlcli.rollouts.how import Sampling
from perlcli.rollouts.local import finite, without_habits
from perlcli.rollouts.stops import stopping
from perlcli.training import importance
from perlcli.training.judge import Judge
from perlcli.training.logits import wrapped
from perlcli.training.loop import clocks
from perlcli.training.resume import KeepsGeneration
from perlcli.training.value_model import Batch, ValueModel

SAMPLER = "sampler/"  # in the metrics of a step: how far an engine is from training
PHASES = ("sampling", "scoring", "anchor", "learning")
TIME = "seconds/"
WRITTEN = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")  # in TRL's batch: what the policy wrote
FLOAT16_SCALE = 2.0**14  # of the value model's loss in float16
LogProbs = tuple[torch.Tensor, Any, Any]  # with entropies and auxiliary loss, or None in their place


@dataclass(frozen=True)
class Rollouts:
    """What samples in training, with which options, and the cap of the importance weights that correct for it."""

    engine: Engine | None
    how: Sampling
    cap: float = 0.0


class Rloo(KeepsGeneration):
    """TRL's RLOO, which also logs the seconds spent on sampling, scoring, anchor (both log-probs) and learning."""

    rollouts: Rollouts | None = None
    per_token = False  # whether advantages and importance weights are of tokens
    own_logits = False  # whether log-probs are computed from the model's own logits (`logits.check`)

    def __init__(self, model: Model, judge: Judge, config: RLOOConfig, sharer: Sharer) -> None:
        super().__init__(model, judge, config, train_dataset=judge.dataset(), processing_class=judge.render.tokenizer)
        self._policy: Any = self.model
        self.sharer, self.ends = sharer, judge.ends
        self._log_probs: list[torch.Tensor] = []  # of a generation: of the policy that sampled, then of the anchor
        self._sampled: list[list[float]] = []  # the same as the engine gives them
        self.clock = Clock(self)
        self.add_callback(self.clock)

    def _generate(self, prompts: list[Any]) -> Any:
        casting = roles.casting(self._policy, on=True)  # TRL samples outside autocast
        with self.clock.phase("sampling"), casting, self.sharer.prefill():
            generated = super()._generate(prompts)
        if self.ends.stop:
            self._count_ends(generated[1])
        return generated

    def _generate_single_turn(self, *args: Any) -> list[list[int]]:
        """One completion per prompt, without the padding behind a stop string, which TRL would take for tokens."""
        if self.rollouts is not None and self.rollouts.engine is not None:
            return self._by_engine(self.rollouts.engine, self.rollouts.how, args[0])
        with without_habits(self._policy), stopping(self._policy, self.ends), finite():
            written: list[list[int]] = super()._generate_single_turn(*args)
        return [self.ends.cut(ids) for ids in written] if self.ends.stop else written

    def _by_engine(self, engine: Engine, how: Sampling, prompts: list[list[int]]) -> list[list[int]]:
        seed = int(torch.randint(2**31, ()))  # from the state that a checkpoint keeps
        written = engine.sample(self._policy, prompts, replace(how, seed=seed))
        self._sampled = [each.log_probs for each in written] if engine.compares(how) else []
        return [each.ids for each in written]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        """TRL's generation batch, with advantages that correct for the engine that sampled."""
        self._log_probs, self._sampled = [], []
        batch: Batch = super()._generate_and_score_completions(inputs)
        if self._sampled and self.rollouts is not None:
            self._correct(batch, self.rollouts)
        return batch

    def _correct(self, batch: Batch, rollouts: Rollouts) -> None:
        """Log how far the engine is from training, and multiply the advantages by importance weights."""
        mask, trained = batch["completion_mask"], self._log_probs[0]
        sampled = importance.padded_like(self._sampled, mask)
        found = importance.figures(trained, sampled, mask)
        if rollouts.cap:
            weights = importance.weights(trained, sampled, mask, rollouts.cap, per_token=self.per_token)
            tokens = mask.sum().clamp(min=1)  # none, if every completion was truncated and is masked out
            found["importance"] = float((weights * mask).sum() / tokens if self.per_token else weights.mean())
            if self.per_token:
                batch["importance"] = weights
            else:
                batch["advantages"] = batch["advantages"] * weights
        for name, value in found.items():
            self._metrics["train"][f"{SAMPLER}{name}"].append(value)
        limit = getattr(rollouts.engine, "limit", math.inf)
        if not found["diff_mean"] <= limit:
            raise RunFailed(
                f"The engine's log-probabilities differ from the run's by {found['diff_mean']:.3g} per token, more "
                f"than --vllm-max-logprob-diff {limit:g}",
                "the server may have lost the adapter, or has another base",
            )

    def _count_ends(self, written: list[list[int]]) -> None:
        """Correct the metrics in which TRL counts a completion that ends with a stop string as truncated."""
        metrics = self._metrics["train" if self._policy.training else "eval"]
        lengths = [len(ids) for ids in written if self.ends.ended(ids)] or [0]
        figures = {"mean": fmean(lengths), "min": min(lengths), "max": max(lengths)}
        metrics["completions/clipped_ratio"][-1] = fmean(not self.ends.ended(ids) for ids in written)
        for name, value in figures.items():
            metrics[f"completions/{name}_terminated_length"][-1] = float(value)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[Any], None, dict[str, Any]]:
        """The prompts, which are token ids already: TRL would render all alike, and add a second BOS to text."""
        return prompts, None, {}

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The next pass's batch. TRL shuffles the completions of a generation over its passes; with shared prompts,
        those of one prompt then come together again."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.sharer.shares or self._buffered_inputs is before:
            return inputs
        args: Any = self.args
        parts, size = self._buffered_inputs, args.gradient_accumulation_steps  # only within an optimiser step
        starts = range(0, len(parts), size)
        self._buffered_inputs = [part for start in starts for part in by_prompt(parts[start : start + size])]
        return self._buffered_inputs[self._step % args.steps_per_generation]

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        """The rewards, (rows, reward functions)."""
        with self.clock.phase("scoring"), roles.casting(self._policy, on=True):  # as the stand-alone reward model
            return super()._calculate_rewards(*args)

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, width: int, *args: Any, **kwargs: Any
    ) -> LogProbs:
        """Log-probs, and on request entropies, both (rows, completion tokens); and on request the auxiliary loss. The
        last `width` columns are completions."""
        clock = nullcontext() if torch.is_grad_enabled() else self.clock.phase("anchor")
        sharer = self.sharer if model is not self.ref_model else self.sharer.twin(model)  # under full tuning
        with clock, sharer.columns(input_ids.shape[1] - width):
            called = wrapped(self, model, width)
            result: LogProbs = super()._get_per_token_logps_and_entropies(
                called, input_ids, mask, width, *args, **kwargs
            )
        if not torch.is_grad_enabled():
            self._log_probs.append(result[0])
        return result

    def kl_to_anchor(self, prompts: Sequence[list[int]], written: Sequence[list[int]]) -> float:
        """KL(policy || anchor) per token on some completions, by the same computation that training uses."""
        ids, mask, length = side_by_side(prompts, written, self._tokenizer.pad_token_id, self.accelerator.device)
        model = self._policy
        was_training = model.training
        model.eval()
        with torch.no_grad():
            policy = self._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
            if self.ref_model is not None:
                anchor = self._get_per_token_logps_and_entropies(self.ref_model, ids, mask, length)[0]
            else:
                with roles.switched(model, roles.ANCHOR if roles.ANCHOR in model.peft_config else None):
                    anchor = self._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
        model.train(was_training)
        completion_mask = mask[:, -length:]
        return float(((policy - anchor) * completion_mask).sum() / completion_mask.sum())


class Reinforce(Rloo):
    """REINFORCE as in the paper: one completion per prompt; a token's advantage is its return minus the predicted one.
    The return of a token is (1 - beta) x reward, minus beta x the log-ratios to the anchor from that token on, so that
    the objective is E[(1 - beta) r - beta KL] (paper, section 2.3; the algorithm is from RLAIF, arXiv 2309.00267)."""

    per_token = True

    def __init__(self, model: Model, judge: Judge, config: RLOOConfig, sharer: Sharer, value: ValueModel) -> None:
        super().__init__(model, judge, config, sharer)
        self.value = value
        self._rewards = torch.empty(0)  # (rows,), of the last generation batch
        self._to_learn: list[Batch] = []  # what the value model has yet to learn from in this step
        self.add_callback(_LearnValue(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            group = {"params": self.value.parameters(), "lr": self.value.learning_rate, "weight_decay": 0.0}
            optimizer.add_param_group(group)
        return optimizer

    # Sampling: TRL samples, scores and computes log-probs; rewards and log-probs are kept as they come by.

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args)
        self._rewards = (rewards * self.reward_weights.to(rewards.device)).sum(dim=1)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        """TRL's generation batch with `returns`, `advantages`, `old_token_logps`, each (rows, completion tokens)."""
        batch: Batch = super()._generate_and_score_completions(inputs)
        mask, rewards = batch["completion_mask"], self._rewards
        old = self._log_probs[0]
        anchor = self._log_probs[1] if self.beta else old
        self._log_probs = []
        if self.reward_clip_range:
            rewards = rewards.clamp(*self.reward_clip_range)

        is_scored = ~rewards.isnan()  # a skipped completion teaches neither the policy nor the value model
        mask = batch["completion_mask"] = mask * is_scored.unsqueeze(1).to(mask.dtype)
        batch["returns"] = returns(rewards.nan_to_num(), (old - anchor) * mask, self.beta) * mask
        size = self.args.per_device_train_batch_size
        starts = range(0, len(batch["prompt_ids"]), size)  # in parts that fit the device
        parts = [{name: batch[name][start : start + size] for name in WRITTEN} for start in starts]
        values = torch.cat([self.value.predict(part, self.accelerator.autocast()) for part in parts])
        advantages = (batch["returns"] - values) * mask
        if self.normalize_advantages:
            advantages = whiten(advantages, mask)
        batch["advantages"], batch["old_token_logps"] = advantages * batch.pop("importance", 1.0), old

        metrics = self._metrics["train"]
        metrics.pop("frac_reward_zero_std", None)  # means nothing for groups of one
        metrics["value/mean"].append(float((values * mask).sum() / mask.sum().clamp(min=1)))
        metrics["value/explained"].append(explained(batch["returns"], values, mask))
        return batch

    # Learning: first the policy, pass by pass, then the value model from the same passes, before the optimiser's step.

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        """The policy's loss of one pass, by TRL's `_compute_loss` but with advantages and ratios per token."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        logps, entropy, auxiliary = self._get_per_token_logps_and_entropies(
            model, ids, attention, mask.size(1), compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        # The ratio is 1 if a batch is learned from once; then this is REINFORCE's own gradient. Otherwise it is clipped
        # as in TRL's RLOO.
        ratio = torch.exp((logps - inputs["old_token_logps"]) * mask)
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        loss = -(torch.min(ratio * advantages, clipped * advantages) * mask).sum(dim=1).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * auxiliary

        tokens = mask.sum().clamp(min=1)
        metrics = self._metrics["train"]
        metrics["entropy"].append(float((entropy * mask).detach().sum() / tokens))
        metrics["clip_ratio/region_mean"].append(float(((ratio != clipped) * mask).detach().sum() / tokens))
        self._to_learn.append({name: inputs[name] for name in (*WRITTEN, "returns")})
        return loss

    def learn_values(self) -> None:
        """Compute the value model's gradients on what the policy just learned from, and clip them separately."""
        scale = FLOAT16_SCALE if self.args.fp16 else 1.0
        error = self.value.learn(self._to_learn, self.accelerator.autocast, scale)
        self._to_learn = []
        if self.args.max_grad_norm and self.args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.value.parameters(), self.args.max_grad_norm)
        self._metrics["train"]["value/loss"].append(error)

    # Checkpoints: peft writes the value model's adapter, but not its head.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.value.save_head(Path(str(output_dir or self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.value.load_head(Path(resume_from_checkpoint))


def returns(rewards: torch.Tensor, log_ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """The return of each token, (rows, tokens): G_t = (1 - beta) r - beta sum_{s >= t} log(policy_s / anchor_s), from
    rewards, (rows,), and log-ratios of policy to anchor, (rows, tokens) and 0 where nothing was written."""
    to_come = log_ratios.flip(1).cumsum(1).flip(1)
    return (1 - beta) * rewards.unsqueeze(1) - beta * to_come


def whiten(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Advantages with mean 0 and standard deviation 1 over the masked tokens; both arguments are (rows, tokens)."""
    kept = advantages[mask.bool()]
    if len(kept) < 2:  # every completion was truncated, and is masked out
        return torch.zeros_like(advantages)
    return (advantages - kept.mean()) / (kept.std() + 1e-4) * mask


def explained(wanted: torch.Tensor, predicted: torch.Tensor, mask: torch.Tensor) -> float:
    """The explained variance of predicted returns, all (rows, tokens): 1 at best, 0 if as good as the returns' mean."""
    target, error = wanted[mask.bool()], (wanted - predicted)[mask.bool()]
    variance = float(target.var()) if target.numel() > 1 else 0.0
    return 1 - float(error.var()) / variance if variance > 0 else 0.0


def by_prompt(parts: Sequence[Batch]) -> list[Batch]:
    """The parts of a generation, with the completions of each prompt together: in the first one's place."""
    names = [name for name, value in parts[0].items() if isinstance(value, torch.Tensor)]
    rows = {name: torch.cat([part[name] for part in parts]) for name in names}
    prompts = torch.cat([rows["prompt_ids"] * rows["prompt_mask"], rows["prompt_mask"]], dim=1).tolist()
    order = [row for group in grouped([tuple(prompt) for prompt in prompts]) for row in group]
    size = len(order) // len(parts)
    return [
        part | {name: rows[name][order[start : start + size]] for name in names}
        for part, start in zip(parts, range(0, len(order), size), strict=True)
    ]


def side_by_side(
    prompts: Sequence[list[int]], written: Sequence[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prompts padded on the left and completions on the right, as TRL pads them. Gives ids and attention mask, both
    (rows, longest prompt + longest completion), and the longest completion's length."""
    before, before_mask = padded(prompts, pad, device, on_left=True)
    after, after_mask = padded(written, pad, device)
    return torch.cat([before, after], dim=1), torch.cat([before_mask, after_mask], dim=1), after.shape[1]


class Clock(TrainerCallback):
    """Measures where the time of a step goes; what belongs to no other phase is learning."""

    def __init__(self, trainer: Rloo) -> None:
        self.trainer = trainer
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.start = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as part of this phase."""
        start = clocks()[0]
        try:
            yield
        finally:
            self.seconds[name] += clocks()[0] - start

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.seconds.clear()
        self.start = clocks()[0]

    def on_step_end(self, *_: object, **__: object) -> None:
        total = clocks()[0] - self.start
        self.seconds["learning"] = total - sum(self.seconds[name] for name in PHASES[:-1])
        for name in PHASES:
            self.trainer._metrics["train"][TIME + name].append(self.seconds[name])


class _LearnValue(TrainerCallback):
    """Lets the value model learn when the policy's gradients are complete and clipped, before the optimiser's step."""

    def __init__(self, trainer: Reinforce) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self.trainer.learn_values()

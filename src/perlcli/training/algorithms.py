"""The two algorithms as TRL trainers on one base: RLOO, and REINFORCE with the paper's value model. Both time their
steps.

They override methods of TRL's `RLOOTrainer` that its own subclasses override too, and change none of its arithmetic but
the advantage.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from perlcli.model import roles
from perlcli.model.batches import padded
from perlcli.training.resume import KeepsGeneration
from perlcli.training.value_model import Batch, ValueModel

PHASES = ("sampling", "scoring", "anchor", "learning")
TIME = "seconds/"
WRITTEN = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")  # TRL's names for what was written
SCALE = 2.0**14  # of the value model's loss in float16


class Clock(TrainerCallback):
    """Adds up where a step's time goes; what no other phase claims is learning."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.start = 0.0

    def now(self) -> float:
        """Seconds, once the GPU has done what it was given."""
        if self.trainer.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as this phase's."""
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.clear()
        self.start = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        whole = self.now() - self.start
        self.seconds["learning"] = whole - sum(self.seconds[name] for name in PHASES[:-1])
        for name in PHASES:
            self.trainer._metrics["train"][TIME + name].append(self.seconds[name])


class Rloo(KeepsGeneration):
    """TRL's RLOO, which also logs the seconds of sampling, scoring, anchor (both log-probabilities) and learning."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._policy: Any = self.model
        self.clock = Clock(self)
        self.add_callback(self.clock)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with roles.casting(self._policy, on=not (self.args.bf16 or self.args.fp16)):  # both are autocast
            return super().training_step(*args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        with self.clock.phase("sampling"), roles.casting(self._policy, on=True):  # TRL samples outside autocast
            return super()._generate(prompts)

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        with self.clock.phase("scoring"), roles.casting(self._policy, on=True):  # as the stand-alone reward model
            return super()._calculate_rewards(*args)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        learning = torch.is_grad_enabled()
        with nullcontext() if learning else self.clock.phase("anchor"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def kl_to_anchor(self, prompts: Sequence[list[int]], written: Sequence[list[int]]) -> float:
        """KL(policy || anchor) per token over some completions, by the very computation that training uses."""
        ids, mask, length = side_by_side(prompts, written, self._tokenizer.pad_token_id, self.accelerator.device)
        model = self._policy
        was_training = model.training
        model.eval()
        with torch.no_grad():
            mine = self._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
            if self.ref_model is not None:
                theirs = self._get_per_token_logps_and_entropies(self.ref_model, ids, mask, length)[0]
            else:
                with roles.switched(model, roles.ANCHOR if roles.ANCHOR in model.peft_config else None):
                    theirs = self._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
        model.train(was_training)
        kept = mask[:, -length:]
        return float(((mine - theirs) * kept).sum() / kept.sum())


def side_by_side(
    prompts: Sequence[list[int]], written: Sequence[list[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prompts padded on the left and completions on the right as one tensor, its mask, and the completions' width."""
    before, before_mask = padded(prompts, pad, device, on_left=True)
    after, after_mask = padded(written, pad, device)
    return torch.cat([before, after], dim=1), torch.cat([before_mask, after_mask], dim=1), after.shape[1]


class Reinforce(Rloo):
    """REINFORCE as the paper has it: one completion a prompt, a token's advantage is return minus predicted return.

    The return of a token is (1 - beta) x reward, less beta x the log-ratios to the anchor from that token on, so that
    the objective is E[(1 - beta) r - beta KL] (paper, section 2.3; RLAIF, arXiv 2309.00267, for the algorithm).
    """

    def __init__(self, *args: Any, value: ValueModel, value_learning_rate: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.value, self.value_learning_rate = value, value_learning_rate
        self._rewards = torch.empty(0)
        self._log_probs: list[torch.Tensor] = []
        self._to_learn: list[Batch] = []
        self.add_callback(_LearnValue(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            rate = self.value_learning_rate
            optimizer.add_param_group({"params": self.value.parameters(), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        found = super()._calculate_rewards(*args)
        self._rewards = (found * self.reward_weights.to(found.device)).sum(dim=1)
        return found

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not torch.is_grad_enabled():
            self._log_probs.append(found[0])
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._log_probs = []
        batch = super()._generate_and_score_completions(inputs)
        mask, rewards = batch["completion_mask"], self._rewards
        old = self._log_probs[0]
        anchor = self._log_probs[1] if self.beta else old
        self._log_probs = []
        if self.reward_clip_range:
            rewards = rewards.clamp(*self.reward_clip_range)
        batch["returns"] = returns(rewards, (old - anchor) * mask, self.beta) * mask
        values = torch.cat([self.value.predict(part, self._autocast()) for part in self._parts(batch)])
        advantages = (batch["returns"] - values) * mask
        if self.normalize_advantages:
            advantages = whiten(advantages, mask)
        batch["advantages"], batch["old_token_logps"] = advantages, old
        self._metrics["train"].pop("frac_reward_zero_std", None)  # of groups of one it says nothing
        self._metrics["train"]["value/mean"].append(float((values * mask).sum() / mask.sum().clamp(min=1)))
        self._metrics["train"]["value/explained"].append(explained(batch["returns"], values, mask))
        return batch

    def _parts(self, batch: dict[str, Any]) -> Iterator[Batch]:
        """A generation batch in the pieces that fit the device."""
        size = self.args.per_device_train_batch_size
        for start in range(0, len(batch["prompt_ids"]), size):
            yield {name: batch[name][start : start + size] for name in WRITTEN}

    def _autocast(self) -> Any:
        return self.accelerator.autocast()

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        logps, entropy, auxiliary = self._get_per_token_logps_and_entropies(
            model, ids, attention, mask.size(1), compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        # 1 where a batch is learned from once, and then this is REINFORCE's own gradient; clipped as in TRL's RLOO else
        ratio = torch.exp((logps - inputs["old_token_logps"]) * mask)
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        loss = -(torch.min(ratio * advantages, clipped * advantages) * mask).sum(dim=1).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * auxiliary
        tokens = mask.sum().clamp(min=1)
        outside = (ratio != clipped) * mask
        for name, values in (("entropy", entropy * mask), ("clip_ratio/region_mean", outside)):
            self._metrics["train"][name].append(float(values.detach().sum() / tokens))
        self._to_learn.append({name: inputs[name] for name in (*WRITTEN, "returns")})
        return loss

    def learn_values(self) -> None:
        """Take the value model's gradients of the batches that the policy just learned from, clipped apart from its."""
        error = self.value.learn(self._to_learn, self._autocast, SCALE if self.args.fp16 else 1.0)
        self._to_learn = []
        if self.args.max_grad_norm and self.args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.value.parameters(), self.args.max_grad_norm)
        self._metrics["train"]["value/loss"].append(error)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.value.save_head(Path(str(output_dir or self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.value.load_head(Path(resume_from_checkpoint))


class _LearnValue(TrainerCallback):
    """Lets the value model learn when the policy's gradients are whole and clipped, before the optimiser's step."""

    def __init__(self, trainer: Reinforce) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.learn_values()


def returns(rewards: torch.Tensor, log_ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """The return of each token, (rows, tokens), from rewards (rows,) and masked log-ratios to the anchor."""
    to_come = log_ratios.flip(1).cumsum(1).flip(1)
    return (1 - beta) * rewards.unsqueeze(1) - beta * to_come


def whiten(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Advantages of mean 0 and deviation 1 over the tokens that count."""
    kept = advantages[mask.bool()]
    if len(kept) < 2:  # every completion was cut, and is masked out
        return torch.zeros_like(advantages)
    return (advantages - kept.mean()) / (kept.std() + 1e-4) * mask


def explained(wanted: torch.Tensor, found: torch.Tensor, mask: torch.Tensor) -> float:
    """The share of the returns' variance that the predictions explain: 1 at best, 0 as good as their mean."""
    target, error = wanted[mask.bool()], (wanted - found)[mask.bool()]
    spread = float(target.var()) if target.numel() > 1 else 0.0
    return 1 - float(error.var()) / spread if spread > 0 else 0.0

"""The settings of what samples and scores: rl and eval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perlcli.settings.declaring import option, place

Algorithm = Literal["rloo", "reinforce"]
SFT, BASE = "sft", "base"  # the anchors that have a name


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling and reward"""

    reward: tuple[str, ...] = place(
        "What scores completions: folder of a `perl reward` run, module:function, file.py:function, a sequence "
        "classifier, or a server (http://…). Can be given several times, for a weighted sum.",
        default=(),
    )
    reward_kwargs: tuple[str, ...] = option(
        "Keyword arguments of a reward function or server, as JSON or YAML; with several rewards, once for each.",
        default=(),
        unset="none",
        metavar="JSON",
    )
    reward_label: tuple[str, ...] = option(
        "Label of a classifier whose logit is the reward, by name or index; with several rewards, once for each (none "
        "for one without labels).",
        default=(),
        unset="the only label",
        metavar="NAME|INDEX",
    )
    reward_weights: tuple[float, ...] = option(
        "Weights of the --reward options, in the same order, comma-separated.", default=(), unset="1 each"
    )
    on_reward_error: str | float = option(
        "What becomes of a completion that can't be scored, because the reward raises an error or is NaN, infinite or "
        "None: stop the run, skip the completion, or give it a reward of X.",
        default="stop",
        metavar="[stop|skip|X]",
    )
    temperature: float | None = option("Sampling temperature.", unset="0.7, as in the paper", gt=0)
    max_completion_length: int | None = option("Maximum tokens per completion.", unset="128", gt=0)


@dataclass(frozen=True)
class RlSettings:
    """Sampling and reward"""

    algorithm: Algorithm = option(
        "rloo: the baseline is the mean of the prompt's other completions. reinforce, as in the paper: one completion "
        "per prompt, and the baseline comes from a value model, a separate adapter on the same base.",
        default="rloo",
    )
    num_generations: int | None = option("Completions per prompt.", unset="4, reinforce: 1", gt=0)
    beta: float | None = option("Weight of the KL penalty towards the anchor.", unset="0.05, as in the paper", ge=0)
    anchor: str | None = place(
        "Reference model of the KL penalty: sft (the policy that RL starts from), base, or the folder of a policy on "
        "the same base.",
        unset=SFT,
    )
    missing_eos_penalty: float | None = option(
        "Subtracted from the reward of a completion that has no end-of-sequence token.", unset="none", ge=0
    )
    value_learning_rate: float | None = option(
        "Peak learning rate of the value model, with --algorithm reinforce.", unset="same as --learning-rate", gt=0
    )


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation"""

    max_samples: int | None = option("Evaluate on at most this many rows.", unset="all; 256 prompts for a policy", gt=0)
    per_device_eval_batch_size: int | None = option("Batch size per device.", unset="16", gt=0)

"""The settings of what samples and scores: rl and eval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perlcli.settings.declaring import flag, option, place

Algorithm = Literal["rloo", "reinforce"]
Engine = Literal["transformers", "merged", "continuous", "vllm"]
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
    temperature: float | None = option("Sampling temperature.", unset="{}, as in the paper", gt=0)
    top_p: float | None = option(
        "Sample only from the most likely tokens that together have this probability.",
        unset="1: all tokens",
        gt=0,
        le=1,
    )
    top_k: int | None = option("Sample only from this many most likely tokens.", unset="0: all tokens", ge=0)
    min_p: float | None = option(
        "Sample only from tokens that are at least this times as likely as the most likely one.",
        unset="0: all tokens",
        ge=0,
        lt=1,
    )
    repetition_penalty: float | None = option(
        "Divide the logits of tokens that the prompt or the completion already has by this number (negative logits are "
        "multiplied).",
        unset="1: no penalty",
        gt=0,
    )
    stop: tuple[str, ...] = option(
        "End a completion at this text, as if at EOS; the reward reads what comes before it. Can be given several "
        "times; '' means none.",
        default=(),
        unset="none",
        metavar="TEXT",
    )
    min_completion_length: int | None = option(
        "Minimum tokens per completion: before them, EOS can't be sampled.", unset="0", ge=0
    )
    max_completion_length: int | None = option("Maximum tokens per completion.", unset="{}", gt=0)


@dataclass(frozen=True)
class RolloutSettings:
    """Rollouts"""

    rollouts: Engine = option(
        "What samples completions: transformers; the same with the adapter merged into copies of the projections that "
        "it changes, which takes their memory meanwhile; its continuous batching, in which a completion that ends "
        "makes room for the next one; or vLLM servers that hold the same base, to which only the adapter is sent.",
        default="transformers",
    )
    vllm_server_base_url: tuple[str, ...] = option(
        "Address of a vLLM server (`perl serve` starts one). Can be given several times: prompts are shared out.",
        default=(),
        unset="http://localhost:8000 with --rollouts vllm",
        metavar="URL",
    )
    vllm_max_logprob_diff: float = option(
        "Largest mean difference between a server's log-probabilities and the run's, per token. Above it the run "
        "stops: the server has another model.",
        default=0.1,
        gt=0,
    )


@dataclass(frozen=True)
class ImportanceSettings:
    """Rollouts"""

    importance_cap: float | None = option(
        "Where an engine sampled, weigh completions (reinforce: tokens) by their probability in training over that in "
        "sampling, at most this. 0 turns it off.",
        unset="2; transformers: off",
        ge=0,
    )


@dataclass(frozen=True)
class SharingSettings:
    """Training"""

    shared_prompts: bool = option(
        "Compute what rows start with in common, such as the prompt of several completions, once for all of them. The "
        "results differ by rounding only.",
        default=True,
    )


@dataclass(frozen=True)
class RlSettings:
    """Sampling and reward"""

    algorithm: Algorithm = option(
        "rloo: the baseline is the mean of the prompt's other completions. reinforce, as in the paper: one completion "
        "per prompt, and the baseline comes from a value model, a separate adapter on the same base.",
        default="rloo",
    )
    num_generations: int | None = option("Completions per prompt.", unset="{}, reinforce: 1", gt=0)
    beta: float | None = option("Weight of the KL penalty towards the anchor.", unset="{}, as in the paper", ge=0)
    anchor: str | None = place(
        "Reference model of the KL penalty: sft (the policy that RL starts from), base, or the folder of a policy on "
        "the same base.",
        unset=SFT,
    )
    missing_eos_penalty: float | None = option(
        "Subtracted from the reward of a completion that ends with neither EOS nor a --stop text.", unset="none", ge=0
    )
    value_learning_rate: float | None = option(
        "Peak learning rate of the value model, with --algorithm reinforce.", unset="same as --learning-rate", gt=0
    )


@dataclass(frozen=True)
class EvalSettings:
    """Evaluation"""

    max_samples: int | None = option("Evaluate on at most this many rows.", unset="all; 256 prompts for a policy", gt=0)
    per_device_eval_batch_size: int | None = option("Batch size per device.", unset="{}", gt=0)
    skip_trained: bool = flag("Leave out rows whose prompt the model was trained on, in any of its stages.")

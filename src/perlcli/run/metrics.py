"""Every metric of every stage, declared once: TRL's key, our name, better direction, and where it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Better = Literal["", "higher", "lower"]

STEP, STEP_CPU = "seconds/step", "seconds/step_cpu"  # of a step: wall clock, and CPU time of the process

BY_LENGTH = "reward_by_length"  # of a step of rl: correlation of reward with length within prompts


@dataclass(frozen=True)
class Metric:
    """A metric of a stage."""

    name: str = ""  # in the record's `metrics`; empty for one that is only logged at each step
    key: str = ""  # in `metrics.jsonl`, as the trainer logs it; empty for one that is only measured at the end
    label: str = ""  # for people; empty for the name with spaces
    is_share: bool = False  # shown in per cent
    better: Better = ""  # set for a metric that comparisons show
    headline: bool = False  # the one that a stage is judged by, if the run has it
    live: str = ""  # how the progress line formats it; empty for one that the line leaves out
    panel: str = ""  # title of its learning curve; empty for none

    @property
    def words(self) -> str:
        """The metric's name for people."""
        return self.label or words(self.name or self.key)


METRICS: dict[str, tuple[Metric, ...]] = {
    "sft": (
        Metric("eval_loss", "eval_loss", better="lower", headline=True),
        Metric("eval_token_accuracy", "eval_mean_token_accuracy", is_share=True, better="higher"),
        Metric("train_loss", "loss", "loss", better="lower", live="{:.3f}", panel="loss"),
        Metric("", "mean_token_accuracy", "token accuracy", is_share=True, live="{:.1%}", panel="token accuracy"),
    ),
    "reward": (
        # of thumbs, whose accuracy says little: one label is usually rare; pairs don't have it
        Metric("balanced_accuracy", is_share=True, better="higher", headline=True),
        Metric("accuracy", is_share=True, better="higher", headline=True),
        Metric("auc", better="higher"),
        Metric("", "loss", live="{:.3f}", panel="loss"),
        Metric("", "accuracy", is_share=True, live="{:.1%}", panel="accuracy on the batch"),
        Metric("", "running_auc", "AUC of the last 256 rows", live="{:.3f}", panel="AUC of the last 256 rows"),
        Metric("accuracy_if_longer", label="accuracy where the better answer is longer", is_share=True),
        Metric("accuracy_if_shorter", label="accuracy where the better answer is shorter", is_share=True),
        Metric("longer_wins", label="accuracy of preferring the longer answer", is_share=True),
        Metric("longer_auc", label="AUC of preferring the longer answer"),
        Metric("majority_accuracy", label="accuracy of the more frequent label", is_share=True),
        Metric("accuracy_over_majority", label="accuracy over the more frequent label", is_share=True),
        Metric("train_accuracy", label="accuracy on training pairs", is_share=True),
        Metric("train_auc", label="AUC on training rows"),
        Metric("train_share_thumbs_up", is_share=True),
        Metric("share_thumbs_up", is_share=True),
        Metric("share_ties", is_share=True),
    ),
    "rl": (
        Metric("reward", "reward", better="higher", live="{:.3f}", panel="reward"),
        Metric("kl_per_token", "kl", "KL/token", better="lower", live="{:.4f}", panel="KL to the anchor, per token"),
        Metric(
            "completion_length",
            "completions/mean_length",
            "length",
            better="higher",
            live="{:.1f}",
            panel="completion length, tokens",
        ),
        Metric("share_truncated", "completions/clipped_ratio", "truncated", is_share=True, live="{:.1%}"),
        Metric("gold", "gold", is_share=True, better="higher", headline=True, panel="gold success"),
        Metric("reward_by_length", BY_LENGTH, "correlation of reward with length"),
        Metric("value_explained", "value/explained"),
    ),
    "eval": (
        Metric("balanced_accuracy", is_share=True, better="higher", headline=True),
        Metric("accuracy", is_share=True, better="higher", headline=True),
        Metric("gold", is_share=True, better="higher"),
        Metric("mean_reward", better="higher"),
        Metric("net_win_rate", is_share=True, better="higher"),
        Metric("mean_reward_difference", better="higher"),
        Metric("gold_difference", is_share=True, better="higher"),
        Metric("loss", better="lower"),
        Metric("wins", is_share=True),
        Metric("ties", is_share=True),
        Metric("losses", is_share=True),
        Metric("anchor_gold", is_share=True),
        Metric("anchor_share_truncated", is_share=True),
        Metric("distinct_1", is_share=True),
        Metric("distinct_2", is_share=True),
    ),
    "compare-full": (),
    "merge": (
        Metric("share_same_token", is_share=True, headline=True),
        Metric("share_same_token_as_trained", is_share=True),
        Metric("share_same_order_as_trained", is_share=True),
    ),
    "quickstart": (
        Metric("rl_gold", is_share=True, headline=True),
        Metric("base_gold", is_share=True),
        Metric("sft_gold", is_share=True),
        Metric("reward_accuracy", is_share=True),
    ),
}
OF_RL = "eval_"  # before the names of eval's metrics in the record of rl
SHARES = {name for metrics in METRICS.values() for m in metrics if m.is_share for name in (m.name, m.key)} - {""}
MEASURED = ("reward", "rl")  # the stages whose labels are used wherever a metric's name is
LABELS = {m.name: m.label for stage in MEASURED for m in METRICS[stage] if m.name and m.label and not m.live}


def panels(stage: str) -> list[Metric]:
    """The metrics whose learning curves are drawn, in order."""
    return [metric for metric in METRICS.get(stage, ()) if metric.panel]


def compared(stage: str) -> list[Metric]:
    """The metrics that a comparison shows, the headline first."""
    shown = (metric for metric in METRICS.get(stage, ()) if metric.better)
    return sorted(shown, key=lambda metric: not metric.headline)


def judged_by(stage: str) -> Iterator[str]:
    """The names under which a stage's key figure may be found in its record or its last step, the best first."""
    known = METRICS.get(stage, ())
    yield from (metric.name for metric in known if metric.headline)
    yield from (metric.name for metric in compared(stage))
    yield from (metric.key for metric in known if metric.live)


def renamed(stage: str, *, prefix: str = "") -> dict[str, str]:
    """Our name for each of TRL's keys that start with `prefix`."""
    return {m.key: m.name for m in METRICS[stage] if m.key and m.name and m.key.startswith(prefix)}


def words(name: str) -> str:
    """A metric's name for people."""
    if name in LABELS:
        return LABELS[name]
    return name.replace("_", " ").replace("kl ", "KL ").replace("auc", "AUC")


def is_share(name: str) -> bool:
    """Whether the metric of this name, in a record or a step, is a share; also for the bounds of its interval."""
    bare = name.removesuffix("_low").removesuffix("_high")
    return bare in SHARES or bare.removeprefix(OF_RL) in SHARES

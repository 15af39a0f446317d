"""How good a policy is: what it and its anchor answer to the same held-out prompts, judged pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from statistics import fmean

from peft import PeftModel

from perlcli import data, paired, settings, stats
from perlcli.model import log_probs
from perlcli.model.roles import Model
from perlcli.paired import Difference
from perlcli.rollouts import engines
from perlcli.rollouts.engines import Engine
from perlcli.rollouts.how import Ids, Sampling
from perlcli.rollouts.stops import Ends
from perlcli.run.progress import Progress
from perlcli.text import counted
from perlcli.training.judge import Asked
from perlcli.training.prepare import Prepared
from perlcli.training.reward_errors import SKIP
from perlcli.training.rewards import Weighted

NET, GOLD, REWARD = "net_win_rate", "gold_difference", "mean_reward_difference"
# Replies to "better than its anchor", by the sign of the interval.
REPLIES = {1: "yes", 0: "can't say from {count}", -1: "no, it is worse"}
MIXED = {
    1: "can't say, as it wins more prompts but its mean reward is lower",
    -1: "can't say, as it loses more prompts but its mean reward is higher",
}


@dataclass(frozen=True)
class Opponent:
    """The model that a policy is compared with, its anchor: `words` say which, and inside `model()` it is loaded."""

    words: str
    model: Callable[[], AbstractContextManager[Model]]


@dataclass(frozen=True)
class Exam:
    """Held-out prompts, and how every policy answers them: by the same sampling and seed, in batches of `size`."""

    prepared: Prepared[settings.Eval | settings.Rl]
    prompts: Sequence[Asked]
    how: Sampling
    size: int
    engine: Engine | None = None  # samples, if not the model in memory

    @property
    def ends(self) -> Ends:
        """Where completions end."""
        return Ends(self.prepared.renderer, self.how.stop)

    @property
    def ids(self) -> list[Ids]:
        """The token ids of the prompts."""
        return [ids for _, ids in self.prompts]


@dataclass
class Samples:
    """What one policy wrote to the prompts and how it was judged; `rewards` and `gold` can be empty."""

    written: list[Ids]
    texts: list[str]
    rewards: list[float]  # NaN for a completion that is skipped
    gold: list[bool]

    @property
    def known(self) -> list[float]:
        """The rewards without those of skipped completions."""
        return [reward for reward in self.rewards if not math.isnan(reward)]


@dataclass(frozen=True)
class Result:
    """What an exam found, and the samples that it is based on; no `anchor` for a base model."""

    metrics: dict[str, float]
    policy: Samples
    anchor: Samples | None = None
    verdicts: list[str] = field(default_factory=list)


def examine(exam: Exam, model: Model, score: Weighted | None, opponent: Opponent | None) -> Result:
    """The figures of a policy on held-out prompts, and of its opponent next to them. Raises PerlError for a completion
    that can't be scored, unless --on-reward-error says otherwise."""
    mine = answer(exam, model, score)
    if opponent is None:
        return Result(measure(exam, mine, None), mine)
    with opponent.model() as reference:
        is_on_base = reference is model or isinstance(reference, PeftModel)  # an engine has only the policy's base
        theirs = answer(exam if is_on_base else replace(exam, engine=None), reference, score)
    share_rewards(mine, theirs)
    metrics = measure(exam, mine, theirs) | divergence(exam, model, opponent, mine.written)
    return Result(metrics, mine, theirs, verdicts(metrics, mine, theirs, opponent.words))


def answer(exam: Exam, model: Model, score: Weighted | None) -> Samples:
    """One sampled completion for each prompt, scored; the seed is the same for every policy."""
    render, rows = exam.prepared.renderer, [row for row, _ in exam.prompts]
    written: list[Ids] = []
    with Progress("eval", len(rows)) as progress:
        for batch in engines.sample_batches(exam.engine, model, render, exam.ids, exam.how, exam.size):
            written += batch
            progress.update(len(written), {})
    read = [exam.ends.answer(completion) for completion in written]
    texts = [render.text(completion) for completion in read]
    checks = [data.gold_check(row) for row in rows]
    gold = [check(text) for check, text in zip(checks, texts, strict=True) if check]
    if score is None:
        return Samples(written, texts, [], gold)
    scored = score(rows, read)
    if scored.faults:
        count = f"{len(scored.faults)} of {len(rows)} completions"
        decision = exam.prepared.settings.sampling.on_reward_error
        what = "are left out" if decision == SKIP else f"got {float(decision):g}"
        first = next(iter(scored.faults.values()))
        exam.prepared.run.note(f"The reward could not score {count}, which {what}: {first}")
    return Samples(written, texts, scored.total, gold)


def share_rewards(policy: Samples, anchor: Samples) -> None:
    """Give the anchor's completions that equal the policy's the same reward: scored in another batch it differs by
    rounding, by 0.02 in bfloat16, which would be a win or a loss."""
    if not policy.rewards:
        return
    for index, (mine, theirs) in enumerate(zip(policy.written, anchor.written, strict=True)):
        if mine == theirs:
            anchor.rewards[index] = policy.rewards[index]


def measure(exam: Exam, policy: Samples, anchor: Samples | None) -> dict[str, float]:
    """The policy's figures, and the anchor's where the two can be compared."""
    metrics = {"prompts": len(policy.written), **_quality(policy, "")}
    if anchor is not None:
        metrics |= _quality(anchor, "anchor_") | compare(exam.prompts, policy, anchor)
    for prefix, samples in (("", policy), ("anchor_", anchor)):
        if samples is not None:
            metrics[f"{prefix}mean_length"] = fmean(map(len, samples.written))
            cut = (not exam.ends.ended(ids) for ids in samples.written)
            metrics[f"{prefix}share_truncated"] = fmean(cut)
    return metrics | {f"distinct_{n}": stats.distinct(policy.written, n) for n in (1, 2)}


def _quality(samples: Samples, prefix: str) -> dict[str, float]:
    metrics = {}
    if samples.known:
        metrics[f"{prefix}mean_reward"] = fmean(samples.known)
    if samples.gold:
        low, high = stats.wilson(sum(samples.gold), len(samples.gold))
        metrics |= {f"{prefix}gold": fmean(samples.gold), f"{prefix}gold_low": low, f"{prefix}gold_high": high}
    return metrics


def compare(prompts: Sequence[Asked], policy: Samples, anchor: Samples) -> dict[str, float]:
    """Wins, ties and losses of the policy by the reward, and the paired differences of reward and gold success. Pairs
    of the same prompt count as one cluster."""
    places = [tuple(ids) for _, ids in prompts]
    both = zip(places, policy.rewards, anchor.rewards, strict=True) if policy.rewards else ()
    pairs = [(place, a, b) for place, a, b in both if not math.isnan(a) and not math.isnan(b)]
    metrics: dict[str, float] = {}
    if pairs:
        groups, signs = [place for place, _, _ in pairs], [paired.sign_of(a, b) for _, a, b in pairs]
        for name, one, sign in (("wins", "won", 1), ("ties", "tied", 0), ("losses", "lost", -1)):
            metrics |= {name: signs.count(sign) / len(signs), f"prompts_{one}": signs.count(sign)}
        metrics |= paired.net_share(signs, groups).named(NET)
        metrics |= _named(REWARD, paired.mean_difference([a - b for _, a, b in pairs], groups))
    if policy.gold:
        checked = [place for place, (row, _) in zip(places, prompts, strict=True) if data.gold_check(row)]
        signs = [paired.sign_of(a, b) for a, b in zip(policy.gold, anchor.gold, strict=True)]
        metrics |= paired.net_share(signs, checked).named(GOLD)
    return metrics


def _named(name: str, difference: Difference | None) -> dict[str, float]:
    return {} if difference is None else difference.named(name)


def verdicts(metrics: Mapping[str, float], policy: Samples, anchor: Samples, opponent: str) -> list[str]:
    """Whether the policy is better than its opponent: a sentence for each way in which it was judged."""
    count = counted(len(policy.written), "prompt")
    if policy.written == anchor.written:
        return [f"The policy wrote the same as its anchor ({opponent}) to {count}."]
    gold, net, reward = (difference_of(metrics, name) for name in (GOLD, NET, REWARD))
    found = []
    if gold is not None:
        reply = REPLIES[gold.sign].format(count=count)
        found.append(f"Better than its anchor ({opponent}) by the data's own check: {reply}; {_words(GOLD, gold)}.")
    if net is not None:
        is_mixed = reward is not None and reward.sign * net.sign < 0
        reply = MIXED[net.sign] if is_mixed else REPLIES[net.sign].format(count=count)
        found.append(f"Better than its anchor ({opponent}) by the reward: {reply}; {_words(NET, net)}.")
    return found


def _words(name: str, difference: Difference) -> str:
    figures = f"{difference.value:.1%} (95 % interval {difference.low:.1%} to {difference.high:.1%})"
    return f"{name.replace('_', ' ')} {figures}"


def difference_of(metrics: Mapping[str, float], name: str) -> Difference | None:
    """A paired difference among the metrics; None if it was not measured."""
    if f"{name}_low" not in metrics:
        return None
    return Difference(metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"])


def divergence(exam: Exam, model: Model, opponent: Opponent, written: Sequence[Ids]) -> dict[str, float]:
    """KL(policy || anchor) at the sampling temperature, estimated on what the policy wrote: k1 is the mean log-ratio,
    which is unbiased; k3 = ratio - 1 - log-ratio has a lower variance and is never negative (Schulman, "Approximating
    KL divergence", 2020). Both are per token, over all tokens, and per completion."""
    ours = log_probs.log_probs(model, exam.ids, written, exam.how.temperature, exam.size)
    with opponent.model() as reference:
        theirs = log_probs.log_probs(reference, exam.ids, written, exam.how.temperature, exam.size)
    k1, k3, tokens = 0.0, 0.0, 0
    for mine, other in zip(ours, theirs, strict=True):
        log_ratios = [a - b for a, b in zip(mine, other, strict=True)]
        k1 += sum(log_ratios)
        k3 += sum(math.expm1(-log_ratio) + log_ratio for log_ratio in log_ratios)
        tokens += len(log_ratios)
    sums, counts = {"k1": k1, "k3": k3}, {"token": tokens, "sequence": len(exam.prompts)}
    return {f"kl_{kind}_per_{unit}": sums[kind] / counts[unit] for kind in sums for unit in counts}

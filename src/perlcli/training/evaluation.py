"""Compares a policy with its anchor on held-out prompts: what both write, how it scores, and the KL between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from perlcli import data, settings, stats
from perlcli.model import loading, roles, sources
from perlcli.run.progress import Progress
from perlcli.training import policies, sampling
from perlcli.training.judge import Asked, Score
from perlcli.training.prepare import Prepared, filled
from perlcli.training.sampling import Ids, Model, Sampling

Anchor = Callable[[], AbstractContextManager[Model]]  # inside the context, the model is the anchor


@dataclass
class Samples:
    """What one policy wrote to the prompts and how it was judged; `rewards` and `gold` can be empty."""

    written: list[Ids]
    texts: list[str]
    rewards: list[float]
    gold: list[bool]


def load_policy(prepared: Prepared[settings.Eval], *, is_shared: bool) -> tuple[Model, Anchor | None]:
    """The policy and its anchor, None for a base; `is_shared` if a reward will be an adapter on the policy's base."""
    source, note = prepared.source, prepared.run.note
    base = loading.load_causal(source, prepared.settings.model)
    if source.adapter is not None:
        policy = roles.load_adapter(base, source.adapter, trainable=False)
        name, words = policies.attach_anchor(policy, source)
        note(f"anchor: {words}")
        policy.eval()
        return policy, lambda: _switched(policy, name)
    model = with_empty_adapter(base) if is_shared else base
    model.eval()
    start = policies.start_of(source.base)
    if start is None:
        note("anchor: none (the policy is a base model)")
        return model, None
    note(f"anchor: {start}, loaded next to the policy, which was fully fine-tuned")
    trust = prepared.settings.model.trust_remote_code
    anchor = loading.load_causal(sources.locate(start, trust_remote_code=trust), prepared.settings.model)
    anchor.eval()
    return model, lambda: nullcontext(anchor)


def with_empty_adapter(base: PreTrainedModel) -> PeftModel:
    """The base with a new adapter, which changes nothing: a reward adapter needs another one to switch back to."""
    lora = settings.LoraSettings(lora_r=1, lora_alpha=1, lora_dropout=0.0, lora_target_modules="attention")
    return roles.new_adapter(base, lora, "CAUSAL_LM")


@contextmanager
def _switched(policy: PeftModel, adapter: str | None) -> Iterator[Model]:
    with roles.switched(policy, adapter):
        yield policy


def answer(prepared: Prepared[settings.Eval], model: Model, prompts: Sequence[Asked], score: Score | None) -> Samples:
    """One sampled completion for each prompt, scored; the seed is the same for every policy."""
    values = prepared.settings
    longest = filled(values.sampling.max_completion_length)
    how = Sampling(filled(values.sampling.temperature), longest, values.run.seed)
    rows, ids = [row for row, _ in prompts], [ids for _, ids in prompts]
    written: list[Ids] = []
    with Progress("eval", len(prompts)) as progress:
        size = filled(values.eval.per_device_eval_batch_size)
        for batch in sampling.sample_batches(model, prepared.renderer, ids, how, size):
            written += batch
            progress.update(len(written), {})
    texts = [prepared.renderer.text(completion) for completion in written]
    checks = [data.gold_check(row) for row in rows]
    gold = [check(text) for check, text in zip(checks, texts, strict=True) if check]
    return Samples(written, texts, score(rows, written).total if score else [], gold)


def measure(prepared: Prepared[settings.Eval], policy: Samples, anchor: Samples | None) -> dict[str, float]:
    """The policy's figures, and the anchor's where the two can be compared."""
    metrics = {"prompts": len(policy.written), **_quality(policy, "")}
    if anchor is not None:
        metrics |= _quality(anchor, "anchor_") | _wins(policy.rewards, anchor.rewards)
    metrics["mean_length"] = fmean(map(len, policy.written))
    metrics["share_truncated"] = fmean(not prepared.renderer.ended(ids) for ids in policy.written)
    return metrics | {f"distinct_{n}": stats.distinct(policy.written, n) for n in (1, 2)}


def _quality(samples: Samples, prefix: str) -> dict[str, float]:
    metrics = {}
    if samples.rewards:
        metrics[f"{prefix}mean_reward"] = fmean(samples.rewards)
    if samples.gold:
        low, high = stats.wilson(sum(samples.gold), len(samples.gold))
        metrics |= {f"{prefix}gold": fmean(samples.gold), f"{prefix}gold_low": low, f"{prefix}gold_high": high}
    return metrics


def _wins(policy: Sequence[float], anchor: Sequence[float]) -> dict[str, float]:
    """The share of prompts at which the policy's reward is higher than the anchor's, and the share of ties."""
    if not policy:
        return {}
    pairs, count = list(zip(policy, anchor, strict=True)), len(policy)
    wins = sum(mine > theirs for mine, theirs in pairs)
    low, high = stats.wilson(wins, count)
    ties = sum(mine == theirs for mine, theirs in pairs)
    return {"wins": wins / count, "wins_low": low, "wins_high": high, "share_ties": ties / count}


@torch.no_grad()
def divergence(
    prepared: Prepared[settings.Eval], model: Model, anchor: Anchor, prompts: Sequence[Ids], written: Sequence[Ids]
) -> dict[str, float]:
    """KL(policy || anchor) at the sampling temperature, estimated on what the policy wrote.

    k1 is the mean log-ratio, which is unbiased; k3 = ratio - 1 - log-ratio has a lower variance and is never negative
    (Schulman, "Approximating KL divergence", 2020). Both are per token, over all tokens, and per completion.
    """
    size = filled(prepared.settings.eval.per_device_eval_batch_size)
    temperature = filled(prepared.settings.sampling.temperature)
    k1, k3, tokens = 0.0, 0.0, 0
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        ours = sampling.log_probs(model, prompts[part], written[part], temperature)
        with anchor() as reference:
            theirs = sampling.log_probs(reference, prompts[part], written[part], temperature)
        for mine, other in zip(ours, theirs, strict=True):
            log_ratios = [a - b for a, b in zip(mine, other, strict=True)]
            k1 += sum(log_ratios)
            k3 += sum(math.expm1(-log_ratio) + log_ratio for log_ratio in log_ratios)
            tokens += len(log_ratios)
    return {
        "kl_k1_per_token": k1 / tokens,
        "kl_k1_per_sequence": k1 / len(prompts),
        "kl_k3_per_token": k3 / tokens,
        "kl_k3_per_sequence": k3 / len(prompts),
    }

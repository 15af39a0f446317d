"""`perl eval`: a reward model on held-out preferences, or a policy against its anchor on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from perlcli import data, device, settings, stats
from perlcli.data import Data, Prompt
from perlcli.errors import PerlError
from perlcli.model import loading, roles, sources
from perlcli.run import plots
from perlcli.run.files import SAMPLES
from perlcli.run.lifecycle import recording
from perlcli.run.progress import Progress
from perlcli.run.record import RunRecord
from perlcli.terminal import say
from perlcli.training import policies, reward_model, sampling
from perlcli.training import rewards as rewards_module
from perlcli.training.prepare import Prepared, filled, prepare
from perlcli.training.preview import preview
from perlcli.training.rows import first_rows, load_data, trained_on
from perlcli.training.sampling import Sampling

PROMPTS, SAMPLED = 256, 20
Ids = list[int]
Anchor = Callable[[], AbstractContextManager[Any]]


def run(given: settings.Eval) -> RunRecord | None:
    """Measure what `--model` is: a reward model or a policy; None for a dry run."""
    prepared = prepare(given)
    action = evaluate_reward if prepared.source.is_classifier else evaluate_policy
    if prepared.source.is_classifier and prepared.settings.sampling.reward:
        problem = f"--model {prepared.source.name} is a reward model: --reward is for judging a policy"
        if prepared.settings.recipe.recipe is None:
            raise PerlError(problem)
        prepared.run.note(f"{problem}, so the recipe's is left out")
    return action(prepared)


def load_held_out(prepared: Prepared[settings.Eval], use: str, limit: int | None) -> Data:
    """The first rows of the held-out data, `limit` at most; the report tells which prompts the model was trained on."""
    found = first_rows(prepared, load_data(prepared, use, "test"), limit, "--max-samples")
    if trained := trained_on(prepared.source):
        found.report.overlap = data.prompts(found).found_in(data.unpacked(trained))
    return found


def evaluate_reward(prepared: Prepared[settings.Eval]) -> RunRecord | None:
    """Accuracy, AUC, balanced accuracy, margin and the correlation of score with length."""
    held_out = load_held_out(prepared, "reward", prepared.settings.eval.max_samples)
    rows = reward_model.tokens(held_out, prepared, "eval")
    if prepared.is_dry:
        preview(prepared)
        return None
    with recording(prepared.run) as run:
        scorer = reward_model.load(prepared.source, prepared.settings.model)
        reward_model.check_proof(prepared.source, scorer, run, prepared.settings.model)
        run.record.total_parameters = roles.count_parameters(scorer.model)[1]
        run.record.metrics = reward_model.measure(prepared, scorer, rows, held_out)
        run.record.peak_memory_mb = device.peak_memory_mb()
    return run.record


@dataclass
class Samples:
    """What one policy wrote to the prompts, and what the reward thinks of it."""

    written: list[Ids]
    texts: list[str]
    rewards: list[float]
    gold: list[bool]


def evaluate_policy(prepared: Prepared[settings.Eval]) -> RunRecord | None:
    """Reward, share of prompts won against the anchor, KL to it, lengths, truncation, distinct-n and gold success."""
    values = prepared.settings
    held_out = load_held_out(prepared, "rl", values.eval.max_samples or PROMPTS)
    fitting = policies.fitting_prompts(prepared, held_out, "eval")
    rows, prompts = [row for row, _ in fitting], [ids for _, ids in fitting]
    has_gold = all(data.gold_check(row) for row in rows)
    found = rewards_module.find_all(prepared) if values.sampling.reward or not has_gold else []
    if prepared.is_dry:
        preview(prepared)
        return None
    with recording(prepared.run) as run:
        model, anchor = load_policy(prepared, is_shared=any(reward.is_shared for reward in found))
        score = (
            rewards_module.attach_all(found, model, prepared, filled(values.eval.per_device_eval_batch_size))
            if found
            else None
        )
        run.record.total_parameters = roles.count_parameters(model)[1]
        mine = answer(prepared, model, prompts, rows, score)
        theirs = None
        if anchor is not None:
            with anchor() as standing:
                theirs = answer(prepared, standing, prompts, rows, score)
        run.record.metrics = measure(mine, theirs, prepared)
        if anchor is not None:
            run.record.metrics |= divergence(prepared, model, anchor, prompts, mine.written)
        show(prepared, rows, mine, theirs)
        run.record.peak_memory_mb = device.peak_memory_mb()
    return run.record


def load_policy(prepared: Prepared[settings.Eval], *, is_shared: bool) -> tuple[Any, Anchor | None]:
    """The policy, and a context that gives its anchor; None for a policy without one."""
    source, values = prepared.source, prepared.settings
    model: Any = loading.load_causal(source, values.model)
    if source.adapter is None:
        start = policies.start_of(source.base)
        if is_shared:  # a reward adapter needs a policy adapter beside it to switch from; a new one changes nothing
            lora = settings.LoraSettings(lora_r=1, lora_alpha=1, lora_dropout=0.0, lora_target_modules="attention")
            model = roles.new_adapter(model, lora, "CAUSAL_LM")
        if start is None:
            prepared.run.note("anchor: none, the policy is a base")
            return model.eval(), None
        prepared.run.note(f"anchor: {start}, loaded beside the policy, which was tuned in full")
        beside = loading.load_causal(
            sources.locate(start, trust_remote_code=values.model.trust_remote_code), values.model
        ).eval()
        return model.eval(), lambda: nullcontext(beside)
    model = roles.load_adapter(model, source.adapter, trainable=False)
    name, words = policies.attach_anchor(model, source)
    prepared.run.note(f"anchor: {words}")

    @contextmanager
    def anchor() -> Iterator[Any]:
        with roles.switched(model, name):
            yield model

    return model.eval(), anchor


def answer(
    prepared: Prepared[settings.Eval], model: Any, prompts: list[Ids], rows: Sequence[Prompt], score: Any
) -> Samples:
    """One sampled completion for each prompt, scored; the same seed for every policy."""
    values = prepared.settings
    size = filled(values.eval.per_device_eval_batch_size)
    written: list[Ids] = []
    with Progress("eval", len(prompts)) as progress:
        for start in range(0, len(prompts), size):
            longest = filled(values.sampling.max_completion_length)
            how = Sampling(filled(values.sampling.temperature), longest, values.run.seed + start)
            written += sampling.sample(model, prepared.renderer, prompts[start : start + size], how)
            progress.update(len(written), {})
    texts = [prepared.renderer.text(ids) for ids in written]
    checks = [data.gold_check(row) for row in rows]
    gold = [check(text) for check, text in zip(checks, texts, strict=True) if check]
    return Samples(written, texts, score(rows, written).total if score else [], gold)


def measure(mine: Samples, theirs: Samples | None, prepared: Prepared[settings.Eval]) -> dict[str, float]:
    """The policy's figures, and the anchor's beside those that can be held against each other."""
    metrics = {"prompts": len(mine.written), **_quality(mine, "")}
    if theirs is not None:
        metrics |= _quality(theirs, "anchor_")
        if mine.rewards:
            wins = sum(a > b for a, b in zip(mine.rewards, theirs.rewards, strict=True))
            ties = sum(a == b for a, b in zip(mine.rewards, theirs.rewards, strict=True))
            low, high = stats.wilson(wins, len(mine.rewards))
            metrics |= {
                "wins": wins / len(mine.rewards),
                "wins_low": low,
                "wins_high": high,
                "share_ties": ties / len(mine.rewards),
            }
    lengths = [len(ids) for ids in mine.written]
    metrics["mean_length"] = fmean(lengths)
    metrics["share_truncated"] = fmean(not prepared.renderer.ended(ids) for ids in mine.written)
    metrics |= {f"distinct_{n}": stats.distinct(mine.written, n) for n in (1, 2)}
    return metrics


def _quality(samples: Samples, prefix: str) -> dict[str, float]:
    metrics = {}
    if samples.rewards:
        metrics[f"{prefix}mean_reward"] = fmean(samples.rewards)
    if samples.gold:
        low, high = stats.wilson(sum(samples.gold), len(samples.gold))
        metrics |= {f"{prefix}gold": fmean(samples.gold), f"{prefix}gold_low": low, f"{prefix}gold_high": high}
    return metrics


@torch.no_grad()
def divergence(
    prepared: Prepared[settings.Eval], model: Any, anchor: Anchor, prompts: list[Ids], written: list[Ids]
) -> dict[str, float]:
    """KL(policy || anchor) at the sampling temperature, estimated on what the policy wrote.

    k1 is the mean log ratio, unbiased; k3 = ratio - 1 - log ratio, of lower variance and never negative
    (Schulman, "Approximating KL divergence", 2020). Per token is over all tokens, per sequence over completions.
    """
    size = filled(prepared.settings.eval.per_device_eval_batch_size)
    heat = filled(prepared.settings.sampling.temperature)
    k1, k3, tokens = 0.0, 0.0, 0
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        ours = sampling.log_probs(model, prompts[part], written[part], heat)
        with anchor() as standing:
            theirs = sampling.log_probs(standing, prompts[part], written[part], heat)
        for mine, other in zip(ours, theirs, strict=True):
            gaps = [a - b for a, b in zip(mine, other, strict=True)]
            k1 += sum(gaps)
            k3 += sum(math.expm1(-gap) + gap for gap in gaps)
            tokens += len(gaps)
    return {
        "kl_k1_per_token": k1 / tokens, "kl_k1_per_sequence": k1 / len(prompts),
        "kl_k3_per_token": k3 / tokens, "kl_k3_per_sequence": k3 / len(prompts),
    }  # fmt: skip


def show(prepared: Prepared[settings.Eval], rows: Sequence[Prompt], mine: Samples, theirs: Samples | None) -> None:
    """Keep some samples side by side, print three, and draw the rewards."""
    folder = prepared.run.folder
    for index in range(min(SAMPLED, len(rows))):
        sample: dict[str, Any] = {"prompt": data.text_of(rows[index].prompt), "policy": mine.texts[index]}
        for name, samples in (("policy", mine), ("anchor", theirs)):
            if samples is None:
                continue
            sample[name] = samples.texts[index]
            if samples.rewards:
                sample[f"{name}_reward"] = round(samples.rewards[index], 4)
        prepared.run.append(SAMPLES, sample)
        if index < 3:
            say("\n" + "\n".join(f"  {key}: {str(value)[-300:]}" for key, value in sample.items()))
    say()
    groups = {"policy": mine.rewards, **({"anchor": theirs.rewards} if theirs else {})}
    if mine.rewards:
        plots.histogram(groups, "Rewards on held-out prompts", "reward", folder / "plots" / "rewards.png")

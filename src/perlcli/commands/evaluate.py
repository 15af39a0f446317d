"""`perl eval`: a reward model on held-out preferences, or a policy against its anchor on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean

from peft import PeftModel

from perlcli import data, settings, stats
from perlcli.errors import PerlError
from perlcli.model import loading, roles, sources
from perlcli.model.labels import OPTION, Label, choose
from perlcli.run import files, peaks, plots
from perlcli.run.lifecycle import recording
from perlcli.run.progress import Progress
from perlcli.run.record import RunRecord
from perlcli.terminal import say
from perlcli.text import shorten
from perlcli.training import policies, reward_model, sampling
from perlcli.training.guards import Model
from perlcli.training.judge import Asked
from perlcli.training.prepare import Prepared, filled, prepare, preview
from perlcli.training.reward_errors import KWARGS, SKIP
from perlcli.training.rewards import Weighted, attach_all, find_all
from perlcli.training.rows import load_data, trained_on
from perlcli.training.sampling import Ids, Sampling

SAMPLED, PRINTED, WIDTH = 20, 3, 300  # samples to keep, of those to print, and how many characters of each text
Anchor = Callable[[], AbstractContextManager[Model]]  # inside the context, the model is the anchor


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


def run(given: settings.Eval) -> RunRecord | None:
    """Measure what `--model` is: a reward model or a policy; None for a dry run."""
    prepared = prepare(given)
    if not prepared.source.is_classifier:
        return evaluate_policy(prepared)
    if prepared.settings.sampling.reward:
        problem = f"--model {prepared.source.name} is a reward model; --reward only applies to policies"
        if prepared.settings.recipe.recipe is None:
            raise PerlError(problem)
        prepared.run.note(f"{problem}, so the recipe's is ignored")
    return evaluate_reward(prepared)


def evaluate_reward(prepared: Prepared[settings.Eval]) -> RunRecord | None:
    """Accuracy, AUC, balanced accuracy, margin and the correlation of score with length."""
    label = chosen_label(prepared)
    held_out = load_held_out(prepared, "reward")
    rows = reward_model.tokens(held_out, prepared, "eval")
    if prepared.is_dry:
        preview(prepared)
        return None
    with recording(prepared.run) as run:
        scorer = reward_model.load(prepared.source, prepared.settings.model, label.index)
        reward_model.check_proof(prepared.source, scorer, run, prepared.settings.model)
        run.record.total_parameters = roles.count_parameters(scorer.model)[1]
        run.record.metrics = reward_model.measure(prepared, scorer, rows)
        run.record.peak_memory_mb = peaks.peak_mb()
    return run.record


def chosen_label(prepared: Prepared[settings.Eval]) -> Label:
    """The label of the reward model that is measured. Raises PerlError if one of several must be named."""
    given = prepared.settings.sampling.reward_label
    if len(given) > 1:
        raise PerlError(f"{OPTION} must be given once for --model, not {len(given)} times")
    label = choose(given[0] if given else None, prepared.source, f"--model {prepared.source.name}")
    if label.words:
        prepared.run.note(f"The score of {prepared.source.name} is {label.words}.")
    return label


def evaluate_policy(prepared: Prepared[settings.Eval]) -> RunRecord | None:
    """Reward, share of prompts won against the anchor, KL to it, lengths, truncation, distinct-n and gold success."""
    wanted = prepared.settings.sampling
    for given, option in ((wanted.reward_label, OPTION), (wanted.reward_kwargs, KWARGS)):
        if given and not wanted.reward:
            raise PerlError(f"{option} {shorten(given[0])} is for a --reward, and none is given", "add --reward")
    held_out = load_held_out(prepared, "rl")
    prompts = policies.fitting_prompts(prepared, held_out, "eval")
    has_gold = all(data.gold_check(row) for row, _ in prompts)
    rewards = find_all(prepared) if wanted.reward or not has_gold else []
    if prepared.is_dry:
        preview(prepared)
        return None
    with recording(prepared.run) as run:
        model, anchor = load_policy(prepared, is_shared=any(reward.is_shared for reward in rewards))
        size = filled(prepared.settings.eval.per_device_eval_batch_size)
        score = attach_all(rewards, model, prepared, size) if rewards else None
        run.record.total_parameters = roles.count_parameters(model)[1]
        mine, theirs, kl = answer(prepared, model, prompts, score), None, {}
        if anchor is not None:
            with anchor() as reference:
                theirs = answer(prepared, reference, prompts, score)
            kl = divergence(prepared, model, anchor, [ids for _, ids in prompts], mine.written)
        run.record.metrics = measure(prepared, mine, theirs) | kl
        show_samples(prepared, prompts, mine, theirs)
        if mine.rewards:
            groups = {"policy": mine.known} | ({"anchor": theirs.known} if theirs is not None else {})
            with run.extra("The plots"):
                plots.histogram(groups, "Rewards on held-out prompts", "reward", run.folder / "plots" / "rewards.png")
        run.record.peak_memory_mb = peaks.peak_mb()
    return run.record


def load_held_out(prepared: Prepared[settings.Eval], use: str) -> data.Data:
    """The held-out rows; their report counts prompts that the model was trained on."""
    held_out = load_data(prepared, use, "test")
    if trained := trained_on(prepared.source):
        held_out.report.overlap = data.prompts(held_out).found_in(data.unpacked(trained))
    return held_out


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
    model: Model = base
    if is_shared:  # a reward adapter needs another one to switch back to; this one changes nothing
        lora = settings.LoraSettings(lora_r=1, lora_alpha=1, lora_dropout=0.0, lora_target_modules="attention")
        model = roles.new_adapter(base, lora, "CAUSAL_LM")
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


@contextmanager
def _switched(policy: PeftModel, adapter: str | None) -> Iterator[Model]:
    with roles.switched(policy, adapter):
        yield policy


def answer(
    prepared: Prepared[settings.Eval], model: Model, prompts: Sequence[Asked], score: Weighted | None
) -> Samples:
    """One sampled completion for each prompt, scored; the seed is the same for every policy."""
    values = prepared.settings
    how = Sampling(filled(values.sampling.temperature), filled(values.sampling.max_completion_length), values.run.seed)
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
    if score is None:
        return Samples(written, texts, [], gold)
    scored = score(rows, written)
    if scored.faults:
        count, decision = f"{len(scored.faults)} of {len(rows)} completions", values.sampling.on_reward_error
        what = "are left out" if decision == SKIP else f"got {float(decision):g}"
        first = next(iter(scored.faults.values()))
        prepared.run.note(f"The reward could not score {count}, which {what}: {first}")
    return Samples(written, texts, scored.total, gold)


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
        metrics[f"{prefix}mean_reward"] = fmean(samples.known)
    if samples.gold:
        low, high = stats.wilson(sum(samples.gold), len(samples.gold))
        metrics |= {f"{prefix}gold": fmean(samples.gold), f"{prefix}gold_low": low, f"{prefix}gold_high": high}
    return metrics


def _wins(policy: Sequence[float], anchor: Sequence[float]) -> dict[str, float]:
    """The share of prompts at which the policy's reward is higher than the anchor's, and the share of ties."""
    if not policy:
        return {}
    both = zip(policy, anchor, strict=True)
    pairs = [(mine, theirs) for mine, theirs in both if not math.isnan(mine) and not math.isnan(theirs)]
    if not pairs:
        return {}
    wins, ties = sum(mine > theirs for mine, theirs in pairs), sum(mine == theirs for mine, theirs in pairs)
    low, high = stats.wilson(wins, len(pairs))
    return {"wins": wins / len(pairs), "wins_low": low, "wins_high": high, "share_ties": ties / len(pairs)}


def divergence(
    prepared: Prepared[settings.Eval], model: Model, anchor: Anchor, prompts: Sequence[Ids], written: Sequence[Ids]
) -> dict[str, float]:
    """KL(policy || anchor) at the sampling temperature, estimated on what the policy wrote: k1 is the mean log-ratio,
    which is unbiased; k3 = ratio - 1 - log-ratio has a lower variance and is never negative (Schulman, "Approximating
    KL divergence", 2020). Both are per token, over all tokens, and per completion."""
    size = filled(prepared.settings.eval.per_device_eval_batch_size)
    temperature = filled(prepared.settings.sampling.temperature)
    ours = sampling.log_probs(model, prompts, written, temperature, size)
    with anchor() as reference:
        theirs = sampling.log_probs(reference, prompts, written, temperature, size)
    k1, k3, tokens = 0.0, 0.0, 0
    for mine, other in zip(ours, theirs, strict=True):
        log_ratios = [a - b for a, b in zip(mine, other, strict=True)]
        k1 += sum(log_ratios)
        k3 += sum(math.expm1(-log_ratio) + log_ratio for log_ratio in log_ratios)
        tokens += len(log_ratios)
    sums, counts = {"k1": k1, "k3": k3}, {"token": tokens, "sequence": len(prompts)}
    return {f"kl_{kind}_per_{unit}": sums[kind] / counts[unit] for kind in sums for unit in counts}


def show_samples(
    prepared: Prepared[settings.Eval], prompts: Sequence[Asked], mine: Samples, theirs: Samples | None
) -> None:
    """Keep some samples of policy and anchor next to each other, and print the first ones."""
    for index, (row, _) in enumerate(prompts[:SAMPLED]):
        sample: dict[str, str | float] = {"prompt": data.text_of(row.prompt)}
        for name, samples in (("policy", mine), ("anchor", theirs)):
            if samples is None:
                continue
            sample[name] = samples.texts[index]
            if samples.rewards and not math.isnan(samples.rewards[index]):
                sample[f"{name}_reward"] = round(samples.rewards[index], 4)
        prepared.run.append(files.SAMPLES, sample)
        if index < PRINTED:
            lines = [f"  {key.replace('_', ' ')}: {str(value)[-WIDTH:]}" for key, value in sample.items()]
            say("\n" + "\n".join(lines))
    say()

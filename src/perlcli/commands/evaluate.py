"""`perl eval`: a reward model on held-out preferences, or a policy against its anchor on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from perlcli import data, device, settings
from perlcli.data import Data
from perlcli.errors import PerlError
from perlcli.model import roles
from perlcli.run import plots
from perlcli.run.files import SAMPLES
from perlcli.run.lifecycle import recording
from perlcli.run.record import RunRecord
from perlcli.terminal import say
from perlcli.training import policies, reward_model
from perlcli.training.evaluation import Samples, answer, divergence, load_policy, measure
from perlcli.training.judge import Asked
from perlcli.training.prepare import Prepared, filled, prepare, preview
from perlcli.training.rewards import attach_all, find_all
from perlcli.training.rows import first_rows, load_data, trained_on

PROMPTS = 256  # to evaluate on unless --max-samples says otherwise
SAMPLED, PRINTED, WIDTH = 20, 3, 300  # samples to keep, of those to print, and how many characters of each text


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
    held_out = load_held_out(prepared, "reward", prepared.settings.eval.max_samples)
    rows = reward_model.tokens(held_out, prepared, "eval")
    if prepared.is_dry:
        preview(prepared)
        return None
    with recording(prepared.run) as run:
        scorer = reward_model.load(prepared.source, prepared.settings.model)
        reward_model.check_proof(prepared.source, scorer, run, prepared.settings.model)
        run.record.total_parameters = roles.count_parameters(scorer.model)[1]
        run.record.metrics = reward_model.measure(prepared, scorer, rows)
        run.record.peak_memory_mb = device.peak_memory_mb()
    return run.record


def evaluate_policy(prepared: Prepared[settings.Eval]) -> RunRecord | None:
    """Reward, share of prompts won against the anchor, KL to it, lengths, truncation, distinct-n and gold success."""
    prompts = load_prompts(prepared)
    has_gold = all(data.gold_check(row) for row, _ in prompts)
    rewards = find_all(prepared) if prepared.settings.sampling.reward or not has_gold else []
    if prepared.is_dry:
        preview(prepared)
        return None
    with recording(prepared.run) as run:
        model, anchor = load_policy(prepared, is_shared=any(reward.is_shared for reward in rewards))
        size = filled(prepared.settings.eval.per_device_eval_batch_size)
        score = attach_all(rewards, model, prepared, size) if rewards else None
        run.record.total_parameters = roles.count_parameters(model)[1]
        mine, theirs = answer(prepared, model, prompts, score), None
        if anchor is not None:
            with anchor() as reference:
                theirs = answer(prepared, reference, prompts, score)
        run.record.metrics = measure(prepared, mine, theirs)
        if anchor is not None:
            run.record.metrics |= divergence(prepared, model, anchor, [ids for _, ids in prompts], mine.written)
        show_samples(prepared, prompts, mine, theirs)
        plot_rewards(prepared, mine, theirs)
        run.record.peak_memory_mb = device.peak_memory_mb()
    return run.record


def load_held_out(prepared: Prepared[settings.Eval], use: str, limit: int | None) -> Data:
    """At most `limit` held-out rows, the first ones; their report counts prompts that the model was trained on."""
    held_out = first_rows(prepared, load_data(prepared, use, "test"), limit, "--max-samples")
    if trained := trained_on(prepared.source):
        held_out.report.overlap = data.prompts(held_out).found_in(data.unpacked(trained))
    return held_out


def load_prompts(prepared: Prepared[settings.Eval]) -> list[Asked]:
    """The held-out prompts that leave room for a completion, with their token ids."""
    held_out = load_held_out(prepared, "rl", prepared.settings.eval.max_samples or PROMPTS)
    return policies.fitting_prompts(prepared, held_out, "eval")


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
            if samples.rewards:
                sample[f"{name}_reward"] = round(samples.rewards[index], 4)
        prepared.run.append(SAMPLES, sample)
        if index < PRINTED:
            lines = [f"  {key.replace('_', ' ')}: {str(value)[-WIDTH:]}" for key, value in sample.items()]
            say("\n" + "\n".join(lines))
    say()


def plot_rewards(prepared: Prepared[settings.Eval], mine: Samples, theirs: Samples | None) -> None:
    """Draw the rewards of policy and anchor, if there are any."""
    if not mine.rewards:
        return
    groups = {"policy": mine.rewards}
    if theirs is not None:
        groups["anchor"] = theirs.rewards
    path = prepared.run.folder / "plots" / "rewards.png"
    plots.histogram(groups, "Rewards on held-out prompts", "reward", path)

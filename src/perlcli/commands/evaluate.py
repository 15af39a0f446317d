"""`perl eval`: a reward model on held-out preferences, or a policy against its anchor on held-out prompts."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

from perlcli import data, settings
from perlcli.data.sources import STDIN
from perlcli.errors import PerlError
from perlcli.model import loading, roles, sources
from perlcli.model.labels import OPTION, Label, choose
from perlcli.model.roles import Model
from perlcli.rollouts.engines import Engine
from perlcli.run import files, peaks, plots
from perlcli.run.lifecycle import recording
from perlcli.run.record import RunRecord
from perlcli.terminal import say
from perlcli.text import shorten
from perlcli.training import held_out_loss, policies, policy_metrics, reward_model, rollout, sampling
from perlcli.training.dry_run import preview
from perlcli.training.judge import Asked
from perlcli.training.policy_metrics import Exam, Opponent, Result
from perlcli.training.prepare import Prepared, filled, prepare
from perlcli.training.reward_errors import KWARGS
from perlcli.training.rewards import attach_all, find_all
from perlcli.training.rows import load_data, trained_on

SAMPLED, PRINTED, WIDTH = 20, 3, 300  # samples to keep, of those to print, and how many characters of each text
NAMED = 40  # characters of the anchor's name in a plot


def run(given: settings.Eval) -> RunRecord | None:
    """Measure what `--model` is: a reward model or a policy; None for a dry run."""
    prepared = prepare(given)
    if prepared.settings.eval.skip_trained and not trained_on(prepared.source):
        prepared.run.note("--skip-trained has no effect: nothing records which prompts the model was trained on.")
    if not prepared.source.is_classifier:
        return evaluate_policy(prepared)
    if prepared.settings.sampling.reward:
        problem = f"--model {prepared.source.name} is a reward model; --reward only applies to policies"
        if prepared.settings.recipe.recipe is None:
            raise PerlError(problem)
        prepared.run.note(f"{problem}, so the recipe's is ignored")
    return evaluate_reward(prepared)


def evaluate_reward(prepared: Prepared[settings.Eval]) -> RunRecord | None:
    """Whether a reward model is better than chance on held-out rows, and whether it follows length."""
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
        run.record.metrics = reward_model.measure(prepared, scorer, rows, held_out)
        reward_model.conclude(run)
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
    """Reward, wins and losses against the anchor, KL to it, lengths, truncation, distinct-n and gold success; without a
    reward or a gold check also the loss on held-out answers."""
    wanted = prepared.settings.sampling
    for given, option in ((wanted.reward_label, OPTION), (wanted.reward_kwargs, KWARGS)):
        if given and not wanted.reward:
            raise PerlError(f"{option} {shorten(given[0])} is for a --reward, and none is given", "add --reward")
    rewards = find_all(prepared) if wanted.reward else []
    prompts, answers = load_questions(prepared, is_scored=bool(rewards))
    if prepared.is_dry:
        preview(prepared)
        return None
    sampling.note(prepared)
    engine = engine_for(prepared, prompts)
    with recording(prepared.run) as run, rollout.used(engine, prepared.run):
        model, opponent = load_policy(prepared, is_shared=any(reward.is_shared for reward in rewards))
        exam = exam_of(prepared, prompts, engine)
        rollout.compare(engine, model, exam.ids, run)
        score = attach_all(rewards, model, prepared, exam.size) if rewards else None
        run.record.total_parameters = roles.count_parameters(model)[1]
        if answers is not None:
            run.record.metrics, run.record.verdicts = held_out_loss.measure(prepared, model, opponent, answers)
        if prompts:
            result = policy_metrics.examine(exam, model, score, opponent)
            run.record.metrics |= result.metrics
            run.record.verdicts += result.verdicts
            show_samples(exam, result, opponent)
            with run.extra("The plots"):
                draw(result, opponent, run.folder / "plots" / "rewards.png")
        for verdict in run.record.verdicts:
            say(verdict)
        run.record.peak_memory_mb = peaks.peak_mb()
    return run.record


def load_questions(
    prepared: Prepared[settings.Eval], *, is_scored: bool
) -> tuple[list[Asked], held_out_loss.Answers | None]:
    """The held-out prompts; and if nothing judges what a policy writes to them, the held-out answers, if the
    data has any. Data without prompts, such as plain text, is measured on its answers only. Raises PerlError if the
    rows serve neither."""
    prompts: list[Asked] = []
    fault: PerlError | None = None
    try:
        prompts = policies.fitting_prompts(prepared, load_held_out(prepared, "rl"), "eval")
    except PerlError as error:
        if is_scored:
            raise
        fault = error
    if is_scored or (prompts and all(data.gold_check(row) for row, _ in prompts)):
        return prompts, None
    answers = load_answers(prepared)
    if fault is not None and answers is None:
        raise fault
    if fault is not None:
        prepared.run.note(f"No samples, lengths or KL: {fault.problem}")
    return prompts, answers


def load_answers(prepared: Prepared[settings.Eval]) -> held_out_loss.Answers | None:
    """The held-out demonstrations with their tokens; None, with a note, if the rows don't serve as such."""
    try:
        if prepared.settings.data.data == STDIN:
            raise PerlError("standard input can be read only once, for the prompts")
        rows = load_held_out(prepared, "sft")
        return rows, held_out_loss.columns(prepared, rows)
    except PerlError as error:
        prepared.run.note(f"No loss on held-out answers: {error.problem}")
        return None


def engine_for(prepared: Prepared[settings.Eval], prompts: list[Asked]) -> Engine | None:
    """The engine that answers the prompts, if there are any; None for the model in memory."""
    if not prompts:
        return None
    longest = max(len(ids) for _, ids in prompts)
    return rollout.find(prepared, longest + filled(prepared.settings.sampling.max_completion_length))


def exam_of(prepared: Prepared[settings.Eval], prompts: list[Asked], engine: Engine | None = None) -> Exam:
    """The prompts with the sampling that the settings ask for."""
    values = prepared.settings
    how = sampling.asked(values.sampling, values.run.seed)
    return Exam(prepared, prompts, how, filled(values.eval.per_device_eval_batch_size), engine)


def load_held_out(prepared: Prepared[settings.Eval], use: str) -> data.Data:
    """The held-out rows; their report counts prompts that the model was trained on, which --skip-trained leaves out."""
    held_out, trained = load_data(prepared, use, "test"), trained_on(prepared.source)
    if prepared.settings.eval.skip_trained:
        data.drop_trained(held_out, data.unpacked(trained))
    elif trained:
        held_out.report.overlap = data.prompts(held_out).found_in(data.unpacked(trained))
    return held_out


def load_policy(prepared: Prepared[settings.Eval], *, is_shared: bool) -> tuple[Model, Opponent | None]:
    """The policy and its anchor, None for a base; `is_shared` if a reward will be an adapter on the policy's base."""
    source, note = prepared.source, prepared.run.note
    base = loading.load_causal(source, prepared.settings.model)
    if source.adapter is not None:
        policy = roles.load_adapter(base, source.adapter, trainable=False)
        name, words = policies.attach_anchor(policy, source)
        note(f"anchor: {words}")
        policy.eval()
        return policy, Opponent(words, lambda: policies.switched(policy, name))
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
    return model, Opponent(start, lambda: nullcontext(anchor))


def draw(result: Result, opponent: Opponent | None, target: Path) -> None:
    """Draw how the rewards of policy and anchor are spread; nothing without rewards."""
    if not result.policy.known:
        return
    groups = {"policy": result.policy.known}
    if result.anchor is not None and opponent is not None and result.anchor.known:
        groups[f"anchor: {shorten(opponent.words, NAMED)}"] = result.anchor.known
    plots.histogram(groups, "Rewards on held-out prompts", "reward", target)


def show_samples(exam: Exam, result: Result, opponent: Opponent | None) -> None:
    """Keep some samples of policy and anchor next to each other, and print the first ones."""
    for index, (row, _) in enumerate(exam.prompts[:SAMPLED]):
        sample: dict[str, str | float] = {"prompt": data.text_of(row.prompt)}
        for name, samples in (("policy", result.policy), ("anchor", result.anchor)):
            if samples is None:
                continue
            sample[name] = samples.texts[index]
            if samples.rewards and not math.isnan(samples.rewards[index]):
                sample[f"{name}_reward"] = round(samples.rewards[index], 4)
        names = {} if opponent is None else {"anchor_model": opponent.words}
        exam.prepared.run.append(files.SAMPLES, sample | names)
        if index < PRINTED:
            lines = [f"  {_label(key, opponent)}: {str(value)[-WIDTH:]}" for key, value in sample.items()]
            say("\n" + "\n".join(lines))
    say()


def _label(key: str, opponent: Opponent | None) -> str:
    return f"anchor ({opponent.words})" if key == "anchor" and opponent is not None else key.replace("_", " ")

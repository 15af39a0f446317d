"""`perl rl`: RLOO or REINFORCE against a reward, with a KL penalty to the anchor; all roles share one frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from peft import PeftModel
from trl import RLOOConfig

from perlcli import device, settings
from perlcli.data import Data, Prompt
from perlcli.errors import PerlError, RunFailed
from perlcli.model import adapters, dropout, roles
from perlcli.model.shared_prompts import Sharer
from perlcli.rollouts.engines import Engine
from perlcli.run import files, plots
from perlcli.run.lifecycle import Run, recording
from perlcli.run.metrics import OF_RL, renamed
from perlcli.run.record import RunRecord
from perlcli.settings.yaml import parse
from perlcli.terminal import say
from perlcli.training import (
    auto_batch,
    guards,
    logits,
    policies,
    policy_metrics,
    reward_verdicts,
    rl_verdicts,
    rollout,
    sampling,
    sharing,
)
from perlcli.training.algorithms import PHASES, TIME, Reinforce, Rloo, Rollouts
from perlcli.training.dry_run import Lengths, preview
from perlcli.training.judge import REWARD, SUM, Asked, Judge, Probe, note_unscored, probe
from perlcli.training.lending import Lent
from perlcli.training.loop import describe, has_loaded, train
from perlcli.training.policies import Anchor
from perlcli.training.policy_metrics import Exam, Opponent
from perlcli.training.prepare import Prepared, filled, prepare, require
from perlcli.training.rewards import Reward, Weighted, attach_all, find_all
from perlcli.training.rows import load_sides
from perlcli.training.trl_config import trl_config
from perlcli.training.value_model import ValueModel

# Of what `perl eval` measures, what the evaluation at the end leaves out.
ONLY_EVAL = ("prompts_", "distinct_", "kl_k1", "kl_k3_per_sequence")
LAST = 10  # the final figures are means over so many steps


def run(given: settings.Rl) -> RunRecord | None:
    """Train the policy's adapter against the reward; None for a dry run."""
    prepared = prepare(given)
    require(prepared, policy=True)
    config = trainer_args(prepared.settings)
    rewards = find_all(prepared)
    reward_verdicts.quote(prepared, rewards)
    anchor = policies.find_anchor(prepared)
    rows, held_out = load_sides(prepared, "rl")
    prompts = load_prompts(prepared, config, rows)
    note_slow_sampling(prepared)
    sampling.note(prepared)
    lengths = Lengths.of([ids for _, ids in prompts])
    prepared = auto_batch.settled(prepared, trainer_args, lengths.longest)
    config = trainer_args(prepared.settings)
    exam = exam_of(prepared, config, held_out) if held_out is not None else None
    if prepared.is_dry:
        say(f"algorithm: {prepared.settings.rl.algorithm}; anchor: {anchor.words}")
        preview(prepared, config, lengths)
        return None
    engine, exam = engine_for(prepared, lengths.longest, exam)
    with recording(prepared.run) as run, rollout.used(engine, prepared.run):
        trainer, score = build_trainer(prepared, config, rewards, anchor, [row for row, _ in prompts])
        has_loaded(run)
        rollout.compare(engine, trainer.model, [ids for _, ids in prompts], run)
        rollout.note_weights(engine, prepared)
        trainer.rollouts = Rollouts(
            engine, sampling.asked(prepared.settings.sampling, 0), rollout.cap_of(engine, prepared.settings)
        )
        is_function = all(reward.function for reward in rewards)
        first = probe(trainer.model, prepared, score, prompts, engine, is_function=is_function)
        check_start(trainer, prepared, anchor, first)
        if isinstance(trainer, Reinforce):  # the value model starts by predicting the mean return
            trainer.value.guess((1 - trainer.beta) * fmean(first.scored.known))
        report_model(trainer, run, score)
        weights = guards.Watch(partial(digests, trainer))
        train(trainer, run, weights.before_saving(partial(save, prepared, trainer)))
        note_unscored(run, prepared.settings.sampling.on_reward_error)
        run.record.guards |= weights.check()
        sharing.conclude(trainer.sharer, run)
        history = files.read_rows(run.folder / files.METRICS)
        run.record.metrics = summary(history)
        rl_verdicts.conclude(run, history)
        if exam is not None:
            with run.extra("The evaluation on held-out prompts"):
                evaluate(trainer, exam, score, anchor)
        with run.extra("The plots"):
            plots.curves("rl", run.folder / files.METRICS, run.folder / "plots" / "training.png")
    return run.record


def trainer_args(given: settings.Rl) -> RLOOConfig:
    """The TRL config of these settings. Raises PerlError for values that don't suit the algorithm."""
    fields = {
        "beta": given.rl.beta,
        **sampling.asked(given.sampling, 0).distribution(),
        "num_generations": given.rl.num_generations,
        "max_completion_length": given.sampling.max_completion_length,
        "disable_dropout": True,  # with dropout, policy and anchor would differ by chance where they are equal
    }
    if given.rl.algorithm != "reinforce":
        return ending_alike(trl_config(RLOOConfig, given, fields), given)
    size, passes = int(given.train.per_device_train_batch_size or 1), given.train.gradient_accumulation_steps or 1
    if size * passes < 2:
        raise PerlError("--algorithm reinforce needs at least 2 completions per step", "raise the batch size")
    # RLOOConfig rejects 1, although RLOOTrainer can do it: until it is built, any number that divides a batch
    fields["num_generations"] = size if size > 1 else passes
    config = trl_config(RLOOConfig, given, fields)
    config.num_generations = 1
    if config.fp16 and not config.max_grad_norm:  # gradients stay scaled then, and the value model's are not
        problem = "--set max_grad_norm=0 can't be combined with --algorithm reinforce in float16"
        raise PerlError(problem, "--dtype bfloat16")
    return ending_alike(config, given)


def ending_alike(config: RLOOConfig, given: settings.Rl) -> RLOOConfig:
    """The config, with the minimum length of completions. Raises PerlError if TRL would take completions that end with
    a stop string for truncated ones."""
    if config.mask_truncated_completions and any(given.sampling.stop):
        problem = "--set mask_truncated_completions=true can't be combined with --stop"
        raise PerlError(f"{problem}: TRL would mask completions that end with a stop string")
    if given.sampling.min_completion_length:  # TRL has no field of its own for it
        asked = config.generation_kwargs or {}
        own = parse(asked, "--set") if isinstance(asked, str) else asked
        held: Any = own
        config.generation_kwargs = {**held, "min_new_tokens": given.sampling.min_completion_length}
    return config


def load_prompts(prepared: Prepared[settings.Rl], config: RLOOConfig, rows: Data) -> list[Asked]:
    """The prompts of `--data` that fit, repeated if they are too few for a step: TRL drops a step that isn't full."""
    prompts = policies.fitting_prompts(prepared, rows, "train")
    needed = int(config.generation_batch_size or 1) // int(config.num_generations or 1)
    if len(prompts) >= needed:
        return prompts
    prepared.run.note(f"A step needs {needed} prompts but there are only {len(prompts)}; some are reused.")
    return [prompts[index % len(prompts)] for index in range(needed)]


def engine_for(prepared: Prepared[settings.Rl], longest: int, exam: Exam | None) -> tuple[Engine | None, Exam | None]:
    """What samples completions of prompts of up to `longest` tokens and of the exam's; and the exam with it."""
    longest = max([longest, *(map(len, exam.ids) if exam is not None else ())])
    engine = rollout.find(prepared, longest + filled(prepared.settings.sampling.max_completion_length))
    return engine, replace(exam, engine=engine) if exam is not None else None


def exam_of(prepared: Prepared[settings.Rl], config: RLOOConfig, held_out: Data) -> Exam:
    """The held-out prompts, answered as in training, with the seed of the run."""
    prompts = policies.fitting_prompts(prepared, held_out, "eval")
    how = sampling.asked(prepared.settings.sampling, prepared.settings.run.seed)
    return Exam(prepared, prompts, how, config.per_device_train_batch_size)


def evaluate(trainer: Any, exam: Exam, score: Weighted, anchor: Anchor) -> None:
    """Compare the trained policy with its anchor on the held-out prompts, as `perl eval` does, and say the verdict."""
    trainer.lent.give_back()
    words = anchor.words if trainer.beta else f"{exam.prepared.source.name}, where RL started"
    opponent = None
    if isinstance(trainer.model, PeftModel):
        name = roles.ANCHOR if roles.ANCHOR in trainer.model.peft_config else None
        opponent = Opponent(words, lambda: policies.switched(trainer.model, name))
    elif trainer.ref_model is not None:
        opponent = Opponent(words, lambda: nullcontext(trainer.ref_model))
    result, run = policy_metrics.examine(exam, trainer.model, score, opponent), exam.prepared.run
    kept = {name: value for name, value in result.metrics.items() if not name.startswith(ONLY_EVAL)}
    run.record.metrics |= {f"{OF_RL}{name}": value for name, value in kept.items()}
    run.record.verdicts += result.verdicts
    for verdict in result.verdicts:
        say(verdict)


def note_slow_sampling(prepared: Prepared[settings.Rl]) -> None:
    """Note that a GPU samples slowly from 8 bits: bitsandbytes looks for outliers in each layer's input, and waits."""
    if prepared.settings.model.load_in_8bit and device.kind() == "cuda":
        slow = "On a GPU, sampling from a base in 8 bits is slow: every layer waits for the CPU at every token"
        prepared.run.note(f"{slow}. A base in 16 bits, or --load-in-4bit, samples faster.")


def build_trainer(
    prepared: Prepared[settings.Rl], config: RLOOConfig, rewards: Sequence[Reward], anchor: Anchor, rows: list[Prompt]
) -> tuple[Any, Weighted]:
    """The algorithm's trainer with policy, rewards, value model and anchor in place; and what scores completions."""
    values, run = prepared.settings, prepared.run
    is_reinforce = values.rl.algorithm == "reinforce"
    model = policies.start(prepared)
    lent = Lent(model)
    sharer = Sharer(model, is_on=values.sharing.shared_prompts)
    score = attach_all(rewards, model, prepared, config.per_device_train_batch_size)
    run.note(f"anchor: {anchor.words}")
    judge = Judge(prepared, score, rows, REWARD if len(rewards) == 1 else SUM)
    # built outside of `unrounded`: adding an adapter makes the policy trainable again
    value = ValueModel(model, filled(values.rl.value_learning_rate), sharer) if is_reinforce else None
    with policies.named_after(model, anchor, config), roles.unrounded(model):
        trainer: Any
        if value is None:
            trainer = Rloo(model, judge, config, sharer)
        else:
            trainer = Reinforce(model, judge, config, sharer, value)
    trainer.lent = lent
    policies.set_anchor(trainer, anchor, prepared)
    if config.disable_dropout and (left := dropout.left_in(trainer)):
        raise RunFailed(f"{left}: it can't be compared with its anchor", "train another model")
    logits.check(trainer, run)
    if not values.lora.full:
        roles.keep_only_policy_trainable(trainer.model)
        roles.set_adapter_dropout(trainer.model, adapters.dropout_of(values.lora, "CAUSAL_LM"))
    sharing.try_out(sharer, run)
    trainer.add_callback(guards.TrainsExactly(trainer.model, value.parameters() if value is not None else ()))
    return trainer, score


def check_start(trainer: Any, prepared: Prepared[settings.Rl], anchor: Anchor, first: Probe) -> None:
    """Keep the probe, and note the KL to the anchor before the first step. Raises RunFailed if it isn't 0 for a policy
    that starts at its anchor."""
    run = prepared.run
    run.record.guards["probe"] = first.summary()
    if not trainer.beta:
        return
    part = slice(prepared.settings.train.per_device_train_batch_size)
    kl = trainer.kl_to_anchor(first.prompts[part], first.written[part])
    run.record.guards["kl_at_start"] = kl
    if not anchor.is_start:
        run.note(f"KL to the anchor at the start: {kl:.4g} per token")
        return
    guards.assert_at_anchor(kl, trainer.model.dtype)
    has_dropout = not trainer.args.disable_dropout or adapters.dropout_of(prepared.settings.lora, "CAUSAL_LM")
    if not has_dropout:  # with dropout, the first step's KL is not exactly 0
        trainer.add_callback(guards.StartsAtAnchor(trainer.model.dtype))


def report_model(trainer: Any, run: Run, score: Weighted) -> None:
    """Count the parameters, the copies of the base and what each role adds to it; the record keeps all of it."""
    describe(trainer, run)
    value = trainer.value if isinstance(trainer, Reinforce) else None
    copies = guards.base_copies(trainer.model)
    added = value.bytes if value is not None else 0
    sizes = guards.sizes_of_roles(trainer.model, trainer.ref_model, score.bytes(), added)
    run.record.memory |= {"base_copies": copies, "mb": sizes}
    run.note(guards.memory_line(copies, sizes))
    if value is not None:  # TRL doesn't know of it
        run.record.trainable_parameters += sum(p.numel() for p in value.parameters())
        run.record.total_parameters += sum(p.numel() for p in value.head.parameters())


def save(prepared: Prepared[settings.Rl], trainer: Any, model: Any, folder: Path) -> None:
    """Write the policy, its anchor and, with REINFORCE, the value model into a folder."""
    policies.save(prepared, model, folder)
    if isinstance(trainer, Reinforce):
        roles.save_adapter(model, folder, roles.VALUE)
        trainer.value.save_head(folder / roles.VALUE)


def digests(trainer: Any) -> guards.Digests:
    """A digest of every role; the value model's includes its head, which is all that learns at the first step."""
    by_role = guards.checksums(trainer.model)
    if isinstance(trainer, Reinforce):
        by_role[roles.VALUE] += guards.checksum(trainer.value.head, "")
    return by_role


def summary(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the run's last steps, the reward of the first step, and where the time of a step went."""
    steps = [row for row in history if "reward" in row]
    if not steps:
        return {}
    parts = {key: key for key in steps[0] if key.startswith("rewards/") and key.endswith("/mean")}
    parts.pop(f"rewards/{SUM if len(parts) > 1 else REWARD}/mean", None)  # the same as `reward`
    metrics = {"first_reward": steps[0]["reward"]}
    for theirs, ours in (renamed("rl") | parts).items():
        values = [row[theirs] for row in steps[-LAST:] if row.get(theirs) is not None]
        if values:
            metrics[ours] = fmean(values)
    timed = steps[1:] or steps  # the first step also warms up
    return metrics | {f"seconds_{phase}": median(row.get(TIME + phase, 0.0) for row in timed) for phase in PHASES}

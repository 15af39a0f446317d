"""`perl rl`: RLOO or REINFORCE against a reward, the policy held to its anchor, all roles on one frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from datasets import Dataset
from trl import RLOOConfig

from perlcli import settings
from perlcli.data import Prompt
from perlcli.errors import PerlError
from perlcli.model import adapters, roles
from perlcli.run import plots
from perlcli.run.files import METRICS, read_rows
from perlcli.run.lifecycle import Run, recording
from perlcli.run.metrics import renamed
from perlcli.run.record import RunRecord
from perlcli.terminal import say
from perlcli.training import base_copies, guards, policies, rewards
from perlcli.training.algorithms import PHASES, TIME, Reinforce, Rloo
from perlcli.training.judge import REWARD, ROW, SUM, Judge, Probe, probe
from perlcli.training.loop import train
from perlcli.training.policies import Anchor
from perlcli.training.prepare import Prepared, filled, prepare, require
from perlcli.training.preview import preview
from perlcli.training.rewards import Reward, Weighted
from perlcli.training.rows import load_data
from perlcli.training.trl_config import trl_config
from perlcli.training.value_model import ValueModel

Asked = tuple[Prompt, list[int]]  # a prompt with its token ids
LAST = 10  # steps whose mean is the run's final figure


def run(given: settings.Rl) -> RunRecord | None:
    """Train the policy's adapter against the reward; None for a dry run."""
    prepared = prepare(given)
    require(prepared, policy=True)
    config = trainer_args(prepared.settings)
    found = rewards.find_all(prepared)
    anchor = policies.find_anchor(prepared)
    prompts = policies.fitting_prompts(prepared, load_data(prepared, "rl"), "train")
    prompts = fill(prompts, config, prepared.run)
    if prepared.is_dry:
        say(f"algorithm: {prepared.settings.rl.algorithm}; anchor: {anchor.words}")
        preview(prepared, config)
        return None
    with recording(prepared.run) as run:
        trainer, score = build_trainer(prepared, config, found, anchor, [row for row, _ in prompts])
        first = probe(trainer.model, prepared, score, prompts, is_function=all(r.function for r in found))
        run.record.guards["probe"] = first.summary()
        check_start(trainer, prepared, anchor, first)
        set_first_guess(trainer, first)
        tell_memory(trainer, run, score)
        run.record.trl_settings = trainer.args.to_dict()
        count_parameters(trainer, run.record)
        before, after = marks(trainer), {}

        def finish(model: Any, folder: Path) -> None:
            after.update(marks(trainer))  # first: after full tuning saving rounds the weights
            save(prepared, model, folder, trainer)

        train(trainer, run, finish)
        guards.compare(before, after)
        moved = [name for name in before if name in (roles.POLICY, roles.VALUE)]
        run.record.guards["trained"] = sorted(map(guards.told, moved))
        run.record.guards["unchanged"] = sorted(guards.told(name) for name in before if name not in moved)
        run.record.metrics = summary(read_rows(run.folder / METRICS))
        plots.curves("rl", run.folder / METRICS, run.folder / "plots" / "training.png")
    return run.record


def trainer_args(given: settings.Rl) -> RLOOConfig:
    """The TRL config of these settings."""
    reinforce = given.rl.algorithm == "reinforce"
    extra = {
        "beta": given.rl.beta, "temperature": given.sampling.temperature, "num_generations": given.rl.num_generations,
        "max_completion_length": given.sampling.max_completion_length,
        "disable_dropout": True,  # else policy and anchor differ by chance where they are equal, and so do samples
    }  # fmt: skip
    if reinforce:
        size, passes = int(given.train.per_device_train_batch_size or 1), given.train.gradient_accumulation_steps or 1
        if size * passes < 2:
            raise PerlError("--algorithm reinforce needs at least 2 completions a step", "raise the batch size")
        # RLOOConfig refuses 1, which RLOOTrainer can do: until it is set, any that divides a generation batch
        extra["num_generations"] = size if size > 1 else passes
    config = trl_config(RLOOConfig, given, extra)
    if reinforce:
        config.num_generations = 1
        if config.fp16 and not config.max_grad_norm:
            problem = "--set max_grad_norm=0 doesn't go with --algorithm reinforce in float16"
            raise PerlError(problem, "--dtype bfloat16")  # gradients stay scaled then, and the value model's are not
    return config


def fill(prompts: list[Asked], config: RLOOConfig, run: Run) -> list[Asked]:
    """The prompts, as often as it takes to fill a step: TRL leaves an unfilled one out, and would train nothing."""
    needed = int(config.generation_batch_size or 1) // int(config.num_generations or 1)
    if len(prompts) >= needed:
        return prompts
    run.note(f"A step takes {needed} prompts, and there are {len(prompts)}: some come more than once.")
    return [prompts[index % len(prompts)] for index in range(needed)]


def build_trainer(
    prepared: Prepared[settings.Rl], config: RLOOConfig, found: Sequence[Reward], anchor: Anchor, rows: list[Prompt]
) -> tuple[Any, Weighted]:
    """Every role on its place: policy, rewards, value model and anchor, in the trainer of the algorithm."""
    values, run = prepared.settings, prepared.run
    model = policies.start(prepared)
    score = rewards.attach_all(found, model, prepared, config.per_device_train_batch_size)
    run.note(f"anchor: {anchor.words}")
    dataset = Dataset.from_list([{"prompt": row.prompt, ROW: index} for index, row in enumerate(rows)])
    options: dict[str, Any] = {"train_dataset": dataset, "processing_class": prepared.tokenizer}
    judge: Any = Judge(run, prepared, score, rows, REWARD if len(found) == 1 else SUM)
    value = ValueModel(model) if values.rl.algorithm == "reinforce" else None  # outside: adding it thaws the policy
    trainer: Any
    with policies.named_after(model, anchor), roles.unrounded(model):
        if value is not None:
            rate = filled(values.rl.value_learning_rate)
            trainer = Reinforce(model, judge, config, value=value, value_learning_rate=rate, **options)
        else:
            trainer = Rloo(model, judge, config, **options)
    policies.set_anchor(trainer, anchor, prepared)
    if not values.lora.full:
        roles.keep_only_policy_trainable(trainer.model)
        roles.set_adapter_dropout(trainer.model, adapters.dropout_of(values.lora, "CAUSAL_LM"))
    trainer.add_callback(guards.intended(trainer.model, value.parameters() if value is not None else ()))
    return trainer, score


def check_start(trainer: Any, prepared: Prepared[settings.Rl], anchor: Anchor, first: Probe) -> None:
    """The policy must be its anchor where it starts from it; elsewhere the first KL is told."""
    if not trainer.beta:
        return
    part = slice(prepared.settings.train.per_device_train_batch_size)
    kl = trainer.kl_to_anchor(first.prompts[part], first.written[part])
    prepared.run.record.guards["kl_at_start"] = kl
    if not anchor.is_start:
        prepared.run.note(f"KL to the anchor at the start: {kl:.4g} per token")
        return
    guards.assert_at_anchor(kl, trainer.model.dtype)
    if trainer.args.disable_dropout and not adapters.dropout_of(prepared.settings.lora, "CAUSAL_LM"):  # else chance
        trainer.add_callback(guards.StartsAtAnchor(trainer.model.dtype))


def set_first_guess(trainer: Any, first: Probe) -> None:
    """Let the value model begin at the mean return of the probe."""
    if isinstance(trainer, Reinforce):
        trainer.value.guess((1 - trainer.beta) * fmean(first.scored.total))


def tell_memory(trainer: Any, run: Run, score: Weighted) -> None:
    """Count the copies of the base, say what each role adds to it, and keep both in the record."""
    copies = base_copies.base_copies(trainer.model)
    value = trainer.value.bytes if isinstance(trainer, Reinforce) else 0
    parts = base_copies.of_roles(trainer.model, trainer.ref_model, score.bytes(), value)
    run.record.memory |= {"base_copies": copies, "mb": parts}
    run.note(base_copies.line(copies, parts))


def count_parameters(trainer: Any, record: RunRecord) -> None:
    """Keep how many parameters train and how many lie in memory, the value model's head among them."""
    record.trainable_parameters, record.total_parameters = roles.count_parameters(trainer.model)
    if isinstance(trainer, Reinforce):
        record.trainable_parameters += sum(p.numel() for p in trainer.value.parameters())
        record.total_parameters += sum(p.numel() for p in trainer.value.head.parameters())


def save(prepared: Prepared[settings.Rl], model: Any, folder: Path, trainer: Any) -> None:
    """Write the policy, its anchor, and the value model where there is one, into a folder."""
    policies.save(prepared, model, folder)
    if isinstance(trainer, Reinforce):
        roles.save_adapter(model, folder, roles.VALUE)
        trainer.value.save_head(folder / roles.VALUE)


def marks(trainer: Any) -> dict[str, str]:
    """A digest of every role; the value model's with its head, which alone learns at the first step."""
    found = guards.checksums(trainer.model)
    if isinstance(trainer, Reinforce):
        found[roles.VALUE] += guards.checksum(trainer.value.head, "")
    return found


def summary(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the run's last steps, the reward that it began with, and where the time of a step went."""
    steps = [row for row in history if "reward" in row]
    if not steps:
        return {}
    parts = {key: key for key in steps[0] if key.startswith("rewards/") and key.endswith("/mean")}
    parts.pop(f"rewards/{SUM if len(parts) > 1 else REWARD}/mean", None)  # what `reward` tells already
    metrics = {"first_reward": steps[0]["reward"]}
    for theirs, ours in (renamed("rl") | parts).items():
        values = [row[theirs] for row in steps[-LAST:] if row.get(theirs) is not None]
        if values:
            metrics[ours] = fmean(values)
    timed = steps[1:] or steps  # the first step also warms up
    for phase in PHASES:
        metrics[f"seconds_{phase}"] = median(row.get(TIME + phase, 0.0) for row in timed)
    return metrics

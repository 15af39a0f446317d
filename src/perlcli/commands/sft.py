"""`perl sft`: supervised fine-tuning, which gives the policy that RL starts from and its anchor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from trl import SFTConfig

from perlcli import data, settings
from perlcli.data.render import of_demonstration
from perlcli.model import roles
from perlcli.rollouts import local
from perlcli.rollouts.how import Sampling
from perlcli.run import files, plots
from perlcli.run.lifecycle import recording
from perlcli.run.metrics import renamed
from perlcli.run.record import RunRecord
from perlcli.training import auto_batch, logits, policies
from perlcli.training.dry_run import lengths_of, preview
from perlcli.training.lending import Lent
from perlcli.training.loop import describe, train, without_casts
from perlcli.training.prepare import Prepared, prepare, require
from perlcli.training.rows import dataset, load_sides
from perlcli.training.sft_trainer import TokenMeanTrainer, check_apart, check_packing
from perlcli.training.trl_config import trl_config

SAMPLED = 4
TEMPERATURE, LENGTH = 0.7, 64  # of the samples


def run(given: settings.Sft) -> RunRecord | None:
    """Train an adapter (or, with --full, the model) to imitate demonstrations; None for a dry run."""
    prepared = prepare(given)
    require(prepared, policy=True)
    config = trainer_args(prepared.settings)
    check_packing(config, prepared.source.config.model_type)
    rows, held_out = load_sides(prepared, "sft")
    train_set = tokens(rows, prepared, "train")
    eval_set = tokens(held_out, prepared, "eval") if held_out else None
    lengths = lengths_of(train_set)
    prepared = auto_batch.settled(prepared, trainer_args, lengths.longest)
    config = trainer_args(prepared.settings)
    if prepared.is_dry:
        preview(prepared, config, lengths)
        return None
    with recording(prepared.run) as run:
        trainer = build_trainer(prepared, config, train_set)
        describe(trainer, run)
        train(trainer, run, partial(policies.save, prepared))
        run.record.metrics = measure(trainer, files.read_rows(run.folder / files.METRICS), eval_set)
        trainer.lent.give_back()
        with run.extra("The samples"):
            write_samples(prepared, trainer.model, held_out or rows)
        with run.extra("The plots"):
            plots.curves("sft", run.folder / files.METRICS, run.folder / "plots" / "training.png")
    return run.record


def trainer_args(given: settings.Sft) -> SFTConfig:
    """The TRL config of these settings."""
    return trl_config(SFTConfig, given, {"max_length": given.data.max_length})


def tokens(rows: data.Data, prepared: Prepared[settings.Sft], role: str) -> Dataset:
    """Token ids and labels, with label -100 for tokens that are not learned, such as the prompt."""
    render = partial(of_demonstration, prepared.renderer, loss_on=prepared.settings.loss.loss_on)
    return dataset(prepared, role, rows, render)


def build_trainer(prepared: Prepared[settings.Sft], config: SFTConfig, rows: Dataset) -> Any:
    """TRL's trainer on the base with the adapter that trains, or under --full with all of its weights."""
    model = policies.start(prepared)
    lent = Lent(model)
    with roles.unrounded(model):
        trainer: Any = TokenMeanTrainer(model, config, train_dataset=rows, processing_class=prepared.tokenizer)
    trainer.lent = lent
    roles.as_float32(trainer.model)
    logits.check(trainer, prepared.run)
    check_apart(trainer)
    return trainer


def measure(trainer: TokenMeanTrainer, steps: Sequence[dict[str, Any]], held_out: Dataset | None) -> dict[str, float]:
    """The training loss of the last step, and loss and token accuracy on held-out rows."""
    metrics = {"train_loss": steps[-1]["loss"]} if steps else {}
    if held_out is not None:
        with without_casts(trainer):
            evaluated = trainer.evaluate(held_out)
        names = renamed("sft", prefix="eval_")
        metrics |= {ours: evaluated[theirs] for theirs, ours in names.items() if theirs in evaluated}
    return metrics


def write_samples(prepared: Prepared[settings.Sft], model: roles.Model, rows: data.Data) -> None:
    """Write the policy's answers to a few prompts next to the demonstrations."""
    demonstrations = [row for row in rows.rows if isinstance(row, data.Demonstration)]
    answered = [(row.prompt, row.completion, row.template) for row in demonstrations if row.prompt is not None][
        :SAMPLED
    ]
    if not answered:
        return
    render = prepared.renderer
    how = Sampling(TEMPERATURE, LENGTH, prepared.settings.run.seed)
    prompts = [render.prompt_ids(prompt, template) for prompt, _, template in answered]
    written = local.sample(model, render, prompts, how)
    for (prompt, completion, _), ids in zip(answered, written, strict=True):
        sample = {"prompt": data.text_of(prompt), "demonstration": data.text_of(completion), "policy": render.text(ids)}
        prepared.run.append(files.SAMPLES, sample)

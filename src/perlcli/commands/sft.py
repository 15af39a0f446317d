"""`perl sft`: supervised fine-tuning, which gives the policy that RL starts from and its anchor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from perlcli import data, settings
from perlcli.data import Data, Demonstration
from perlcli.data.tokens import of_demonstration
from perlcli.model import roles
from perlcli.run import plots
from perlcli.run.files import METRICS, SAMPLES, read_rows
from perlcli.run.lifecycle import recording
from perlcli.run.metrics import renamed
from perlcli.run.record import RunRecord
from perlcli.training import policies, sampling
from perlcli.training.loop import train
from perlcli.training.prepare import Prepared, prepare, require
from perlcli.training.preview import preview
from perlcli.training.rows import dataset, load_sides
from perlcli.training.trl_config import trl_config

SAMPLED = 4


def run(given: settings.Sft) -> RunRecord | None:
    """Train an adapter (or, with --full, the model) to imitate demonstrations; None for a dry run."""
    prepared = prepare(given)
    require(prepared, policy=True)
    config = trainer_args(prepared.settings)
    rows, held_out = load_sides(prepared, "sft")
    train_set = tokens(rows, prepared, config, "train")
    eval_set = tokens(held_out, prepared, config, "eval") if held_out else None
    if prepared.is_dry:
        preview(prepared, config)
        return None
    with recording(prepared.run) as run:
        model = policies.start(prepared)
        config.assistant_only_loss = False  # the labels carry it; TRL allows it for rows alone that it renders itself
        with roles.unrounded(model):
            trainer: Any = SFTTrainer(model, config, train_dataset=train_set, processing_class=prepared.tokenizer)
        roles.as_float32(trainer.model)
        run.record.trl_settings = trainer.args.to_dict()
        run.record.trainable_parameters, run.record.total_parameters = roles.count_parameters(trainer.model)
        train(trainer, run, partial(policies.save, prepared))
        run.record.metrics = measure(trainer, read_rows(run.folder / METRICS), eval_set)
        show_samples(prepared, trainer.model, held_out or rows)
        plots.curves("sft", run.folder / METRICS, run.folder / "plots" / "training.png")
    return run.record


def trainer_args(given: settings.Sft) -> SFTConfig:
    """The TRL config of these settings."""
    return trl_config(SFTConfig, given, {"max_length": given.data.max_length})


def tokens(rows: Data, prepared: Prepared[settings.Sft], config: SFTConfig, role: str) -> Dataset:
    """Token ids and labels, -100 where nothing is learned: the prompt, where there is one."""
    row_tokens = partial(
        of_demonstration,
        prepared.renderer,
        completion_only=config.completion_only_loss is not False,
        assistant_only=config.assistant_only_loss,
    )
    return dataset(prepared, role, rows, row_tokens)


def measure(trainer: SFTTrainer, steps: Sequence[dict[str, Any]], held_out: Dataset | None) -> dict[str, float]:
    """The last training loss by the rows of the steps, and loss and token accuracy on held-out rows."""
    metrics = {"train_loss": steps[-1]["loss"]} if steps else {}
    if held_out is not None:
        found = trainer.evaluate(held_out)
        metrics |= {ours: found[theirs] for theirs, ours in renamed("sft", prefix="eval_").items() if theirs in found}
    return metrics


def show_samples(prepared: Prepared[settings.Sft], model: Any, rows: Data) -> None:
    """Write what the policy answers to a few prompts beside the demonstration."""
    chosen = [row for row in rows.rows if isinstance(row, Demonstration) and row.prompt is not None][:SAMPLED]
    if not chosen:
        return
    prompts = [prepared.renderer.prompt_ids(row.prompt) for row in chosen if row.prompt is not None]
    written = sampling.sample(model, prepared.renderer, prompts, sampling.Sampling(0.7, 64, prepared.settings.run.seed))
    for row, ids in zip(chosen, written, strict=True):
        text = prepared.renderer.text(ids)
        assert row.prompt is not None
        sample = {"prompt": data.text_of(row.prompt), "demonstration": data.text_of(row.completion), "policy": text}
        prepared.run.append(SAMPLES, sample)

"""What `--dry-run` prints."""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments

from perlcli import device, settings
from perlcli.model import adapters, sources
from perlcli.terminal import say
from perlcli.text import enum_value
from perlcli.training.prepare import Prepared
from perlcli.training.starting_adapter import task_of


def preview(prepared: Prepared[settings.Training | settings.Eval], config: TrainingArguments | None = None) -> None:
    """Print what a run would do; `config` is TRL's if it would train."""
    source, values = prepared.source, prepared.settings
    if values.recipe.recipe is not None:
        say(f"recipe: {values.recipe.recipe}")
    say(f"model: {source.name} (base {source.base_name}, {device.precision(values.model)} on {device.kind()})")
    if not isinstance(values, settings.Eval):
        say(_training_line(prepared, values))
    if config is not None:
        length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epoch(s)"
        schedule = enum_value(config.lr_scheduler_type)
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        say(f"training: {length} of {size} rows, learning rate {config.learning_rate:g} ({schedule})")
    say(f"output: {values.run.output}\nDry run: nothing was loaded, trained or written.")


def _training_line(prepared: Prepared[settings.Training | settings.Eval], values: settings.Training) -> str:
    lora, source = values.lora, prepared.source
    model = sources.skeleton(source, trust_remote_code=values.model.trust_remote_code)
    if prepared.adapter is None:
        count = f"{base_size(model):,} " if model is not None else ""
        return f"full tuning: all {count}parameters train"
    line = f"adapter: {adapters.words(prepared.adapter)}"
    if source.adapter or model is None:
        return line
    total, modules = base_size(model), getattr(adapters.on_model(lora, model, task_of(values)), "target_modules", "")
    names = modules if isinstance(modules, str) else ", ".join(modules)
    trained = adapters.try_on(lora, model, task_of(values))
    return f"{line} on {names}; {trained:,} parameters train, {total:,} stay frozen"


def base_size(model: nn.Module) -> int:
    """The number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())

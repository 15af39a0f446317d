"""What `--dry-run` prints."""

from __future__ import annotations

from typing import Any

from perlcli import device
from perlcli.model import adapters, sources
from perlcli.terminal import say
from perlcli.text import enum_value
from perlcli.training.prepare import Prepared
from perlcli.training.starting_adapter import task_of


def preview(prepared: Prepared, config: Any = None) -> None:
    """Print what a run would do, for `--dry-run`."""
    found, values = prepared.source, prepared.settings
    if values.recipe.recipe is not None:
        say(f"recipe: {values.recipe.recipe}")
    say(f"model: {found.name} (base {found.base_name}, {device.precision(values.model)} on {device.kind()})")
    if hasattr(values, "lora"):
        say(_training_line(prepared))
    if config is not None:
        length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epoch(s)"
        schedule = enum_value(config.lr_scheduler_type)
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        say(f"training: {length} of {size} rows, learning rate {config.learning_rate:g} ({schedule})")
    say(f"output: {values.run.output}\nDry run: nothing was loaded, trained or written.")


def _training_line(prepared: Prepared) -> str:
    lora, source = prepared.settings.lora, prepared.source
    model = sources.skeleton(source, trust_remote_code=prepared.settings.model.trust_remote_code)
    if lora.full:
        count = f"{base_size(model):,} " if model is not None else ""
        return f"full tuning: all {count}parameters train"
    line = f"adapter: {adapters.words(prepared.adapter)}"
    if source.adapter or model is None:
        return line
    total, config = base_size(model), adapters.on_model(lora, model, task_of(prepared.settings))
    names = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    trained = adapters.try_on(lora, model, task_of(prepared.settings))
    return f"{line} on {names}; {trained:,} parameters train, {total:,} stay frozen"


def base_size(model: Any) -> int:
    """The parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())

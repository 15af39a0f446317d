"""The TRL config of a training stage, built from its settings and checked, without side effects."""

from __future__ import annotations

import copy
import dataclasses
import os
import typing
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from perlcli import device, settings
from perlcli.errors import PerlError, listing, nearest, reason
from perlcli.memory import optimisers, plans
from perlcli.run import checkpoints, files
from perlcli.settings.types import convert, describe, fits
from perlcli.settings.yaml import parse
from perlcli.text import clip, enum_value, shorten
from perlcli.training import trackers, trl_fields

USUAL = "--optim adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor or sgd"
FUSED_BACKWARD = ("lomo", "adalomo")
Config = TypeVar("Config", bound=TrainingArguments)  # SFTConfig, RewardConfig, RLOOConfig


def trl_config(kind: type[Config], given: settings.Training, extra: Mapping[str, Any]) -> Config:
    """The TRL config of this class for these settings; `extra` are fields of this stage. Raises PerlError for a bad
    `--set` or `--report-to`, and for values that TRL rejects."""
    train, names = given.train, {field.name for field in dataclasses.fields(kind)}
    on_gpu, dtype = device.kind() == "cuda", device.dtype_name(given.model)
    values: dict[str, Any] = {
        "output_dir": str(checkpoints.side(Path(str(given.run.output)).expanduser() / files.CHECKPOINTS)),
        "max_steps": train.max_steps if train.max_steps is not None else -1,
        "num_train_epochs": train.num_train_epochs,
        "learning_rate": train.learning_rate,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "save_strategy": "steps",
        "save_steps": given.keep.save_steps,
        "save_total_limit": None,  # finished checkpoints leave output_dir; `checkpoints.keep` deletes the oldest
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # otherwise a NaN or infinite loss is logged as 0
        "disable_tqdm": True,
        "report_to": trackers.names(given.keep.report_to),
        "seed": given.run.seed,
        "use_cpu": not on_gpu,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "gradient_checkpointing": plans.CHECKPOINTING.get(str(train.gradient_checkpointing), on_gpu),
        "optim": train.optim or optimisers.DEFAULT,
        **extra,
    }
    if plans.is_reentrant(given) and plans.own_kwargs(given) is None:
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    check_optimiser(values["optim"], on_gpu=on_gpu)
    trackers.check(given.keep.report_to)
    values |= overrides(train.set, kind, {option.name for option in settings.options(type(given))})
    if "trust_remote_code" in names:
        values["trust_remote_code"] = given.model.trust_remote_code  # for the reference model that TRL loads itself
    try:
        config = kind(**values)
    except Exception as error:  # TRL checks each of its hundred fields in another way, or not at all
        raise PerlError(f"TRL's {kind.__name__} rejects these settings: {reason(error)}") from error
    check_installed(config)
    check_optimiser_arguments(config)
    check_schedule(config)
    # One process uses one GPU. With several visible, transformers would wrap the model in DataParallel, which TRL
    # rejects. `n_gpu` is a read-only property, so this sets the field behind it; CUDA_VISIBLE_DEVICES chooses the GPU.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def check_optimiser(name: str, *, on_gpu: bool) -> None:
    """Raises PerlError for an optimiser that transformers doesn't know, or that can't train here."""
    known = [member.value for member in OptimizerNames]
    if name not in known:
        problem = f"--optim must be the name of an optimiser in transformers, not {shorten(name)}"
        raise PerlError(problem, nearest(name, known) or USUAL)
    if name in FUSED_BACKWARD or name.endswith("_layerwise"):
        problem = f"--optim {name} changes weights during the backward pass, before their gradients are checked"
        raise PerlError(problem, USUAL)
    if name.startswith("paged_") and not on_gpu:
        plain = name.removeprefix("paged_")
        problem = f"--optim {name} needs a GPU: there is nothing to page on a CPU"
        raise PerlError(problem, f"--optim {plain if plain in known else optimisers.DEFAULT}")


def check_installed(config: TrainingArguments) -> None:
    """Raises PerlError if a library that the optimiser is from isn't installed, or an argument of it is missing."""
    if config.optim_target_modules:
        return  # GaLore and APOLLO look for them in the model, which isn't loaded yet
    try:
        Trainer.get_optimizer_cls_and_kwargs(config)
    except (ImportError, ValueError) as error:
        raise PerlError(f"--optim {enum_value(config.optim)} can't be used: {reason(error)}", USUAL) from error


def check_optimiser_arguments(config: TrainingArguments) -> None:
    """Raises PerlError for `--set optim_args` that the optimiser doesn't read, or that it rejects."""
    given = [part.strip() for part in (config.optim_args or "").split(",") if part.strip()]
    if not given or config.optim_target_modules:
        return
    name = enum_value(config.optim)
    for part in given:
        others = [other for other in given if other is not part]
        other_value = f"{part.partition('=')[0]}=0.12345"
        if _arguments(config, [*others, other_value]) == _arguments(config, others):
            problem = f"--set optim_args: --optim {name} doesn't read {clip(part.partition('=')[0])}"
            fields = "--set adam_beta1, adam_beta2 and adam_epsilon are fields of their own"
            raise PerlError(problem, fields if "adam" in name else "leave it out")
    kind, arguments = Trainer.get_optimizer_cls_and_kwargs(config)
    if not kind.__module__.startswith("torch."):
        return
    try:
        kind([torch.nn.Parameter(torch.zeros(1))], **arguments)
    except (TypeError, ValueError) as error:
        raise PerlError(f"--set optim_args: --optim {name} rejects them: {reason(error)}") from error


def _arguments(config: TrainingArguments, given: list[str]) -> object:
    """What the optimiser is made with for these `optim_args`; None if it can't read one."""
    changed = copy.copy(config)
    changed.optim_args = ",".join(given)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(changed)[1]
    except (ValueError, AttributeError):
        return None


def check_schedule(config: TrainingArguments) -> None:
    """Raises PerlError for `--set lr_scheduler_kwargs` that the schedule rejects, or lacks."""
    name = enum_value(config.lr_scheduler_type)
    kwargs: Any = config.lr_scheduler_kwargs or {}
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    steps = {"num_warmup_steps": 1, "num_training_steps": 10}
    try:
        get_scheduler(config.lr_scheduler_type, optimiser, **steps, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError, AttributeError) as error:
        given = f" with --set lr_scheduler_kwargs={shorten(kwargs)}" if kwargs else " without --set lr_scheduler_kwargs"
        raise PerlError(f"--set lr_scheduler_type={name}{given} can't be used: {reason(error)}") from error


def overrides(items: tuple[str, ...], kind: type[Any], own: set[str]) -> dict[str, Any]:
    """The `--set NAME=VALUE` items by name, checked against the TRL config's fields. `own` are the names of the stage's
    options. Raises PerlError with every fault."""
    types_of = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    values, faults = {}, []
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            faults.append(f"--set {clip(item)}: expected NAME=VALUE")
        elif name not in names:
            faults.append(f"--set {clip(name)}: {kind.__name__} has no such field. {nearest(name, names)}".rstrip())
        elif reason := trl_fields.why_refused(name, kind.__name__, own):
            faults.append(f"--set {name}{reason}")
        else:
            values[name], wrong = _value(name, text, types_of[name])
            faults += [f"--set {fault}" for fault in wrong]
    if faults:
        raise PerlError(listing(faults), f"--set takes the fields of trl.{kind.__name__}")
    return values


def _value(name: str, text: str, kind: object) -> tuple[Any, list[str]]:
    """The value of a field, from text in YAML, and what is wrong with it."""
    value: Any = text
    with suppress(PerlError):  # what isn't YAML stays text: a date like 2024-13-45, for example
        value = trl_fields.as_mapping(parse(text, name), kind)
    if not fits(value, kind):
        return value, [f"{name}: must be {describe(kind)}, not {shorten(value)}"]
    if isinstance(value, str) and value.startswith("~/"):  # settings.yaml writes paths in the home like this
        return os.path.expanduser(value), []
    value = convert(value, kind)
    return value, list(trl_fields.nested(name, value))

"""The TRL config of a training stage, built from its settings and checked, without side effects."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from perlcli import device, settings
from perlcli.errors import PerlError, listing, nearest, reason
from perlcli.memory import optimisers, plans
from perlcli.run import checkpoints, files
from perlcli.settings.types import convert, describe, fits
from perlcli.settings.yaml import parse
from perlcli.text import clip, enum_value, shorten
from perlcli.training import trackers

USUAL = "--optim adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor or sgd"
FUSED_BACKWARD = ("lomo", "adalomo")
Config = TypeVar("Config", bound=TrainingArguments)  # SFTConfig, RewardConfig, RLOOConfig
DECIDED = {  # the fields that perlcli sets itself
    field
    for fields in (
        # the model is loaded and the rows are rendered before TRL sees them
        "model_init_kwargs trust_remote_code chat_template_path chat_template_kwargs eos_token pad_token",
        "dataset_text_field dataset_kwargs dataset_num_proc max_length truncation_mode remove_unused_columns",
        # options of perlcli, and what follows from the machine
        "output_dir overwrite_output_dir seed use_cpu bf16 fp16 full_determinism report_to auto_find_batch_size",
        "activation_checkpointing",  # the same as gradient_checkpointing
        # every step is logged
        "disable_tqdm logging_nan_inf_filter logging_strategy logging_steps logging_first_step log_completions",
        # a resumed run ends as an uninterrupted one
        "resume_from_checkpoint save_strategy save_only_model ignore_data_skip enable_jit_checkpoint",
        "restore_callback_states_from_checkpoint",
        # evaluation comes after training, and other programs publish the result
        "do_train do_eval do_predict eval_strategy eval_steps eval_packing load_best_model_at_end num_generations_eval",
        "push_to_hub hub_token hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision",
        # one frozen base serves all roles of RL
        "use_vllm use_transformers_continuous_batching sync_ref_model",
    )
    for field in fields.split()
}

LOSS = ("assistant_only_loss", "completion_only_loss")  # what is learned is decided where rows are rendered


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


def overrides(items: tuple[str, ...], kind: type[Any], own: set[str]) -> dict[str, Any]:
    """The `--set NAME=VALUE` items by name, checked against the TRL config's fields. `own` are the fields that have an
    option of perlcli. Raises PerlError with every fault."""
    types_of = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    values, faults = {}, []
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        value: Any = text
        with suppress(PerlError):  # what isn't YAML stays text: a date like 2024-13-45, for example
            value = parse(text, name)
        if not equals:
            faults.append(f"--set {clip(item)}: expected NAME=VALUE")
        elif name not in names:
            faults.append(f"--set {clip(name)}: {kind.__name__} has no such field. {nearest(name, names)}".rstrip())
        elif name in own:
            faults.append(f"--set {name}: use the option --{settings.dashed(name)}")
        elif name in LOSS:
            faults.append(f"--set {name}: use the option --loss-on")
        elif name in DECIDED:
            faults.append(f"--set {name}: perlcli sets this itself")
        elif not fits(value, types_of[name]):
            faults.append(f"--set {name}: must be {describe(types_of[name])}, not {shorten(value)}")
        elif isinstance(value, str) and value.startswith("~/"):  # settings.yaml writes paths in the home like this
            values[name] = os.path.expanduser(value)
        else:
            values[name] = convert(value, types_of[name])
    if faults:
        raise PerlError(listing(faults), f"--set takes the fields of trl.{kind.__name__}")
    return values

"""What every training stage asks of TRL in the same way: its config, built and checked, without side effects."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

from perlcli import device, settings
from perlcli.errors import PerlError, listing, nearest, reason
from perlcli.run import checkpoints
from perlcli.run.files import CHECKPOINTS
from perlcli.settings.types import convert, describe, fits
from perlcli.settings.yaml import parse
from perlcli.text import clip, shorten

# Fields that perlcli decides: the model is loaded and the rows are rendered before TRL sees them, every step is told,
# and a run that stopped goes on as if it hadn't.
DECIDED = {
    "output_dir", "disable_tqdm", "logging_nan_inf_filter", "save_strategy", "use_cpu", "bf16", "fp16",
    "full_determinism", "model_init_kwargs", "trust_remote_code", "chat_template_path", "dataset_text_field",
    "dataset_kwargs", "dataset_num_proc", "eos_token", "pad_token", "max_length", "truncation_mode",
    "remove_unused_columns", "resume_from_checkpoint", "overwrite_output_dir", "do_train", "do_eval", "do_predict",
    "eval_strategy", "eval_steps", "load_best_model_at_end", "report_to", "seed", "chat_template_kwargs", "use_vllm",
    "use_transformers_continuous_batching", "sync_ref_model", "push_to_hub", "hub_token", "hub_model_id",
    "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "num_generations_eval", "eval_packing",
    "log_completions", "logging_strategy", "logging_steps", "logging_first_step", "save_only_model",
    "ignore_data_skip", "restore_callback_states_from_checkpoint", "enable_jit_checkpoint", "auto_find_batch_size",
}  # fmt: skip


def trl_config(kind: Any, given: settings.Training, extra: dict[str, Any]) -> Any:
    """The TRL config of this class for these settings; raises PerlError for a bad `--set` or values TRL refuses."""
    train = given.train
    on_gpu = device.kind() == "cuda"
    values: dict[str, Any] = {
        "output_dir": str(checkpoints.side(Path(str(given.run.output)).expanduser() / CHECKPOINTS)),
        "max_steps": train.max_steps if train.max_steps is not None else -1,
        "num_train_epochs": train.num_train_epochs,
        "learning_rate": train.learning_rate,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "save_strategy": "steps",
        "save_steps": given.keep.save_steps,
        "save_total_limit": None,  # of what lies at the side; `checkpoints.keep` deletes the old ones
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # else a loss that is no number is logged as 0
        "disable_tqdm": True,
        "report_to": [name.strip() for name in given.keep.report_to.split(",")],
        "seed": given.run.seed,
        "use_cpu": not on_gpu,
        "bf16": device.dtype_name(given.model) == "bfloat16",
        "fp16": device.dtype_name(given.model) == "float16",
        "gradient_checkpointing": on_gpu,  # on a CPU memory is rarely short, and it costs a third of the time
        **extra,
    }
    check_trackers(values["report_to"])
    values |= overrides(train.set, kind, {option.name for option in settings.options(type(given))})
    if any(field.name == "trust_remote_code" for field in dataclasses.fields(kind)):
        values["trust_remote_code"] = given.model.trust_remote_code  # for the reference model that TRL loads itself
    try:
        config = kind(**values)
    except Exception as error:  # each of its hundred fields is checked in another way, or not at all
        raise PerlError(f"TRL's {kind.__name__} refuses these settings: {reason(error)}") from error
    # One process drives one GPU: with several in sight, transformers would wrap the model in DataParallel, which TRL
    # refuses. The field is set behind its property, as transformers gives no other way; CUDA_VISIBLE_DEVICES chooses.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def check_trackers(names: list[str]) -> None:
    """Raise PerlError for a tracker that transformers doesn't know or that isn't installed."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    missing = [name for name in names if name not in ("none", "all", *installed)]
    if missing:
        found = ", ".join(installed) or "none"
        raise PerlError(f"--report-to {', '.join(missing)}: not installed or unknown", f"installed trackers: {found}")


def overrides(items: tuple[str, ...], kind: type[Any], own: set[str]) -> dict[str, Any]:
    """The `--set NAME=VALUE` items by name, checked against the TRL config's fields; `own` are names with an option."""
    types_of = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    values, faults = {}, []
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        try:
            value = parse(text, name)
        except PerlError:  # no YAML, such as a date like 2024-13-45
            value = text
        if not equals:
            faults.append(f"--set {clip(item)}: expected NAME=VALUE")
        elif name not in names:
            faults.append(f"--set {clip(name)}: {kind.__name__} has no such field. {nearest(name, names)}".rstrip())
        elif name in own:
            faults.append(f"--set {name}: use the option --{settings.dashed(name)}")
        elif name in DECIDED:
            faults.append(f"--set {name}: perlcli decides this itself")
        elif not fits(value, types_of[name]):
            faults.append(f"--set {name}: must be {describe(types_of[name])}, not {shorten(value)}")
        else:
            values[name] = convert(value, types_of[name])
            if isinstance(value, str) and value.startswith("~/"):  # as settings.yaml has a file below the home
                values[name] = os.path.expanduser(value)
    if faults:
        raise PerlError(listing(faults), f"--set takes the fields of trl.{kind.__name__}")
    return values

"""Settings from flat values and back, what a value may be, and what an option is that nobody set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from perlcli.errors import PerlError, nearest
from perlcli.settings.commands import OfData, Report, Stage, command_of
from perlcli.settings.declaring import dashed, options
from perlcli.settings.groups import ATTENTION
from perlcli.text import shorten

# What an option is where neither the user nor the embedded default says otherwise. Sources: the paper's settings
# (arXiv 2403.10704, section 4 and appendix) for the reward and RL learning rates, beta and temperature; TRL's
# recommendation of ten times the full-tuning rate for LoRA in SFT; TRL's defaults elsewhere.
GENERAL = {
    "max_length": 1024,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "lora_r": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": ATTENTION,
    "temperature": 0.7,
    "beta": 0.05,
    "num_generations": 4,
    "max_completion_length": 128,
}
LEARNING_RATES = {"sft": (2e-4, 2e-5), "reward": (1e-4, 1e-5), "rl": (1e-5, 1e-6)}  # LoRA, full tuning
RL_ACCUMULATION = 4


def build(stage: type[Any], values: Mapping[str, Any]) -> Any:
    """Settings of the stage with these flat values; raises PerlError for a name it doesn't have."""
    known = {item.name: item for item in options(stage)}
    unknown = [name for name in values if name not in known]
    if unknown:
        names = ", ".join(unknown)
        raise PerlError(f"Unknown setting for `perl {command_of(stage)}`: {names}", nearest(unknown[0], known))
    faults = [f"--{dashed(name)} {what}" for name, value in values.items() if (what := misfit(name, value))]
    if faults:
        raise PerlError("\n".join(faults), f"perl {command_of(stage)} --help lists the options")
    groups: dict[str, dict[str, Any]] = {item.group: {} for item in known.values()}
    for name, value in values.items():
        is_one_of_many = isinstance(value, str) and get_origin(known[name].type) is tuple
        groups[known[name].group][name] = (value,) if is_one_of_many else value
    kinds = get_type_hints(stage)
    return stage(**{group: kinds[group](**given) for group, given in groups.items()})


# Options that name a file, a folder or something on the hub.
PLACES = {
    "model", "data", "eval_data", "peft", "output", "recipe", "anchor", "reward", "adapter", "file", "dir", "run",
    "resume",
}  # fmt: skip
LARGEST = 2**53  # of numbers: above it they are no longer exact everywhere
LONGEST_TEXT, LONGEST_NAME = 4096, 255  # bytes: what systems take as a path, and as the name of a file


def misfit(name: str, value: Any) -> str:
    """Why no option can have a value, whichever stage it is of; empty where it can."""
    if isinstance(value, tuple):
        return next((what for item in value if (what := misfit(name, item))), "")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        return f"must be a finite number of at most {LARGEST:,}, not {shorten(value)}"
    return _unusable(value, is_place=name in PLACES) if isinstance(value, str) else ""


def _unusable(text: str, *, is_place: bool) -> str:
    """Why a text can be neither written to a file nor, where it is a place, name one."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return f"must be text in UTF-8, not {shorten(text)}"
    if "\0" in text:
        return f"must be text without NUL characters, not {shorten(text)}"
    if not is_place:
        return ""
    if size > LONGEST_TEXT or max(len(part.encode()) for part in text.split("/")) > LONGEST_NAME:
        return f"is longer than any name of a file: {shorten(text)}"
    try:
        Path(text).expanduser()
    except RuntimeError:
        return f"{shorten(text)}: there is no such home folder"
    return ""


def flat(settings: Stage | OfData | Report) -> dict[str, Any]:
    """The settings as one flat mapping of option names to values."""
    return {item.name: getattr(getattr(settings, item.group), item.name) for item in options(type(settings))}


def resolve(settings: Any, preset: Mapping[str, Any]) -> Any:
    """The same settings with every unset option filled from the preset, else from the general defaults."""
    values = flat(settings)
    command = command_of(settings)
    defaults: dict[str, Any] = {**GENERAL, "output": f"runs/{command}"}
    if command == "rl":
        defaults["gradient_accumulation_steps"] = RL_ACCUMULATION
    if command in LEARNING_RATES:
        defaults["learning_rate"] = LEARNING_RATES[command][1 if values["full"] else 0]
    defaults.update(preset)
    if values.get("algorithm") == "reinforce":
        defaults["num_generations"] = 1
    if values.get("max_steps") is not None or values.get("num_train_epochs") is not None:
        defaults.pop("max_steps", None)  # the user's choice of length, not the preset's
    if values.get("full") or values.get("peft"):
        defaults = {name: value for name, value in defaults.items() if not name.startswith("lora_")}
    for name in values:
        if (values[name] is None or values[name] is False) and name in defaults:
            values[name] = defaults[name]
    if "set" in values:  # a preset's fields, but for those that the user sets otherwise
        named = {item.partition("=")[0] for item in values["set"]}
        kept = (item for item in defaults.get("set", ()) if item.partition("=")[0] not in named)
        values["set"] = (*kept, *values["set"])
    if values.get("algorithm") == "reinforce" and values.get("value_learning_rate", 0) is None:
        values["value_learning_rate"] = values["learning_rate"]
    if values.get("lora_alpha", 0) is None and (values["lora_r"] or 0) > 0 and not values["peft"]:
        values["lora_alpha"] = 2 * values["lora_r"]
    return build(type(settings), values)

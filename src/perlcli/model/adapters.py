"""Which adapter a stage trains: LoRA or DoRA by options, or another type that can share a base, by a peft config."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from perlcli.errors import PerlError, line, nearest
from perlcli.model.sources import kind_of
from perlcli.model.target_modules import (
    ALL_LINEAR,
    HEADS,
    NO_TEXT,
    experts,
    patterns_fault,
    target_modules,
    without_text,
)
from perlcli.model.weights import ADAPTER_CONFIG
from perlcli.settings import ATTENTION, LoraSettings, ModelSettings
from perlcli.settings.types import describe, fits, is_plain
from perlcli.text import enum_value, markdown_table, shorten


@dataclass(frozen=True)
class Kind:
    """A peft type of which one base can carry several, one per role, and the bits of the bases that it works on."""

    name: str
    bits: tuple[int, ...] = (16,)


# tests/model/test_adapters.py tries each: several on one base, switched, turned off, trained, saved and loaded.
KINDS = {
    "LORA": Kind("LoRA", (16, 8, 4)),
    "LOHA": Kind("LoHa", (16, 8)),
    "LOKR": Kind("LoKr", (16, 8)),
    "IA3": Kind("IA3"),
    "VERA": Kind("VeRA", (16, 8, 4)),
    "OFT": Kind("OFT", (16, 8, 4)),
    "MISS": Kind("MiSS", (16, 8, 4)),
    "HIRA": Kind("HiRA", (16, 8, 4)),
    "DELORA": Kind("DeLoRA"),
    "RANDLORA": Kind("RandLoRA"),
}
DORA = Kind("DoRA", (16, 4))  # peft's takes the scales of 8-bit weights, which bitsandbytes (0.50) then misses
ON_THE_TEXT = "it changes the model's input, not its weights: policy, anchor and reward would read different tokens"
NOT_AT_THE_BASE = "a fresh one already differs from its base: the policy would not start at its anchor"
UNPROVEN = "not shown to work with several roles on one base"
REASONS = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), ON_THE_TEXT),
    **dict.fromkeys(("ADAPTION_PROMPT", "CPT", "CARTRIDGE"), ON_THE_TEXT),
    **dict.fromkeys(("FOURIERFT", "C3A", "VBLORA", "UNILORA", "HRA", "DEFT", "FROD", "OSF"), NOT_AT_THE_BASE),
    "ADALORA": "peft allows only one trainable AdaLoRA per base, and TRL never calls the step that moves its ranks",
    "LN_TUNING": "it replaces norms of the base instead of adding to weights",
    "TRAINABLE_TOKENS": "it replaces embeddings of the base instead of adding to weights",
}
PREFIXES = tuple(sorted({prefix for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix}))  # of parameters' names
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base's weights
STARTS_AT_BASE = (True, "gaussian")  # initialisations of an adapter that adds nothing at first
MOVED = "it changes the weights of the base, which other roles share"
FIELDS = {
    "bias": "it trains the biases of the base, which other roles share",
    "modules_to_save": "it trains modules of the base; a reward's head is always trained and need not be listed",
    "trainable_token_indices": "it trains embeddings of the base, which other roles share",
    "layer_replication": "it changes the layers of the base, which other roles share",
    "alora_invocation_tokens": "it only acts after certain tokens, which TRL doesn't pass on to peft",
    **dict.fromkeys(("loftq_config", "corda_config", "lora_ga_config"), MOVED),
    **dict.fromkeys(("eva_config", "velora_config", "monteclora_config", "use_bdlora"), UNPROVEN),
    **dict.fromkeys(("arrow_config", "kasa_config", "use_qalora", "megatron_config"), UNPROVEN),
}
IGNORED = {"base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "runtime_config"}
SIZES = ("r", "lora_alpha", "alpha", "oft_block_size")
LARGEST = 4  # times the parameters of the model: a larger adapter is a typing error that would fill the memory
HINT = "docs/adapters.md lists the types and fields that --peft accepts"


def words(config: PeftConfig) -> str:
    """An adapter for people to read: `DoRA r=16, alpha=32`."""
    sizes = [f"{size.removeprefix('lora_')}={getattr(config, size)}" for size in SIZES if getattr(config, size, 0)]
    return f"{_kind(config).name} {', '.join(sizes)}".strip()


def name_of(kind: str) -> str:
    """A peft type as its authors write it."""
    return KINDS[kind].name if kind in KINDS else kind


def as_lora(config: PeftConfig) -> LoraConfig | None:
    """The config if it is LoRA or DoRA; None for any other type (AdaLoRA's class is derived from LoRA's)."""
    return config if isinstance(config, LoraConfig) and kind_of(config) == "LORA" else None


def _kind(config: PeftConfig) -> Kind:
    lora, name = as_lora(config), kind_of(config)
    return DORA if lora is not None and lora.use_dora else KINDS.get(name, Kind(name))


# A new adapter


def asked(lora: LoraSettings, task: str) -> PeftConfig:
    """The peft config of a new adapter, before its modules are chosen. Raises PerlError for an unusable --peft file."""
    if lora.peft is not None:
        return read(lora.peft, task)
    rank, alpha = int(lora.lora_r or 0), int(lora.lora_alpha or 0)  # resolved before a model is loaded
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=lora.lora_dropout or 0.0, use_dora=lora.use_dora, task_type=task
    )


def on_model(lora: LoraSettings, model: nn.Module, task: str) -> PeftConfig:
    """The peft config of a new adapter for this model. Raises PerlError for modules that the model doesn't have."""
    config: Any = asked(lora, task)
    if lora.peft is None:
        config.target_modules = target_modules(model, str(lora.lora_target_modules))
        if lora.lora_target_modules == ALL_LINEAR:
            reach_experts(config, model)
    elif config.target_modules is None:
        config.target_modules = target_modules(model, ATTENTION)
    elif not isinstance(config.target_modules, str):  # a string is a regular expression, which peft reads
        target_modules(model, ",".join(sorted(config.target_modules)), option=f"--peft {lora.peft}: target_modules")
    _leave_out_towers(config, model, where=f"--peft {lora.peft}")
    if kind_of(config) == "IA3" and config.feedforward_modules is None:
        config.feedforward_modules = []
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    return config


def reach_experts(config: LoraConfig, model: nn.Module) -> None:
    """Put a LoRA adapter for all linear modules on the experts too, whose weights transformers keeps in parameters for
    all of a layer. peft does so itself for the families that had linear modules before transformers 5."""
    known = experts(model)
    by_peft = copy.copy(config)
    convert_peft_config_for_transformers(by_peft, model, None)
    if known and not by_peft.target_parameters:
        config.target_parameters = known


def apart(one: PeftConfig | None, other: PeftConfig | None) -> str | None:
    """Why two adapters can't be on one base; None if they can. peft nests the layers of parameters, so that all its
    adapters have to name the same ones."""
    mine, its = (set(getattr(config, "target_parameters", None) or ()) for config in (one, other))
    if not mine or not its or mine == its:
        return None
    return f"target_parameters={shorten(sorted(its))}, but {shorten(sorted(mine))} on the same base"


def _leave_out_towers(config: Any, model: nn.Module, where: str) -> None:
    """Keep the adapter off modules that text never reaches. Raises PerlError if an expression of the user's chooses
    one."""
    silent = without_text(model)
    if silent is None:
        return
    chosen = [
        name for name, _ in model.named_modules() if name and re.fullmatch(silent, name) and _is_chosen(config, name)
    ]
    if not chosen:
        return
    if isinstance(config.target_modules, str) and config.target_modules != ALL_LINEAR:
        problem = f"{where}: target_modules {shorten(config.target_modules)} matches {chosen[0]}, {NO_TEXT}"
        raise PerlError(problem, f'in the file: "exclude_modules": {json.dumps(silent)}')
    own = config.exclude_modules
    if own and not isinstance(own, str):
        own = rf"(.*\.)?({'|'.join(map(re.escape, sorted(own)))})"  # as peft matches a list
    config.exclude_modules = f"{own}|{silent}" if own else silent


def _is_chosen(config: Any, name: str) -> bool:
    return config.target_modules == ALL_LINEAR or bool(check_target_module_exists(config, name))


def dropout_of(lora: LoraSettings, task: str) -> float:
    """The dropout that an adapter trains with. Raises PerlError for a --peft file that can't be used."""
    return float(getattr(asked(lora, task), "lora_dropout", 0.0)) if lora.peft else lora.lora_dropout or 0.0


def try_on(lora: LoraSettings, model: nn.Module, task: str) -> int:
    """Count a new adapter's parameters on a model without weights, which it changes. Raises PerlError on a misfit."""
    config: Any = on_model(lora, model, task)
    config.modules_to_save = None
    where = f"--peft {lora.peft}" if lora.peft else words(config)
    fault = patterns_fault(config, lambda: model)
    if fault is not None:
        raise PerlError(f"{where}: {fault}")
    total = sum(parameter.numel() for parameter in model.parameters())
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, config)
    except Exception as error:  # peft checks few of its values; computing with the others raises errors of any type
        raise PerlError(f"{where}: peft can't put it on this model: {line(error)}") from error
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    if trained > LARGEST * total:
        problem = (
            f"{where}: the adapter would have {trained:,} parameters, more than {LARGEST} times the model's {total:,}"
        )
        raise PerlError(problem, "use a lower rank")
    return trained


# Files


def read(file: str, task: str) -> PeftConfig:
    """The peft config in a file, for a stage that trains this task. Raises one PerlError with every fault in it."""
    values = content(file)
    kind: Any = values.get("peft_type")
    known, one_of = sorted(map(enum_value, PEFT_TYPE_TO_CONFIG_MAPPING)), f"one of {', '.join(KINDS)}"
    if kind not in known:
        what = "no peft_type" if kind is None else f"peft_type {shorten(kind)}, which peft does not know"
        raise PerlError(f"--peft {file} has {what}", nearest(str(kind).upper(), known) or one_of)
    if kind not in KINDS:
        raise PerlError(f"--peft {file}: {kind} can't be trained here: {REASONS.get(kind, UNPROVEN)}", one_of)
    values = {name: value for name, value in values.items() if name not in IGNORED}
    kept = values.get("modules_to_save")
    if task == "SEQ_CLS" and isinstance(kept, list) and all(name in HEADS for name in kept):
        del values["modules_to_save"]
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    faults = list(_faults(values, config_class, task))
    if faults:
        raise PerlError("\n".join(f"--peft {file}: {fault}" for fault in faults), HINT)
    try:
        return config_class(**{**values, "task_type": task})
    except (ValueError, TypeError) as error:
        raise PerlError(f"--peft {file}: peft rejects it: {line(error)}") from error


def content(file: str) -> dict[str, object]:
    """The JSON object in a file; raises PerlError if the file has none."""
    path = Path(file).expanduser()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PerlError(f"--peft {file} does not exist") from None
    except IsADirectoryError:
        raise PerlError(f"--peft {file} is a folder", f"name a file, for example {path / ADAPTER_CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PerlError(f"--peft {file} can't be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise PerlError(f"--peft {file} is not a JSON object", 'for example {"peft_type": "LOHA", "r": 8}')
    if not is_plain(values):
        raise PerlError(f"--peft {file} has a number beyond 64 bits, or text that is not valid Unicode")
    return values


def _faults(values: Mapping[str, object], config_class: Any, task: str) -> Iterator[str]:
    types = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, value in values.items():
        if name not in fields:
            yield f"{config_class.__name__} has no field {name}. {nearest(name, fields)}".rstrip()
        elif name == "task_type":
            if value not in (None, task):
                yield f"task_type {value}, but this stage trains {task}; leave it out"
        elif name in FIELDS:
            if _is_set(value, fields[name]):
                yield f"{name}={shorten(value)}: {FIELDS[name]}"
        elif name.startswith("init_"):
            yield from _initialisation(name, value)
        elif not fits(value, types[name]):
            yield f"{name} must be {describe(types[name])}, not {shorten(value)}"
        else:
            yield from _size(name, value, fields[name].default)
            yield from _dropout(name, value)


def _size(name: str, value: Any, default: object) -> Iterator[str]:
    """Sizes that peft takes, but with which an adapter adds nothing, and those at which it fails later."""
    if name in ("r", "lora_alpha", "alpha") and default and value is not None and value <= 0:  # OFT's r may be 0
        yield f"{name} must be above 0, not {value}"
    elif name in ("rank_pattern", "alpha_pattern"):
        kind = int if name == "rank_pattern" else float
        for each, size in value.items():
            if not fits(size, kind) or float(size) <= 0:
                yield f"{name}: {each} must be {describe(kind)} above 0, not {shorten(size)}"
    elif name == "target_modules" and value is not None and not value:
        yield "target_modules must not be empty; without it, the attention projections get the adapter"


def _is_set(value: object, field: dataclasses.Field[Any]) -> bool:
    return value not in (None, {}, []) and value != field.default


def _initialisation(name: str, value: object) -> Iterator[str]:
    if isinstance(value, str) and value.startswith(MOVES_BASE):
        yield f"{name}={value}: {MOVED}"
    elif value is False or (isinstance(value, str) and value not in STARTS_AT_BASE):
        yield f"{name}={json.dumps(value)}: {NOT_AT_THE_BASE}"
    elif value not in STARTS_AT_BASE and value is not None:
        yield f"{name} must be true or gaussian, not {shorten(value)}"


def _dropout(name: str, value: Any) -> Iterator[str]:
    if name == "lora_dropout" and not 0 <= value < 1:
        yield f"lora_dropout must be at least 0 and below 1, not {value}"
    elif name.endswith("_dropout") and name != "lora_dropout" and value:
        yield f"{name}={value}: TRL turns dropout off, and perlcli only restores LoRA's"


def table() -> str:
    """The kinds that --peft accepts as a Markdown table, for the documentation."""
    rows = [(f"`{kind}`", each.name, f"{', '.join(map(str, each.bits))} bits") for kind, each in KINDS.items()]
    return markdown_table(("`peft_type`", "adapter", "precision of the base"), rows)


def refusals() -> str:
    """What --peft rejects and why as a Markdown table, for the documentation."""
    reasons: dict[str, list[str]] = {}
    for name, reason in (REASONS | FIELDS).items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    rows = [(", ".join(names), reason) for reason, names in reasons.items()]
    starts = ", ".join(f"`{name}`" for name in MOVES_BASE)
    rows.append((f"`init_lora_weights` set to {starts}", MOVED))
    rows.append(("any initialisation other than `true` or `gaussian`", NOT_AT_THE_BASE))
    return markdown_table(("rejected", "reason"), rows)


# Existing adapters


def check_kind(config: PeftConfig, what: str, hint: str = "") -> None:
    """Raises PerlError for an adapter of a type that can't share a base; `what` names the adapter in the error."""
    kind = kind_of(config)
    if kind not in KINDS:
        raise PerlError(f"{what} is {kind}, which can't be trained here: {REASONS.get(kind, UNPROVEN)}", hint)


def moves_base(config: PeftConfig) -> bool:
    """Whether loading an adapter changes weights of its base, by its initialisation."""
    return str(getattr(config, "init_lora_weights", True)).lower().startswith(MOVES_BASE)


def why_alone(config: PeftConfig) -> str | None:
    """Why an existing adapter can't share its base with other roles; None if it can."""
    if moves_base(config):
        return f"init_lora_weights={getattr(config, 'init_lora_weights', None)}: {MOVED}"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in FIELDS and field.name != "modules_to_save" and _is_set(value, field):
            return f"{field.name}={shorten(value)}: {FIELDS[field.name]}"
        for fault in _dropout(field.name, value):
            return fault
    return None


def check_precision(config: PeftConfig, values: ModelSettings, what: str) -> None:
    """Raises PerlError if peft has no layers of this type for a quantised base; `what` names the adapter."""
    if not (values.load_in_4bit or values.load_in_8bit):
        return
    kind, bits = _kind(config), 4 if values.load_in_4bit else 8
    if bits not in kind.bits:
        able = ", ".join(each.name for each in KINDS.values() if bits in each.bits)
        problem = f"{what} is {kind.name}, which does not work on a base in {bits} bits"
        raise PerlError(problem, f"use a base in 16 bits, or another adapter: {able}")

"""Which adapter a stage trains: LoRA and DoRA by option, any other that can share a base by a peft config in a file."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from perlcli.errors import PerlError, line, nearest
from perlcli.model import sources, weights
from perlcli.model.target_modules import target_modules
from perlcli.settings import ATTENTION, LoraSettings, ModelSettings
from perlcli.settings.types import describe, fits, is_plain
from perlcli.text import enum_value, markdown_table, shorten


@dataclass(frozen=True)
class Kind:
    """A type of peft's that several roles can have on one base, and the quantised bases that it works on."""

    name: str
    on_4bit: bool = False
    on_8bit: bool = False


# Each was tried as in tests/model/test_adapters.py: several on one base, switched, off, training, saved and loaded.
KINDS = {
    "LORA": Kind("LoRA", on_4bit=True, on_8bit=True),
    "LOHA": Kind("LoHa", on_8bit=True),
    "LOKR": Kind("LoKr", on_8bit=True),
    "IA3": Kind("IA3"),
    "VERA": Kind("VeRA", on_4bit=True, on_8bit=True),
    "OFT": Kind("OFT", on_4bit=True, on_8bit=True),
    "MISS": Kind("MiSS", on_4bit=True, on_8bit=True),
    "HIRA": Kind("HiRA", on_4bit=True, on_8bit=True),
    "DELORA": Kind("DeLoRA"),
    "RANDLORA": Kind("RandLoRA"),
}
DORA = Kind("DoRA", on_4bit=True)  # peft's reads the scales of 8-bit weights, which bitsandbytes (0.50) then misses
ON_THE_TEXT = "it adds to what the model reads, not to its weights: policy, anchor and reward would read other tokens"
NOT_AT_THE_BASE = "a fresh one is not yet its base: the policy would not begin at its anchor"
UNPROVEN = "there is no proof that several roles can have one on a base"
REASONS = {
    **dict.fromkeys(
        (
            "PROMPT_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "ADAPTION_PROMPT",
            "CPT",
            "CARTRIDGE",
        ),
        ON_THE_TEXT,
    ),
    **dict.fromkeys(("FOURIERFT", "C3A", "VBLORA", "UNILORA", "HRA", "DEFT", "FROD", "OSF"), NOT_AT_THE_BASE),
    "ADALORA": "peft lets one such adapter train on a base, and TRL does not call what shifts its ranks",
    "LN_TUNING": "it puts norms of its own in the place of the base's, and adds nothing to weights",
    "TRAINABLE_TOKENS": "it puts embeddings of its own in the place of the base's, and adds nothing to weights",
}
PREFIXES = tuple(sorted({prefix for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix}))  # of parameters' names
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that take the adapter off the base
BEGINS_AT_BASE = (True, "gaussian")  # initialisations that add nothing at first
MOVED = "it moves the weights of the base, which serves other roles too"
FIELDS = {
    "bias": "it trains the biases of the base, which serves other roles too",
    "modules_to_save": "it trains modules of the base; a reward's head needs no word",
    "trainable_token_indices": "it trains embeddings of the base, which serves other roles too",
    "target_parameters": "peft puts one such adapter on a base, and roles need one each",
    "layer_replication": "it changes the layers of the base, which serves other roles too",
    "alora_invocation_tokens": "it acts behind certain tokens alone, and TRL tells peft of none",
    **dict.fromkeys(("loftq_config", "corda_config", "lora_ga_config"), MOVED),
    **dict.fromkeys(
        ("eva_config", "velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "use_qalora",
         "megatron_config"), UNPROVEN,
    ),
}  # fmt: skip
NO_MATTER = {"base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "runtime_config"}
HEADS = ("classifier", "score")  # what peft itself writes as modules_to_save of a reward
SIZES = ("r", "lora_alpha", "alpha", "oft_block_size")
HINT = "docs/adapters.md lists the types and fields that --peft takes"


def kind_of(config: Any) -> str:
    """The type of a peft config as peft writes it: LORA, LOHA, …"""
    return enum_value(config.peft_type)


def words(config: Any) -> str:
    """An adapter for a person to read: `DoRA r=16, alpha=32`."""
    name = DORA.name if getattr(config, "use_dora", False) else name_of(kind_of(config))
    sizes = [f"{size.removeprefix('lora_')}={getattr(config, size)}" for size in SIZES if getattr(config, size, 0)]
    return " ".join([name, ", ".join(sizes)]).strip()


def name_of(kind: str) -> str:
    """A type as its authors write it."""
    return KINDS[kind].name if kind in KINDS else kind


def asked(lora: LoraSettings, task: str) -> Any:
    """The peft config of a new adapter, without its modules, which depend on the model. Raises PerlError."""
    if lora.peft is not None:
        return read(lora.peft, task)
    rank, alpha = int(lora.lora_r or 0), int(lora.lora_alpha or 0)  # resolved before a model is loaded
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=lora.lora_dropout or 0.0, use_dora=lora.use_dora, task_type=task
    )


def on_model(lora: LoraSettings, model: nn.Module, task: str) -> Any:
    """The peft config of a new adapter of this model. Raises PerlError for modules that it doesn't have."""
    config = asked(lora, task)
    if lora.peft is None:
        config.target_modules = target_modules(model, str(lora.lora_target_modules))
    else:
        _choose_modules(config, model, lora.peft)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    return config


def _choose_modules(config: Any, model: nn.Module, file: str) -> None:
    """Fill in the modules that a file leaves open: every attention projection."""
    wanted = config.target_modules
    if wanted is None:
        config.target_modules = target_modules(model, ATTENTION)
    elif not isinstance(wanted, str):  # text is an expression, which peft reads
        target_modules(model, ",".join(sorted(wanted)), option=f"--peft {file}: target_modules")
    if kind_of(config) == "IA3" and config.feedforward_modules is None:
        config.feedforward_modules = []


def dropout_of(lora: LoraSettings, task: str) -> float:
    """The dropout that a new or given adapter trains with."""
    return float(getattr(asked(lora, task), "lora_dropout", 0.0)) if lora.peft else lora.lora_dropout or 0.0


def try_on(lora: LoraSettings, model: nn.Module, task: str) -> int:
    """How many parameters a new adapter has on a model without weights; raises PerlError where peft can't put it on."""
    config = on_model(lora, model, task)
    config.modules_to_save = None
    where = f"--peft {lora.peft}" if lora.peft else f"{words(config)}"
    if wrong := sources.expressions_fault(config, lambda: model):
        raise PerlError(f"{where}: {wrong}")
    try:
        with torch.device("meta"):
            found = get_peft_model(model, config)
    except Exception as error:  # peft checks few of its values, and what it computes with the others raises as it likes
        raise PerlError(f"{where}: peft can't put it on this model: {line(error)}") from error
    return sum(parameter.numel() for parameter in found.parameters() if parameter.requires_grad)


# Files


def read(file: str, task: str) -> Any:
    """The peft config in a file, for a stage that trains this task. Raises one PerlError with every fault of it."""
    values = content(file)
    kind = values.get("peft_type")
    known = sorted(map(enum_value, PEFT_TYPE_TO_CONFIG_MAPPING))
    if kind not in known:
        what = "no peft_type" if kind is None else f"peft_type {shorten(kind)}, which peft does not know"
        raise PerlError(f"--peft {file} has {what}", nearest(str(kind).upper(), known) or f"one of {', '.join(KINDS)}")
    if kind not in KINDS:
        raise PerlError(f"--peft {file}: {kind} can't be trained here: {_reason(kind)}", f"one of {', '.join(KINDS)}")
    values = {name: value for name, value in values.items() if name not in NO_MATTER}
    kept = values.pop("modules_to_save", None)
    if kept is not None and not (task == "SEQ_CLS" and isinstance(kept, list) and all(name in HEADS for name in kept)):
        values["modules_to_save"] = kept
    faults = list(_faults(values, PEFT_TYPE_TO_CONFIG_MAPPING[kind], task))
    if faults:
        raise PerlError("\n".join(f"--peft {file}: {fault}" for fault in faults), HINT)
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**{**values, "task_type": task})
    except (ValueError, TypeError) as error:
        raise PerlError(f"--peft {file}: peft refuses it: {line(error)}") from error


def content(file: str) -> dict[str, Any]:
    """A file's JSON object; raises PerlError where there is none."""
    path = Path(file).expanduser()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PerlError(f"--peft {file} does not exist") from None
    except IsADirectoryError:
        raise PerlError(f"--peft {file} is a folder", f"name a file, as {path / weights.ADAPTER_CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PerlError(f"--peft {file} can't be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise PerlError(f"--peft {file} holds no JSON object", 'as {"peft_type": "LOHA", "r": 8}')
    if not is_plain(values):
        raise PerlError(f"--peft {file} holds a number or a character that nothing can use")
    return values


def _faults(values: dict[str, Any], kind: Any, task: str) -> typing.Iterator[str]:
    types = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in fields:
            yield f"{kind.__name__} has no field {name}. {nearest(name, fields)}".rstrip()
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
            yield from _dropout(name, value)


def _is_set(value: Any, field: Any) -> bool:
    return value not in (None, {}, []) and value != field.default


def _initialisation(name: str, value: Any) -> typing.Iterator[str]:
    if isinstance(value, str) and value.startswith(MOVES_BASE):
        yield f"{name}={value}: {MOVED}"
    elif value is False or (isinstance(value, str) and value not in BEGINS_AT_BASE):
        yield f"{name}={json.dumps(value)}: {NOT_AT_THE_BASE}"
    elif value not in BEGINS_AT_BASE and value is not None:
        yield f"{name} must be true or gaussian, not {shorten(value)}"


def _dropout(name: str, value: Any) -> typing.Iterator[str]:
    if name == "lora_dropout" and not 0 <= value < 1:
        yield f"lora_dropout must be from 0 to below 1, not {value}"
    elif name.endswith("_dropout") and name != "lora_dropout" and value:
        yield f"{name}={value}: TRL turns dropout off, and only LoRA's is put back"


def _reason(kind: str) -> str:
    return REASONS.get(kind, UNPROVEN)


def table() -> str:
    """The kinds that --peft takes as a Markdown table, for the documentation."""
    rows = []
    for kind, each in KINDS.items():
        bits = ["16", *(["8"] if each.on_8bit else []), *(["4"] if each.on_4bit else [])]
        rows.append((f"`{kind}`", each.name, f"{', '.join(bits)} bits"))
    return markdown_table(("`peft_type`", "is", "on a base in"), rows)


def refusals() -> str:
    """What --peft refuses and why as a Markdown table, for the documentation."""
    reasons: dict[str, list[str]] = {}
    for name, reason in (REASONS | FIELDS).items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    rows = [(", ".join(names), reason) for reason, names in reasons.items()]
    starts = ", ".join(f"`{name}`" for name in MOVES_BASE)
    rows.append((f"`init_lora_weights` of {starts}", MOVED))
    rows.append(("any other initialisation than `true` or `gaussian`", NOT_AT_THE_BASE))
    return markdown_table(("refused", "because"), rows)


# Adapters that are there


def check_kind(config: Any, what: str, hint: str = "") -> None:
    """Raise PerlError for an adapter of a type that can't share a base; `what` names it."""
    if kind_of(config) not in KINDS:
        raise PerlError(f"{what} is {kind_of(config)}, which can't be trained here: {_reason(kind_of(config))}", hint)


def moves_base(config: Any) -> bool:
    """Whether the initialisation of an adapter changes weights of its base as it is loaded."""
    return str(getattr(config, "init_lora_weights", True)).lower().startswith(MOVES_BASE)


def why_alone(config: Any) -> str | None:
    """Why an adapter that is there can't share its base with other roles; None where it can."""
    if moves_base(config):
        return f"init_lora_weights={config.init_lora_weights}: {MOVED}"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in FIELDS and field.name != "modules_to_save" and _is_set(value, field):
            return f"{field.name}={shorten(value)}: {FIELDS[field.name]}"
        for fault in _dropout(field.name, value):
            return fault
    return None


def check_precision(config: Any, values: ModelSettings, what: str) -> None:
    """Raise PerlError where peft has no layers of this type for a quantised base."""
    kind = KINDS.get(kind_of(config), Kind(kind_of(config)))
    if getattr(config, "use_dora", False):
        kind = DORA
    wanted = "4" if values.load_in_4bit else "8" if values.load_in_8bit else ""
    if not wanted or (kind.on_4bit if wanted == "4" else kind.on_8bit):
        return
    able = [each.name for each in KINDS.values() if (each.on_4bit if wanted == "4" else each.on_8bit)]
    raise PerlError(
        f"{what} is {kind.name}, which does not work on a base in {wanted} bits",
        f"a base in 16 bits, or another adapter: {', '.join(able)}",
    )

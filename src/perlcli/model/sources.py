"""Where a model name leads: to a base, or to an adapter and its base. Only configs are read."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from perlcli import coffee
from perlcli.errors import PerlError, line
from perlcli.model import places, weights
from perlcli.model.auto_classes import architectures, causal_class
from perlcli.model.target_modules import patterns_fault
from perlcli.model.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from perlcli.run.record import RunRecord, find_record
from perlcli.settings import place_fault, types
from perlcli.text import enum_value, shorten

if TYPE_CHECKING:  # peft takes seconds to import, and a base needs none of it
    from peft import PeftConfig

# The field of a peft type's config that names further weights, which peft loads from any kind of file.
ELSEWHERE = {
    "XLORA": "adapters",
    "SHADOW": "shadow_model",
    "MULTITASK_PROMPT_TUNING": "prompt_tuning_init_state_dict_path",
}
TRUST = "read the code first; --trust-remote-code runs it"
NEEDS_TRUST = "trust_remote_code=True"  # in transformers' error for a model whose own code would have to run
# The fields that are read from an adapter's config, which peft doesn't check.
ADAPTER_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("base_model_name_or_path", "bias"), str | None),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), str | list[str] | None),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), float),
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "r": int | dict,
    "use_dora": bool | None,
    "modules_to_save": list[str] | None,
    "layers_to_transform": int | list[int] | None,
}


@dataclass(frozen=True)
class Source:
    """Where a model name leads: to a base, or to an adapter and the base that its config names."""

    name: str  # as the user typed it
    base: str  # a folder or Hub id, as is the adapter
    config: PreTrainedConfig  # of the base
    adapter: str | None = None
    adapter_config: PeftConfig | None = None

    @property
    def place(self) -> str:
        """The folder or Hub id of the adapter, or of the base if there is no adapter."""
        return self.adapter or self.base

    @cached_property
    def record(self) -> RunRecord | None:
        """The record of the run that left the adapter or base; None if no run did. Raises PerlError if unreadable."""
        return find_record(self.place)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the base's weights; empty for a Hub base that was not downloaded yet."""
        return weights.fingerprint(self.base)

    @property
    def adapter_fingerprint(self) -> str | None:
        """The fingerprint of the adapter's weights and config; None without an adapter."""
        return weights.fingerprint(self.adapter) if self.adapter else None

    @property
    def is_classifier(self) -> bool:
        """Whether this is a reward model: an adapter with a head, or a full sequence classifier."""
        if self.adapter_config is not None:
            return task_of(self.adapter_config) == "SEQ_CLS"
        return any("ForSequenceClassification" in name for name in architectures(self.config))

    @property
    def is_embedded(self) -> bool:
        """Whether the base is the one that comes with perlcli, in this environment or another."""
        return places.is_embedded(self.base)

    @property
    def base_name(self) -> str:
        """The base's name for people."""
        return coffee.NAME if self.is_embedded else self.base


def locate(name: str | None, *, option: str = "--model", trust_remote_code: bool = False) -> Source:
    """The model that a Hub id or folder leads to; None: the embedded base. Raises PerlError, which blames `option`."""
    if name is None:
        return Source(coffee.NAME, str(coffee.BASE), _config(str(coffee.BASE), option, trust_remote_code))
    found = places.find(name, option)
    place = found.where
    if not found.is_adapter:
        return Source(name, place, _config(place, option, trust_remote_code))
    adapter_config = _adapter_config(place, option)
    base = _base_of(name, adapter_config, option)
    source = Source(name, base, _base_config(name, base, trust_remote_code), place, adapter_config)
    fault = patterns_fault(adapter_config, lambda: skeleton(source, trust_remote_code=trust_remote_code))
    if fault is not None:
        raise PerlError(f"{option} {name}: {ADAPTER_CONFIG}: {fault}")
    return source


def check_adapter_weights(place: str) -> None:
    """Raises PerlError if an adapter's weights are not safetensors: peft would load a pickle, from the Hub too."""
    if Path(place).is_dir():
        if (Path(place) / ADAPTER_CONFIG).exists():
            _adapter_config(place, "The adapter")
        weights.check(place, "The adapter")
        if not (Path(place) / ADAPTER_WEIGHTS).exists():
            raise PerlError(f"The adapter {place} has no {ADAPTER_WEIGHTS}", "train it again, or restore the file")
    elif weights.file_of(place, ADAPTER_WEIGHTS) is None:
        raise PerlError(f"The adapter {place} has no {ADAPTER_WEIGHTS} that the Hub can provide", weights.CONVERT)


def kind_of(config: PeftConfig) -> str:
    """The type of an adapter as peft writes it: LORA, LOHA, …"""
    return enum_value(config.peft_type)


def task_of(config: PeftConfig) -> str:
    """The task of an adapter as peft writes it: CAUSAL_LM, SEQ_CLS, …; None as text if it was saved without one."""
    return enum_value(config.task_type)


def skeleton(source: Source, *, trust_remote_code: bool = False) -> nn.Module | None:
    """The base's modules without weights, to look at names and shapes; None if it can't be built without weights."""
    try:
        return built(source, trust_remote_code=trust_remote_code)
    except Exception:  # not a language model, or modelling code that computes while it is built: `checks` says so
        return None


def built(source: Source, *, trust_remote_code: bool = False) -> nn.Module:
    """The base's modules without weights. Raises what transformers or the model's own code raises if it can't be."""
    with torch.device("meta"):
        model: nn.Module = causal_class(source.config).from_config(source.config, trust_remote_code=trust_remote_code)
    return model


def same_base(one: Source, other: Source) -> bool:
    """Whether two sources have the same base weights: the same place, or equal fingerprints."""
    return one.base == other.base or (bool(one.fingerprint) and one.fingerprint == other.fingerprint)


def _adapter_config(place: str, option: str) -> PeftConfig:
    """The config of an adapter in a folder or on the Hub, its fields checked. Raises PerlError."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(place)
    except KeyError as error:  # from peft's table of its types
        problem = f"{ADAPTER_CONFIG} has peft_type {_json(error.args[0])}, which peft does not know"
        raise PerlError(f"{option} {place}: {problem}", "a newer peft may know it") from error
    except Exception as error:  # peft passes whatever the file contains to the constructor of a class
        raise PerlError(f"{option} {place}: {ADAPTER_CONFIG} can't be read: {line(error)}") from error
    fault = _field_fault(config)
    if fault:
        raise PerlError(f"{option} {place}: {ADAPTER_CONFIG} can't be used: {fault}")
    elsewhere = ELSEWHERE.get(kind_of(config), "")
    if getattr(config, elsewhere, None):
        problem = f"{option} {place} is a {kind_of(config)} adapter whose {elsewhere} names other files to load"
        raise PerlError(problem, "use an adapter whose weights are all in its own folder")
    return config


def _field_fault(config: PeftConfig) -> str:
    """What is wrong with the first unusable field of an adapter's config; empty if nothing is."""
    own: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(config)}
    values: dict[str, Any] = {name: getattr(config, name) for name in own}
    for name in [name for name in ADAPTER_FIELDS if name in own]:
        value, kind = values[name], ADAPTER_FIELDS[name]
        if value is None and own[name] is None:
            continue
        if not types.fits(sorted(value, key=str) if isinstance(value, set) else value, kind):
            return f"{name} must be {types.describe(kind)}, not {_json(value)}"
    needs_rank = "r" in own and own["r"]  # OFT's is 0 if it has a block size
    if needs_rank and isinstance(values["r"], int) and values["r"] < 1:
        return f"r must be above 0, not {values['r']}"
    if "lora_dropout" in own and not 0 <= float(values["lora_dropout"]) < 1:
        return f"lora_dropout must be at least 0 and below 1, not {values['lora_dropout']}"
    if "lora_alpha" in own and not math.isfinite(float(values["lora_alpha"])):
        return f"lora_alpha must be finite, not {values['lora_alpha']}"
    return ""


def _json(value: object) -> str:
    return "null" if value is None else shorten(value)


def _base_of(adapter: str, config: PeftConfig, option: str) -> str:
    base = config.base_model_name_or_path
    if not base:
        raise PerlError(f"The adapter {adapter} does not say which base it belongs to")
    unusable = place_fault(base)
    if unusable:
        raise PerlError(f"{option} {adapter}: the base that {ADAPTER_CONFIG} names {unusable}")
    base = places.here(base)
    if Path(base).is_dir() and not Path(base).is_absolute():
        return str(Path(base).resolve())  # trl writes it so for a base that was named by a relative path
    return base


def _base_config(adapter: str, base: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Raises PerlError if an adapter's base is not found, is itself an adapter, or has no safetensors."""
    try:
        config = _config(base, "--model", trust_remote_code)
    except PerlError as error:
        if error.hint == TRUST:
            raise
        hint = f"put it back, or correct base_model_name_or_path in {adapter}/{ADAPTER_CONFIG}"
        raise PerlError(f"The adapter {adapter} belongs to the base {base}, which was not found", hint) from error
    if (Path(base) / ADAPTER_CONFIG).exists():  # transformers would load that adapter too, even from a pickle
        hint = f"perl merge {base} --output DIR, then name DIR as base_model_name_or_path in {adapter}/{ADAPTER_CONFIG}"
        raise PerlError(f"The base {base} of the adapter {adapter} is itself an adapter", hint)
    if Path(base).is_dir():
        weights.check(base, "The base")
    return config


def _config(place: str, option: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Hub's client and remote code raise types of their own
        if NEEDS_TRUST in str(error):
            raise PerlError(f"{option} {place} comes with its own modelling code, which was not run", TRUST) from error
        hint = places.inside(place) or places.NETWORK
        raise PerlError(f"{option} {place} can't be read as a model: {line(error)}", hint) from error
    attention = str(getattr(config.get_text_config(), "_attn_implementation", None) or "")
    if "/" in attention and not trust_remote_code:
        raise PerlError(f"{option} {place} uses the attention {attention}, which is code from the Hub", TRUST)
    return config

"""Where a model name leads: a base, or an adapter and its base. Only configs are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from perlcli import coffee
from perlcli.errors import PerlError, line
from perlcli.model import expressions, weights
from perlcli.model.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from perlcli.settings import place_fault
from perlcli.settings.types import describe as in_words
from perlcli.settings.types import fits
from perlcli.text import shorten

# Of peft's types: the field that names further weights, which peft reads whatever kind of file they are.
ELSEWHERE = {
    "XLORA": "adapters", "SHADOW": "shadow_model", "MULTITASK_PROMPT_TUNING": "prompt_tuning_init_state_dict_path",
}  # fmt: skip
TRUST = "--trust-remote-code runs it; read it first"
NEEDS_TRUST = "trust_remote_code=True"  # in transformers' error where a model's own code would have to run
# What is read of an adapter's config, which peft takes as it comes.
ADAPTER_FIELDS: dict[str, Any] = {
    "base_model_name_or_path": str | None, "target_modules": str | list[str] | None, "r": int | dict | None,
    "lora_alpha": float | None, "lora_dropout": float | None, "use_dora": bool | None, "bias": str | None,
    "exclude_modules": str | list[str] | None, "layers_pattern": str | list[str] | None,
    "rank_pattern": dict[str, Any] | None, "alpha_pattern": dict[str, Any] | None,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a model name leads: a base, or an adapter and the base that its config names."""

    name: str
    base: str
    config: Any  # transformers' config of the base
    adapter: str | None = None
    adapter_config: Any = None  # peft's config

    @property
    def is_classifier(self) -> bool:
        """Whether this is a reward model: an adapter with a head, or a whole sequence classifier."""
        if self.adapter_config is not None:
            return str(getattr(self.adapter_config.task_type, "value", self.adapter_config.task_type)) == "SEQ_CLS"
        return any("ForSequenceClassification" in name for name in architectures(self.config))

    @property
    def is_embedded(self) -> bool:
        """Whether the base is the one that perlcli brings."""
        place = Path(self.base)
        if not place.is_dir() or place.parts[-3:] != coffee.BASE.parts[-3:]:
            return False
        if place.resolve() == coffee.BASE.resolve():
            return True
        return weights.fingerprint(self.base) == weights.fingerprint(str(coffee.BASE))

    @property
    def base_name(self) -> str:
        """The base for a person to read."""
        return coffee.NAME if self.is_embedded else self.base


def locate(name: str | None, *, option: str = "--model", trust_remote_code: bool = False) -> Source:
    """Find a base or adapter by hub id or folder, None being the embedded base. Reads configs alone.

    Raises PerlError.
    """
    if name is None:
        return Source(coffee.NAME, str(coffee.BASE), _config(str(coffee.BASE), option, trust_remote_code))
    path = Path(name).expanduser()
    if path.is_file():
        raise PerlError(f"{option} {name} is a file", "name the folder that holds it")
    looks_local = path.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise PerlError(f"{option} {name} does not exist")
    where = str(path.resolve()) if path.is_dir() else name  # absolute, so that adapters find their base from anywhere
    if path.is_dir():
        weights.check(where, option)
    adapter_config = _adapter_config(where, is_folder=path.is_dir(), option=option)
    if adapter_config is None:
        return Source(name, where, _config(where, option, trust_remote_code))
    base = adapter_config.base_model_name_or_path
    if not base:
        raise PerlError(f"The adapter {name} does not say which base it belongs to")
    if unusable := place_fault(base):
        raise PerlError(f"{option} {name}: the base that {ADAPTER_CONFIG} names {unusable}")
    if not Path(base).exists() and Path(base).parts[-3:] == coffee.BASE.parts[-3:]:
        base = str(coffee.BASE)  # trained on the embedded base of another environment
    if Path(base).is_dir() and not Path(base).is_absolute():
        base = str(Path(base).resolve())  # as trl writes it for a base that was named so
    config = _base_config_of(name, base, trust_remote_code)
    _check_base(name, base)
    source = Source(name, base, config, where, adapter_config)
    if wrong := expressions_fault(adapter_config, lambda: skeleton(source, trust_remote_code=trust_remote_code)):
        raise PerlError(f"{option} {name}: {ADAPTER_CONFIG}: {wrong}")
    return source


def check_adapter_weights(folder: str) -> None:
    """Raise PerlError where an adapter's weights are not safetensors: peft takes a pickle for want of them, on the hub
    too."""
    if Path(folder).is_dir():
        _adapter_config(folder, is_folder=True, option="The adapter")
        weights.check(folder, "The adapter")
    elif weights.of_hub(folder, ADAPTER_WEIGHTS) is None:
        raise PerlError(f"The adapter {folder} has no {ADAPTER_WEIGHTS} that can be had from the hub", weights.CONVERT)


def _check_base(adapter: str, base: str) -> None:
    """Raise PerlError where an adapter's base is an adapter itself, or holds no safetensors."""
    if (Path(base) / ADAPTER_CONFIG).exists():  # transformers would put that one on, too, be it a pickle
        hint = f"perl merge {base} --output DIR, then DIR as base_model_name_or_path in {adapter}/{ADAPTER_CONFIG}"
        raise PerlError(f"The base {base} of the adapter {adapter} is an adapter itself", hint)
    if Path(base).is_dir():
        weights.check(base, "The base")


def architectures(config: Any) -> list[str]:
    """The classes that a model's config names; none where it names none in words."""
    found = config.architectures
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _adapter_config(where: str, *, is_folder: bool, option: str) -> Any:
    from peft import PeftConfig

    if not (Path(where) / ADAPTER_CONFIG).exists() if is_folder else not _hub_has_adapter(where, option):
        return None
    try:
        found = PeftConfig.from_pretrained(where)
    except Exception as error:  # peft takes what it finds for the arguments of a class
        raise PerlError(f"{option} {where}: {ADAPTER_CONFIG} can't be read: {line(error)}") from error
    for name, kind in ADAPTER_FIELDS.items():
        value = getattr(found, name, None)
        if not fits(sorted(value, key=str) if isinstance(value, set) else value, kind):
            told = f"{name} must be {in_words(kind)}, not {shorten(value)}"
            raise PerlError(f"{option} {where}: {ADAPTER_CONFIG} can't be used: {told}")
    kind = str(getattr(found.peft_type, "value", found.peft_type))
    if getattr(found, ELSEWHERE.get(kind, ""), None):
        problem = f"{option} {where} is {kind}, whose {ELSEWHERE[kind]} names other files to load"
        raise PerlError(problem, "an adapter is taken whose weights lie in its own folder")
    return found


def expressions_fault(config: Any, model: Callable[[], nn.Module | None]) -> str | None:
    """What is wrong with the regular expressions that choose an adapter's modules; `model` is built if it has any."""
    wanted = [getattr(config, name, None) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    found = [text for text in wanted if isinstance(text, str) and text not in ("", "all-linear")]
    patterns = [getattr(config, name, None) or {} for name in ("rank_pattern", "alpha_pattern")]
    found += [rf"(.*\.)?({key})$" for pattern in patterns for key in pattern]  # as peft uses them
    built = model() if found else None
    names = [name for name, _ in built.named_modules()] if built is not None else []
    told = expressions.fault(found, names)
    return None if told is None else f"what chooses the modules {told}"


def _hub_has_adapter(name: str, option: str) -> bool:
    """Whether a hub repository holds an adapter; raises PerlError where it isn't there or can't be reached."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, ADAPTER_CONFIG)
    except LocalEntryNotFoundError as error:  # no network: a base may lie in the cache all the same
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        problem = f"{option} {name} is not a local folder, and the hub can't be reached"
        raise PerlError(problem, "check the name and the network") from error
    except EntryNotFoundError:
        return False
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise PerlError(f"{option} {name} is neither a local folder nor a model on the hub: {line(error)}") from error
    return True


def _base_config_of(adapter: str, base: str, trust_remote_code: bool) -> Any:
    try:
        return _config(base, "--model", trust_remote_code)
    except PerlError as error:
        if error.hint == TRUST:
            raise
        raise PerlError(
            f"The adapter {adapter} belongs to the base {base}, which isn't there",
            f"put it back, or correct base_model_name_or_path in {adapter}/{ADAPTER_CONFIG}",
        ) from error


def _config(where: str, option: str, trust_remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub's client and remote code raise types of their own
        if NEEDS_TRUST in str(error):
            raise PerlError(
                f"{option} {where} brings modelling code of its own, which is not run unasked", TRUST
            ) from error
        inside = sorted(str(path.parent) for path in Path(where).glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"it holds adapters, name one: {', '.join(inside)}" if inside else "check the name and the network"
        raise PerlError(f"{option} {where} can't be read as a model: {line(error)}", hint) from error
    attention = str(getattr(config.get_text_config(), "_attn_implementation", None) or "")
    if "/" in attention and not trust_remote_code:
        raise PerlError(f"{option} {where} asks for the attention {attention}, which is code from the hub", TRUST)
    return config


def skeleton(source: Source, *, trust_remote_code: bool = False) -> nn.Module | None:
    """The base's modules without their weights, to look at names and shapes; None where they can't be had so."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(source.config, trust_remote_code=trust_remote_code)
    except Exception:  # no causal LM, or modelling code that computes as it is built: loading it will tell
        return None


def same_base(one: Source, other: Source) -> bool:
    """Whether two sources stand on the same weights: the same place, or equal fingerprints."""
    if one.base == other.base:
        return True
    mark = weights.fingerprint(one.base)
    return bool(mark) and mark == weights.fingerprint(other.base)

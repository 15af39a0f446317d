"""Bases that are stored quantised: what they are used in, and what is refused before they load."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from perlcli.errors import PerlError, line
from perlcli.model.sources import Source
from perlcli.settings import ModelSettings
from perlcli.text import enum_value, shorten

BITSANDBYTES, DEQUANTIZE = "bitsandbytes", "dequantize"
OPTIONS = {4: "load_in_4bit", 8: "load_in_8bit"}
ORIGINAL = "name its unquantised original; --load-in-4bit quantises it while it loads"


def stored(config: PreTrainedConfig) -> dict[str, Any]:
    """How a checkpoint's config says that its weights are quantised; empty if they are not."""
    found: Any = None
    for part in (config, config.get_text_config()):
        found = found or getattr(part, "quantization_config", None)
    values = found if isinstance(found, dict) else found.to_dict() if hasattr(found, "to_dict") else {}
    if values and "quant_method" not in values:  # as bitsandbytes wrote it at first
        return values | {"quant_method": BITSANDBYTES}
    return dict(values)


def bits_of(config: PreTrainedConfig) -> int:
    """The bits of a base that bitsandbytes quantised before it was stored: 4 or 8; 0 for all others."""
    values = stored(config)
    if not values or _method(values) != BITSANDBYTES:
        return 0
    return 8 if values.get("load_in_8bit") or values.get("_load_in_8bit") else 4


def proposed(source: Source) -> dict[str, Any]:
    """The options that say how a base is held which is stored in 4 or 8 bits: it is recorded and checked as such."""
    bits = bits_of(source.config)
    return {OPTIONS[bits]: True} if bits else {}


def check(source: Source, given: ModelSettings, *, full: bool = False, option: str = "--model") -> str | None:
    """What to note about a base that is stored quantised; None for others. Raises PerlError if it can't be trained, or
    not in the way that the settings ask for."""
    values, name, bits = stored(source.config), source.base_name, bits_of(source.config)
    if not values:
        return None
    if bits:
        if full:
            problem = f"--full can't train {name}: it is stored in {bits} bits, and rounding takes away small updates"
            raise PerlError(problem, "train an adapter, or name its unquantised original")
        if getattr(given, OPTIONS[12 - bits]):
            raise PerlError(f"--load-in-{12 - bits}bit: {name} is stored in {bits} bits", "leave the option out")
        return f"{name} is stored in {bits} bits, and is used as it is stored."
    fault, method = _why_not(values), _method(values)
    if fault:
        problem = f"{option} {name} is stored quantised by {method}, and can't be converted to 16 bits here: {fault}"
        raise PerlError(problem, ORIGINAL)
    if given.load_in_4bit or given.load_in_8bit:
        asked = 4 if given.load_in_4bit else 8
        problem = f"--load-in-{asked}bit: {name} is stored quantised by {method}, which transformers only converts"
        raise PerlError(problem, "leave the option out, or name its unquantised original")
    return f"{name} is stored quantised by {method}; its weights are converted while it loads."


def load_options(source: Source, given: ModelSettings, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is given so that it quantises a base, or converts one that is stored quantised."""
    values = stored(source.config)
    if bits_of(source.config):
        return {}
    if values:
        return {"quantization_config": _converting(values)}
    if given.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if given.load_in_4bit:
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four)}
    return {}


def is_converted(config: PreTrainedConfig) -> bool:
    """Whether a base is stored quantised, and its weights are converted while it loads."""
    return bool(stored(config)) and not bits_of(config)


def _method(values: dict[str, Any]) -> str:
    return shorten(enum_value(values["quant_method"])).strip("'\"")


def _converting(values: dict[str, Any]) -> QuantizationConfigMixin:
    return AutoQuantizationConfig.from_dict(values | {DEQUANTIZE: True})


def _why_not(values: dict[str, Any]) -> str:
    """Why transformers can't convert such weights while it loads them; empty if it can."""
    if not AutoHfQuantizer.supports_quant_method(values):
        return "transformers doesn't know it"
    try:
        config = _converting(values)
        if not getattr(config, DEQUANTIZE, False):
            return "transformers keeps such weights as they are"
        AutoHfQuantizer.from_config(config, pre_quantized=True).validate_environment(device_map={"": "cpu"})
    except Exception as error:  # each method checks its own packages and values
        return line(error)
    return ""

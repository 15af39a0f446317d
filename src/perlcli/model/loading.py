"""Loads the frozen base in 16, 8 or 4 bits."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from perlcli import device
from perlcli.errors import PerlError, line
from perlcli.model import faults, heads, quantised, weights
from perlcli.model.auto_classes import causal_class
from perlcli.model.sources import Source
from perlcli.model.target_modules import without_text
from perlcli.run import out_of_memory
from perlcli.settings import ModelSettings
from perlcli.text import clip, one_line


def load_causal(source: Source, settings: ModelSettings) -> PreTrainedModel:
    """The base as a language model, frozen, on the device; a multimodal one completely. Raises PerlError if it can't be
    loaded."""
    return _load(causal_class(source.config), source, settings)


def load_classifier(source: Source, settings: ModelSettings, pad_token_id: int) -> PreTrainedModel:
    """The base, frozen, with a reward model's own head, or a fresh one for one score. Raises PerlError if it can't be
    loaded."""
    labels = heads.labels_of(source)
    if heads.is_on_causal(source, full=True, trust_remote_code=settings.trust_remote_code):
        weight = heads.saved(source.base) if source.adapter is None and source.is_classifier else None
        model = heads.put_on(load_causal(source, settings), getattr(torch, device.dtype_name(settings)), weight, labels)
    else:
        model = _load(AutoModelForSequenceClassification, source, settings, num_labels=labels)
    config = model.config.get_text_config()
    config.pad_token_id = pad_token_id
    config.use_cache = False  # a score needs no cache of keys and values, which can be larger than the model
    return model


def train_all(model: PreTrainedModel) -> PreTrainedModel:
    """The model with float32 weights that all train (bfloat16 would round small updates away), but for the towers of a
    multimodal model, which text never reaches."""
    model.float().requires_grad_(True)
    silent = without_text(model)
    for name, module in model.named_modules():
        if silent is not None and name and re.fullmatch(silent, name):
            module.requires_grad_(False)
    return model


def _load(kind: Any, source: Source, settings: ModelSettings, **options: Any) -> PreTrainedModel:
    where, dtype = source.base, getattr(torch, device.dtype_name(settings))
    options |= quantised.load_options(source, settings, dtype)
    if device.kind() == "cuda":
        options["device_map"] = {"": torch.cuda.current_device()}  # straight to the GPU, not through the host's memory
    elif "quantization_config" in options or quantised.bits_of(source.config):
        options["device_map"] = "cpu"
    weights.check(where)
    try:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # judged by _check_weights
        model: PreTrainedModel
        model, info = kind.from_pretrained(
            where, dtype=dtype, trust_remote_code=settings.trust_remote_code, use_safetensors=True, **options
        )
    except (torch.OutOfMemoryError, MemoryError):  # not a fault of the model
        raise
    except Exception as error:  # of any type: transformers reads the files as if they were right
        fault = _of_a_weight(error) or line(error)
        if out_of_memory.is_named_in(fault):
            raise torch.OutOfMemoryError(fault) from error
        raise PerlError(f"The model {where} can't be loaded: {fault}") from error
    _check_weights(where, model, info)
    _keep_autograd(model)
    faults.mend(model)
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):  # as saved after training; their loss fails while sampling
        config.output_router_logits = False
    model.requires_grad_(False)
    if quantised.is_converted(source.config):  # some methods leave weights in the dtype of the file or their scales
        kept: Any = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data if any(each in name for each in kept) else parameter.data.to(dtype)
    return model


def _check_weights(where: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raises PerlError if the files lack weights of the backbone, which would be random (a head may be new), or have
    them in other shapes or not in the 4 bits that the config names."""
    hint = "config.json belongs to other weights: download the model again, or name another one"
    for name, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"{list(found)} in its file, but {list(expected)} by config.json"
        raise PerlError(f"The model {where} can't be loaded: {name} is {shapes}", hint)
    lacking = sorted(name for name in info["missing_keys"] if name.startswith(f"{model.base_model_prefix}."))
    if lacking:
        more = f" and {len(lacking) - 1:,} more weights" if len(lacking) > 1 else ""
        raise PerlError(f"The model {where} can't be loaded: its files lack {lacking[0]}{more}", hint)
    for name, module in model.named_modules():
        is_four_bit = hasattr(module, "support_avx512bf16_for_cpu")  # a Linear4bit of bitsandbytes
        if is_four_bit and getattr(module.weight, "quant_state", None) is None:
            problem = (
                f"The model {where} can't be loaded: config.json says that {name}.weight is in 4 bits, but it is not"
            )
            raise PerlError(problem, "remove quantization_config from config.json, and use --load-in-4bit")


def _of_a_weight(error: BaseException) -> str:
    """The error of the first weight that could not be converted or quantised, in one line; empty if there is none.

    transformers (5.0 to 5.23) keeps these errors as text, and raises one that refers to its log. Remove this when it
    raises the first of them (transformers/core_model_loading.py, log_conversion_errors)."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        errors = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if errors:
            text, _, _ = next(iter(errors.values())).partition("\nError")  # then come the names of the weights
            return clip(one_line(text.rpartition("\n")[2]), 600)
    return ""


def _keep_autograd(model: nn.Module) -> None:
    """Keep 4-bit layers on the code path that has gradients.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks a Linear4bit in place at the first forward pass in eval mode
    without gradients, and has no autograd from then on: LoRA gradients are silently wrong. Remove this when
    bitsandbytes keeps autograd there; tests/model/test_loading.py fails without it as long as it is needed.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (torch types attributes as modules)

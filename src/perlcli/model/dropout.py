"""Turns off all that a model does at random in training: dropout, also where it is only a number, and router noise."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from perlcli import device

# How probabilities and widths of noise are named: attention_dropout, resid_pdrop, layerdrop, drop_path_rate;
# jitter_noise of Mixtral's routers and input_jitter_noise of Phi-MoE's, but not the latter's router_jitter_noise, which
# chooses experts in evaluation too. The adapters' own dropout has its own option.
RANDOM = re.compile(r"drop|(?<!router_)jitter")
IDS = [[2, 3, 5, 7, 11, 13, 17, 19]]
# How far rounding may move the logits between two equal passes, as a share of the largest: in float32, else.
ROUNDING, COARSE = 1e-5, 2e-2


def turn_off(model: nn.Module) -> None:
    """Turn off dropout and noise in a model, its adapters' dropout included.

    TRL's `disable_dropout` (1.16) sets `nn.Dropout.p` only. Many families call `F.dropout` with a number that they read
    from the config, or from a module's attribute that was copied from it (OPT, XGLM, BioGPT, Seed-OSS), or skip layers
    (`layerdrop`). Phi-MoE's router draws the experts of each token in training; it chooses the best as in evaluation.
    """
    for module in model.modules():
        for holder in _holders(module):
            for name in _at_random(holder):
                holder[name] = 0.0
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if _has_modes(module) and _as_in_evaluation not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_as_in_evaluation)


def _has_modes(module: nn.Module) -> bool:
    """Whether a layer of a model's own code computes something else in training."""
    kind = type(module)
    if kind.__module__.startswith(("torch.", "peft.")) or next(module.children(), None) is not None:
        return False
    return "training" in getattr(inspect.unwrap(kind.forward), "__code__", compile("", "", "exec")).co_names


def _as_in_evaluation(module: nn.Module, _: object) -> None:
    module.training = False


def left_in(trainer: Any) -> str | None:  # noqa: ANN401
    """Turn off dropout in a trainer's model, and say what is left of it, if anything; under the trainer's autocast,
    which a head in float32 needs."""
    turn_off(trainer.model)
    with trainer.accelerator.autocast():
        return remains(trainer.model)


def remains(model: Any) -> str | None:  # noqa: ANN401
    """What is left of it, in words: how far logits differ between two equal forward passes in training mode, on a few
    tokens. None if they are the same but for rounding. Leaves modes and random state as they are."""
    modes = [(vars(module), module.training) for module in model.modules()]
    ids = torch.tensor(IDS, device=model.get_input_embeddings().weight.device)
    found = []
    try:
        with device.fork_rng(), torch.no_grad():
            model.train()
            for _ in range(2):
                found.append(model(input_ids=ids, use_cache=False).logits.float())
    finally:
        for state, was_training in modes:
            state["training"] = was_training
    moved = float((found[0] - found[1]).abs().max() / found[0].abs().max().clamp(min=1e-9))
    if moved > (ROUNDING if model.dtype == torch.float32 else COARSE):
        return f"With dropout off, this model's logits still differ by {moved:.1%} from one training pass to the next"
    return None


def has_any(config: PreTrainedConfig) -> bool:
    """Whether any probability of dropout or width of noise in the config, or in a config inside it, is above 0."""
    return any(True for holder in _configs(config) for _ in _at_random(holder))


def _at_random(holder: MutableMapping[str, Any]) -> list[str]:
    """The names of all entries that are such a number above 0."""
    return [
        name
        for name, value in holder.items()
        if RANDOM.search(name) and isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    ]


def _holders(module: nn.Module) -> Iterator[MutableMapping[str, Any]]:
    """A module's own attributes, and the configs that its code may read."""
    yield vars(module)
    config = vars(module).get("config")
    if isinstance(config, PreTrainedConfig):
        yield from _configs(config)


def _configs(config: PreTrainedConfig) -> Iterator[MutableMapping[str, Any]]:
    yield vars(config)
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _configs(inner)

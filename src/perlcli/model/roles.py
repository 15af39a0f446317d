"""The roles of adapters on one frozen base (policy, anchor, rewards, value), and how to switch between them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from perlcli.errors import PerlError, line
from perlcli.model import adapters as adapters_module
from perlcli.model.sources import check_adapter_weights
from perlcli.redaction import hidden
from perlcli.run.files import CARD
from perlcli.settings import LoraSettings

POLICY, ANCHOR, REWARD, VALUE = "default", "ref", "reward", "value"  # the first two are the names that TRL knows
OF_ADAPTERS = re.compile(rf"(^|\.)(({'|'.join(map(re.escape, adapters_module.PREFIXES))})\w*|modules_to_save)(\.|$)")


def new_adapter(model: PreTrainedModel, settings: LoraSettings, task: str) -> PeftModel:
    """Put a fresh, trainable adapter on the model; task is peft's `CAUSAL_LM`, or `SEQ_CLS` to train the head."""
    found: Any = get_peft_model(model, adapters_module.on_model(settings, model, task))
    as_float32(found)
    begin_at_base(found, POLICY)
    return found


def begin_at_base(model: nn.Module, adapter: str) -> None:
    """Let a fresh DoRA add nothing: its magnitudes are the norms of the base's weights, in float32.

    peft (0.21) takes them in the base's dtype and compares them with float32 norms from then on: in bfloat16 a fresh
    adapter moved logits by 0.06, so that a policy didn't begin at its anchor. To be removed when peft takes them in
    float32; tests/model/test_adapters.py fails without this for as long as it is needed.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_magnitude_vector and adapter in layer.lora_A:
            magnitude: Any = layer.lora_magnitude_vector[adapter]
            trains = magnitude.weight.requires_grad
            magnitude.update_layer(
                base_layer=layer.get_base_layer(), lora_A=layer.lora_A[adapter].weight,
                lora_B=layer.lora_B[adapter].weight, scaling=layer.scaling[adapter],
            )  # fmt: skip
            magnitude.weight.requires_grad_(trains)


def load_adapter(model: PreTrainedModel, folder: str, *, trainable: bool) -> PeftModel:
    """Put a saved adapter on the model; raises PerlError where it doesn't fit this model."""
    check_adapter_weights(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
            found = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        found.peft_config[POLICY].base_model_name_or_path = model.name_or_path  # where it is, not where it was
        return as_float32(found, head=trainable)
    except (RuntimeError, ValueError, OSError, KeyError, SafetensorError, UserWarning) as error:
        raise PerlError(f"The adapter {folder} does not fit its base: {line(error)}") from error


def as_float32(model: PeftModel, *, head: bool = True) -> PeftModel:
    """Hold every adapter weight in float32: bfloat16 learns in coarse steps, and a reload would upcast it anyway.

    A head that only scores stays in the base's dtype, in which `round_head` saved it and plain peft loads it.
    """
    for name, parameter in model.named_parameters():
        if not is_base(name) and (head or "modules_to_save" not in name):
            parameter.data = parameter.data.float()
    return model


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Keep TRL's trainers from rounding an adapter to bfloat16, as they do on a quantised base with all that trains."""
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters = getattr(model, "peft_config", None) is not None
    for parameter in model.parameters() if adapters else ():
        parameter.requires_grad_(False)
    yield
    for name, parameter in model.named_parameters():
        if grads.get(name):
            parameter.requires_grad_(True)


def keep_only_policy_trainable(model: nn.Module) -> None:
    """Let the policy's adapter train and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of(POLICY, name))


def set_adapter_dropout(model: nn.Module, chance: float) -> None:
    """Give adapters the dropout that was asked for: TRL's reward and RL trainers turn all of a model's off."""
    for name, module in model.named_modules():
        if "lora_dropout" in name and isinstance(module, nn.Dropout):
            module.p = chance


def missing_keys_are_errors(folder: str, missing: Sequence[str]) -> None:
    """Raise PerlError where an adapter left modules of its own unfilled: peft would go on with fresh ones."""
    if missing:
        raise PerlError(f"The adapter {folder} does not fit its base: it lacks {missing[0]} ({len(missing)} in all)")


def is_of(adapter: str, name: str) -> bool:
    """Whether a parameter's name is of this adapter: its name comes behind peft's, as modules may bear it too."""
    found = OF_ADAPTERS.search(name)
    return found is not None and (name[found.end() :] + ".").startswith(f"{adapter}.")


def is_base(name: str) -> bool:
    """Whether a parameter's name is of the base, not of an adapter."""
    return OF_ADAPTERS.search(name) is None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters; a weight packed in 4 bits counts each of its values."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
    return trainable, total


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of some tensors, with what quantisation keeps beside a weight."""
    return sum(t.numel() * t.element_size() for tensor in tensors for t in (tensor, *quantised_state(tensor)))


def adapter_bytes(model: nn.Module, adapter: str) -> int:
    """The bytes that one adapter adds to the base."""
    return bytes_of(p for name, p in model.named_parameters() if is_of(adapter, name))


def quantised_state(weight: torch.Tensor) -> list[torch.Tensor]:
    """The scales that bitsandbytes keeps on a 4- or 8-bit weight; nothing for any other."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        scales = getattr(weight, "SCB", None)
        return [] if scales is None else [scales]
    inner = getattr(state, "state2", None)
    found = [state.absmax, state.code, state.offset, *([inner.absmax, inner.code] if inner is not None else [])]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


@contextmanager
def switched(model: PeftModel, adapter: str | None, *, train: bool = False) -> Iterator[None]:
    """Run with another adapter (None: the bare base) in eval or train mode, and put back exactly what was there before.

    peft's own switches flip `requires_grad` on both adapters, and TRL reads `model.training` to choose its path. Go
    backward inside: gradient checkpointing computes again with the adapter that is active then.
    """
    active = model.active_adapter
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    tuner: Any = model.base_model
    is_bare = any(isinstance(module, BaseTunerLayer) and module.disable_adapters for module in model.modules())
    try:
        model.train(train)
        if adapter is None:
            with model.disable_adapter():
                yield
        else:
            if is_bare:  # inside another switch, to the bare base
                tuner.enable_adapter_layers()
            model.set_adapter(adapter)
            yield
    finally:
        model.set_adapter(active)
        if is_bare and adapter is not None:
            tuner.disable_adapter_layers()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(grads[name])
        for name, module in model.named_modules():
            module.training = modes[name]


@contextmanager
def casting(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Let adapters convert their input to their own dtype, or not.

    Under autocast the conversion is undone at once, bfloat16 to float32 to bfloat16: the result is the same without it,
    and so is each projection's gradient, but no second copy of every input is kept for the backward pass. Outside
    autocast a float32 adapter on a bfloat16 base needs it. (peft's own `disable_input_dtype_casting` can't be undone
    for a part.) DoRA takes its norms in its input's dtype, and other kinds are no projections alone: they keep it.
    """
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, LoraLayer) and not any(module.use_dora.values())
    ]
    before: list[Any] = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = on
    try:
        yield
    finally:
        for layer, was_on in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = was_on


def add_adapter(model: PeftModel, folder: str, name: str) -> None:
    """Put a further saved adapter on the model, frozen, beside the policy's, which stays the one in use.

    Raises PerlError where it doesn't fit.
    """
    check_adapter_weights(folder)
    was_training = model.training
    try:
        with torch.random.fork_rng():  # else peft's initialisation would shift the stream that samples completions
            found = model.load_adapter(folder, name, is_trainable=False)
    except (RuntimeError, ValueError, OSError, KeyError, SafetensorError) as error:
        raise PerlError(f"The adapter {folder} does not fit its base: {line(error)}") from error
    missing_keys_are_errors(folder, [key for key in found.missing_keys if not is_base(key)])
    model.train(was_training)
    model.set_adapter(POLICY)
    as_float32(model)


def device_of(model: Any) -> torch.device:
    """Where the model's embeddings lie, and so its input goes."""
    return model.get_input_embeddings().weight.device


def save_adapter(model: PeftModel, folder: Path, adapter: str = POLICY) -> None:
    """Write one adapter alone: the policy's into the folder itself, where plain peft looks for it, others below it."""
    model.save_pretrained(str(folder), selected_adapters=[adapter])
    if (card := folder / CARD).exists():  # peft's names the base by its path; a run that ends well puts its own there
        card.write_text(hidden(card.read_text(encoding="utf-8")), encoding="utf-8")

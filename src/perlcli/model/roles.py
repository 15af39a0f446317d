"""The roles that adapters play on one frozen base (policy, anchor, rewards, value), and how to switch between them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from perlcli import device
from perlcli.errors import PerlError, line
from perlcli.model import adapters
from perlcli.model.sources import check_adapter_weights
from perlcli.model.target_modules import HEADS
from perlcli.model.weights import ADAPTER_WEIGHTS, file_of
from perlcli.redaction import hidden
from perlcli.run.files import CARD
from perlcli.settings import LoraSettings

Model = PreTrainedModel | PeftModel
POLICY, ANCHOR, REWARD, VALUE = "default", "ref", "reward", "value"  # the first two are the names that TRL uses
OF_PEFT, IN_CAUSAL = "base_model.model.", "model.layers."
MISSING = "Found missing adapter keys"  # how peft's warning of them begins
WRONG_SHAPE = re.compile(r"size mismatch for (\S+): .*?torch\.Size\(\[([\d, ]*)\]\).*?torch\.Size\(\[([\d, ]*)\]\)")
OF_ADAPTERS = re.compile(rf"(^|\.)(({'|'.join(map(re.escape, adapters.PREFIXES))})\w*|modules_to_save)(\.|$)")


def new_adapter(model: PreTrainedModel, settings: LoraSettings, task: str) -> PeftModel:
    """The model with a fresh, trainable adapter; SEQ_CLS trains the head too. Raises PerlError if it doesn't fit."""
    adapted: Any = get_peft_model(model, adapters.on_model(settings, model, task))
    begin_at_base(as_float32(adapted), POLICY)
    return adapted


def begin_at_base(model: nn.Module, adapter: str) -> None:
    """Make a fresh DoRA adapter add nothing: its magnitudes become the norms of the base's weights, in float32.

    peft (0.21) takes the norms in the base's dtype and compares them with float32 norms from then on: in bfloat16 a
    fresh adapter moved logits by 0.06, so that a policy didn't start at its anchor. Remove this when peft takes them in
    float32; tests/model/test_adapters.py fails without it as long as it is needed.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_magnitude_vector and adapter in layer.lora_A:
            magnitude: Any = layer.lora_magnitude_vector[adapter]
            trains = magnitude.weight.requires_grad
            magnitude.update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A[adapter].weight,
                lora_B=layer.lora_B[adapter].weight,
                scaling=layer.scaling[adapter],
            )
            magnitude.weight.requires_grad_(trains)


def _convert_around_dora(model: nn.Module) -> None:
    """Let DoRA on a quantised base compute in float32 and return its input's dtype, under CUDA's autocast too.

    peft's quantised layers (0.21, tuners/lora/bnb.py) convert nothing where `torch.is_autocast_enabled()` is true; it
    names no device, which means CUDA's. Norms in bfloat16 then meet magnitudes in float32: a fresh adapter moved the KL
    to its anchor to -0.005. Not reported upstream; remove this when these layers convert as those of an unquantised
    base do. tests/model/test_adapters.py fails without it as long as it is needed.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or not layer.lora_magnitude_vector:
            continue
        base: Any = layer.get_base_layer()
        if not quantised_state(base.weight):
            continue
        if _as_input not in layer._forward_hooks.values():
            layer.register_forward_hook(_as_input)
        for magnitude in layer.lora_magnitude_vector.values():
            if _from_float32 not in magnitude._forward_pre_hooks.values():
                magnitude.register_forward_pre_hook(_from_float32)


def _from_float32(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].float(), *inputs[1:])


def _as_input(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(inputs[0].dtype)


def load_adapter(model: PreTrainedModel, folder: str, *, trainable: bool) -> PeftModel:
    """The model with a saved adapter. Raises PerlError if the adapter doesn't fit the model."""
    with _fitting(folder), warnings.catch_warnings():
        warnings.filterwarnings("error", message=MISSING, category=UserWarning)
        renamed = names_in_complete(model, folder)
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=trainable, key_mapping=renamed)
    _check_weights(adapted, POLICY, folder)
    adapted.peft_config[POLICY].base_model_name_or_path = model.name_or_path  # where it is now, not where it was
    return as_float32(adapted, head=trainable)


def add_adapter(model: PeftModel, folder: str, name: str) -> None:
    """Add a saved adapter, frozen, next to the policy's, which stays active. Raises PerlError if it doesn't fit."""
    was_training = model.training
    base: Any = model.get_base_model()
    # peft's initialisation would shift the random stream that samples completions
    with _fitting(folder), device.fork_rng():
        renamed = names_in_complete(base, folder)
        result = model.load_adapter(folder, name, is_trainable=False, key_mapping=renamed)
    missing = [key for key in result.missing_keys if not is_base(key)]  # peft would leave these as initialised
    if missing:
        raise PerlError(f"The adapter {folder} does not fit its base: it lacks {missing[0]} ({len(missing)} in total)")
    _check_weights(model, name, folder)
    model.train(was_training)
    model.set_adapter(POLICY)
    as_float32(model)


def _check_weights(model: PeftModel, adapter: str, folder: str) -> None:
    """Raises PerlError if an adapter in a folder has weights that are not finite, or for which the model has no place,
    which peft leaves out in silence."""
    file = file_of(folder, ADAPTER_WEIGHTS)
    dtypes = dtypes_in(file) if file is not None else {}
    stray = sorted(left_out(model, adapter, set(dtypes)))
    if stray:
        problem = f"has no place for {stray[0]} ({len(stray)} in total)"
        raise PerlError(f"The adapter {folder} does not fit its base, which {problem}")
    for name, dtype in dtypes.items():
        if "F" not in dtype:  # F32, BF16, …; torch would copy integers and the like in silence
            raise PerlError(f"The adapter {folder}: {name} must have floating-point numbers, not {dtype}")
    for name, parameter in model.named_parameters():
        if is_of(adapter, name) and not bool(torch.isfinite(parameter).all()):
            raise PerlError(f"The adapter {folder} has weights that are NaN or infinite: {name}", "train it again")


def dtypes_in(file: Path) -> dict[str, str]:
    """The dtype of each tensor in a file of weights, as safetensors names it: F32, BF16, …"""
    with safe_open(str(file), framework="pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (not a mapping)


def left_out(model: PeftModel, adapter: str, saved: set[str]) -> set[str]:
    """The saved weights of an adapter that peft silently left out because the model has no place for them. If the model
    has as many other names instead, as between versions of transformers, peft has renamed the weights. The head
    of a reward on the policy's base is read from the file."""
    ours = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
    stray = saved - ours - set(model.state_dict())
    if adapter != POLICY:
        stray = {name for name in stray if not set(name.split(".")) & set(HEADS)}
    return stray if len(stray) > len(ours - saved) else set()


def names_in_complete(model: PreTrainedModel, folder: str) -> dict[str, str] | None:
    """How peft must rename the weights of an adapter that was trained on a multimodal model's causal class, which holds
    only the language model and names its modules differently (Qwen3.5); None if it need not."""
    inner, file = model.get_input_embeddings(), file_of(folder, ADAPTER_WEIGHTS)
    reader = next((name.rpartition(".")[0] for name, module in model.named_modules() if module is inner), "")
    if not model.config.sub_configs or file is None:
        return None
    names = [name.removeprefix(OF_PEFT) for name in dtypes_in(file)]
    if reader == "model" or not any(name.startswith(IN_CAUSAL) for name in names):
        return None
    return {f"^{re.escape(IN_CAUSAL)}": f"{reader}.layers."}


@contextmanager
def _fitting(folder: str) -> Iterator[None]:
    """Raises PerlError for an adapter with unsafe weights, and for whatever peft raises if one doesn't fit its base."""
    check_adapter_weights(folder)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, PerlError):  # not a fault of the adapter, or already in our words
        raise
    except SafetensorError as error:
        raise PerlError(f"The adapter {folder}: {ADAPTER_WEIGHTS} can't be read: {line(error)}") from error
    except Exception as error:  # of any type: peft reads the files as if they were right
        raise PerlError(f"The adapter {folder} does not fit its base: {_misfit(error)}") from error


def _misfit(error: Exception) -> str:
    """Why an adapter's weights don't fit: the first of the tensors that torch or peft lists, and how many there are."""
    text = str(error)
    wrong = WRONG_SHAPE.findall(text)
    if wrong:
        name, saved, needed = wrong[0]
        return f"{name} has the shape [{saved}], but its config and its base need [{needed}] ({len(wrong)} in total)"
    if text.startswith(MISSING):
        names = re.findall(r"'([^']+)'", text)
        return f"it lacks {names[0]} ({len(names)} in total)"
    return line(error)


def round_head(model: PeftModel, dtype: torch.dtype) -> None:
    """Round the trained head to `dtype`, in which a plain load of the base will hold it, and keep it there. peft loads
    a head into a module of the base's dtype; rounding it before it is saved keeps the scores the same."""
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and is_of(POLICY, name):
            parameter.data = parameter.data.to(dtype)


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`, in which a load will hold it. Buffers keep theirs, as in a load: `model.to`
    would round the rotary frequencies too, and a trained model would score differently once it is saved."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def copy_policy_to_anchor(model: PeftModel) -> None:
    """Copy every weight of the policy's adapter to the anchor's: TRL's own copy leaves out adapters of embeddings."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if is_of(POLICY, name):
            parameters[re.sub(rf"\.{POLICY}(\.|$)", rf".{ANCHOR}\1", name)].data.copy_(parameter.data)


def as_float32(model: PeftModel, *, head: bool = True) -> PeftModel:
    """Keep every adapter weight in float32: bfloat16 learns in coarse steps, and a reload would upcast it anyway. A
    head that only scores (`head=False`) stays in the base's dtype, in which `round_head` saved it. Every adapter passes
    here when it is made or loaded, so that DoRA's also compute in float32 from then on."""
    for name, parameter in model.named_parameters():
        if not is_base(name) and (head or "modules_to_save" not in name):
            parameter.data = parameter.data.float()
    _convert_around_dora(model)
    return model


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Keep TRL's trainers from rounding adapters to bfloat16: on a quantised base they round everything trainable."""
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if isinstance(model, PeftModel):
        model.requires_grad_(False)
    yield
    for name, parameter in model.named_parameters():
        if grads.get(name):
            parameter.requires_grad_(True)


def keep_only_policy_trainable(model: nn.Module) -> None:
    """Make the policy's adapter trainable, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of(POLICY, name))


def set_adapter_dropout(model: nn.Module, chance: float) -> None:
    """Set the dropout probability of all adapters: TRL's reward and RL trainers turn a model's dropout off."""
    for name, module in model.named_modules():
        if "lora_dropout" in name and isinstance(module, nn.Dropout):
            module.p = chance


def is_of(adapter: str, name: str) -> bool:
    """Whether a parameter belongs to this adapter: peft's prefix must come before its name, which modules may share."""
    match = OF_ADAPTERS.search(name)
    return match is not None and (name[match.end() :] + ".").startswith(f"{adapter}.")


def is_base(name: str) -> bool:
    """Whether a parameter belongs to the base, not to an adapter."""
    return OF_ADAPTERS.search(name) is None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters; a weight packed in 4 bits counts each of its values."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else int(torch.Size(state.shape).numel())
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of some tensors, including the scales of quantised weights."""
    return sum(t.numel() * t.element_size() for tensor in tensors for t in (tensor, *quantised_state(tensor)))


def adapter_bytes(model: nn.Module, adapter: str) -> int:
    """The bytes that one adapter adds to the base."""
    return bytes_of(p for name, p in model.named_parameters() if is_of(adapter, name))


def quantised_state(weight: torch.Tensor) -> list[torch.Tensor]:
    """The scales that bitsandbytes keeps on a 4- or 8-bit weight; empty for any other weight."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        scales = getattr(weight, "SCB", None)
        return [] if scales is None else [scales]
    inner = getattr(state, "state2", None)
    parts = (state.absmax, state.code, state.offset, getattr(inner, "absmax", None), getattr(inner, "code", None))
    return [tensor for tensor in parts if isinstance(tensor, torch.Tensor)]


@contextmanager
def switched(model: PeftModel, adapter: str | None, *, train: bool = False) -> Iterator[None]:
    """Run with another adapter (None: the bare base) in eval or train mode, then restore exactly the state before.

    peft's own switches flip `requires_grad` on both adapters, and walk over all modules several times: here one walk
    does, and `requires_grad` is left alone unless gradients are on. TRL reads `model.training` to choose its path. Call
    backward inside the switch: gradient checkpointing recomputes with the adapter that is active at that time.
    """
    if adapter is not None and adapter not in model.peft_config:
        raise ValueError(f"no adapter {adapter} among {', '.join(model.peft_config)}")
    modules = [(module, module.training) for module in model.modules()]
    layers: list[Any] = [module for module, _ in modules if isinstance(module, BaseTunerLayer)]
    states = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    learns = adapter is not None and torch.is_grad_enabled()
    grads = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters() if learns]
    tuner: Any = model.base_model
    active = (model.active_adapter, tuner.active_adapter)
    try:
        _set_modes([(module, train) for module, mode in modules if mode is not train])
        if adapter is not None:
            model.active_adapter = tuner.active_adapter = adapter
        for layer in layers:
            if learns:
                layer.set_adapter(adapter)
            elif adapter is not None:
                layer._active_adapter = [adapter]
            layer._disable_adapters = adapter is None
        yield
    finally:
        model.active_adapter, tuner.active_adapter = active
        for layer, active_adapter, is_bare in states:
            layer._active_adapter, layer._disable_adapters = active_adapter, is_bare
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)
        _set_modes([(module, mode) for module, mode in modules if module.training is not mode])


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Put each module in train or eval mode, past nn.Module's `__setattr__`, which takes half of a switch."""
    for module, mode in modes:
        object.__setattr__(module, "training", mode)


@contextmanager
def casting(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Let LoRA adapters convert their input to their own dtype, or not.

    Under autocast the conversion is undone at once, bfloat16 to float32 to bfloat16: without it the result and each
    projection's gradient are the same, but no second copy of every input is kept for the backward pass. Outside
    autocast a float32 adapter on a bfloat16 base needs it. (peft's own `disable_input_dtype_casting` can't be undone
    for a part of the model.) DoRA takes its norms in its input's dtype, and other kinds of adapter do more than
    project their input: they keep the conversion.
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


def device_of(model: Any) -> torch.device:
    """The device of the model's embeddings, where its input must be."""
    return model.get_input_embeddings().weight.device


def save_adapter(model: PeftModel, folder: Path, adapter: str = POLICY) -> None:
    """Write one adapter: the policy's into the folder itself, where plain peft looks, others into a subfolder."""
    model.save_pretrained(str(folder), selected_adapters=[adapter])
    card = folder / CARD
    if card.exists():  # peft's card shows the base's path; a run that ends well replaces it with its own
        card.write_text(hidden(card.read_text(encoding="utf-8")), encoding="utf-8")

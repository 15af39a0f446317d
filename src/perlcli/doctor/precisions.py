"""Whether each precision computes correctly: a forward and a backward pass, compared with float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.utils.integrations import dequantize_module_weight

from perlcli import coffee, device
from perlcli.model import loading, roles, sources, tokenizers
from perlcli.settings import ATTENTION, LoraSettings, ModelSettings

PRECISIONS = {
    "float32": ModelSettings(dtype="float32"),
    "bfloat16": ModelSettings(dtype="bfloat16"),
    "float16": ModelSettings(dtype="float16"),
    "8-bit": ModelSettings(load_in_8bit=True),
    "4-bit": ModelSettings(load_in_4bit=True),
}
# The largest relative error of the loss, and the smallest cosine of the gradients. Rounding uses up a tenth of these or
# less on the embedded base; gradients that lack a layer have a far smaller cosine.
TOLERANCES = dict.fromkeys(PRECISIONS, (0.01, 0.99)) | {"float32": (1e-4, 0.99999)}
QUANTISED_OFF = 0.1  # the most that quantised weights may change float32's own loss, as a share of it
ADAPTER = LoraSettings(lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_target_modules=ATTENTION)
SPREAD = 0.05  # of the adapter's weights: as initialised, half of their gradients would be 0
SCALE = 1024.0  # of the loss, as training in float16 does; a power of two, so that nothing else changes


@dataclass(frozen=True)
class Comparison:
    """A precision compared with float32."""

    loss: float
    float32_loss: float
    cosine: float  # of the gradients, with those that float32 computes from the same weights
    is_right: bool


def compare(name: str) -> Comparison:
    """A precision of PRECISIONS compared with float32 on this machine's device: its gradients with those of the same
    (quantised) weights in high precision, because on a model that has learned its task, quantising the weights turns
    the gradients further than a fault of the kernels would."""
    settings = PRECISIONS[name]
    model, dtype = adapted(settings), getattr(torch, device.dtype_name(settings))
    wanted_loss, wanted = passes(in_float64(model), None)
    float32_loss, _ = passes(in_float64(adapted(PRECISIONS["float32"])), None)
    loss, gradients = passes(model, None if dtype == torch.float32 else dtype)
    off, least = TOLERANCES[name]
    cosine = float(torch.nn.functional.cosine_similarity(gradients, wanted, dim=0))
    is_near = abs(loss - wanted_loss) <= off * wanted_loss  # also false for NaN, like the comparisons below
    is_sane = abs(loss - float32_loss) <= QUANTISED_OFF * float32_loss
    return Comparison(loss, float32_loss, cosine, is_near and is_sane and cosine >= least)


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights in float64 on the CPU: float32 without its rounding. The model must not have run yet: 8-bit
    layers discard their scales when they do."""
    plain = adapted(PRECISIONS["float32"]).cpu()
    held = dict(model.named_modules())
    for name, module in plain.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            weight.data.copy_(dequantize_module_weight(held[name]))
    return plain.double()


def adapted(settings: ModelSettings) -> torch.nn.Module:
    """The embedded base with a LoRA adapter whose weights are not 0 and the same each time."""
    model = roles.new_adapter(loading.load_causal(sources.locate(None), settings), ADAPTER, "CAUSAL_LM")
    generator = torch.Generator().manual_seed(0)
    for _, parameter in trained(model):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)
    return model


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The trainable parameters, by name."""
    return sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def passes(model: torch.nn.Module, dtype: torch.dtype | None) -> tuple[float, torch.Tensor]:
    """The loss, and the gradients of all adapter weights as one vector, in float64 on the CPU; zeros where there are
    none. First a forward pass without gradients, as in sampling, then a forward and a backward pass."""
    place = next(model.parameters()).device
    ids = tokens().to(place)
    with torch.autocast(place.type, dtype, enabled=dtype is not None):
        with torch.no_grad():
            model.eval()(input_ids=ids)
        loss = model.train()(input_ids=ids, labels=ids).loss
    (loss * SCALE).backward()
    gradients = [torch.zeros_like(part) if part.grad is None else part.grad for _, part in trained(model)]
    return float(loss.detach()), torch.cat([part.detach().cpu().double().flatten() / SCALE for part in gradients])


def tokens() -> torch.Tensor:
    """A demonstration of the embedded data as token ids, shape (1, tokens)."""
    (row,) = coffee.demonstrations(count=1)
    text = "\n".join(message["content"] for key in ("prompt", "completion") for message in row[key])
    ids: torch.Tensor = tokenizers.load_tokenizer(sources.locate(None))(text, return_tensors="pt").input_ids
    return ids

"""Sampling with merged copies: while completions are written, each projection that the adapter changes is one product
in place of three. The copies lie next to the frozen base, which stays as it is, and are gone before training goes
on."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import LogitsProcessor
from transformers.pytorch_utils import Conv1D

from perlcli.data import Renderer
from perlcli.model.roles import Model
from perlcli.rollouts import local
from perlcli.rollouts.how import Ids, Sampling
from perlcli.rollouts.server import Written


@dataclass
class Merged:
    """Samples from a model in memory, with its active adapter merged into copies."""

    render: Renderer
    most: int = 0  # bytes that the copies took

    def sample(self, model: Model, prompts: Sequence[Ids], how: Sampling) -> list[Written]:
        """One completion for each prompt. Raises RunFailed where probabilities are NaN or infinite."""
        recorder = Recorder(how.temperature)
        with merged(model) as size:
            ids = local.sample(model, self.render, prompts, how, recorder)
        self.most = max(self.most, size)
        return [Written(each, row[: len(each)]) for each, row in zip(ids, recorder.rows(ids), strict=True)]

    def compares(self, how: Sampling) -> bool:
        """Whether the log-probabilities are of the distribution whose log-probabilities training computes."""
        return how.is_full

    def close(self) -> None:
        """Nothing is kept between generations."""


class Recorder(LogitsProcessor):
    """Keeps the log-probability of each token that is sampled, at the temperature, without keeping any logits."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._table: torch.Tensor | None = None  # (rows, vocabulary), of the token that comes next
        self._found: list[torch.Tensor] = []  # (rows,) for each token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes the token that was sampled last from the log-probabilities that were kept for it."""
        self._take(input_ids[:, -1])
        self._table = (scores.float() / self.temperature).log_softmax(dim=-1)
        return scores

    def rows(self, written: Sequence[Ids]) -> list[list[float]]:
        """The log-probabilities of each row, given what was written: the last token comes after the last call."""
        if self._table is not None:
            longest = len(self._found) + 1
            last = [ids[-1] if len(ids) == longest else 0 for ids in written]  # others have ended before
            self._take(torch.tensor(last, device=self._table.device))
        return torch.stack(self._found, dim=1).tolist() if self._found else [[] for _ in written]

    def _take(self, tokens: torch.Tensor) -> None:
        if self._table is not None:
            self._found.append(self._table.gather(1, tokens.unsqueeze(1))[:, 0])
            self._table = None


@contextmanager
def merged(model: Model) -> Iterator[int]:
    """Inside, the projections with an active LoRA adapter multiply by merged copies of their weights, in the dtype of
    the base (of a quantised base: in the dtype that it computes in). Gives the bytes of the copies. Other adapters
    compute as they do."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _can_merge(module)]
    computes_in: Any = model.get_base_model().dtype if isinstance(model, PeftModel) else None
    copies = [_copy(layer, computes_in) for layer in layers]
    for layer, (weight, bias) in zip(layers, copies, strict=True):
        is_transposed = isinstance(layer.get_base_layer(), Conv1D)
        layer.forward = functools.partial(_linear, weight.T if is_transposed else weight, bias)
    try:
        yield sum(weight.untyped_storage().nbytes() for weight, _ in copies)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _can_merge(layer: Any) -> bool:  # noqa: ANN401
    """Whether a layer is a plain product with a plain LoRA adapter, which is on."""
    names = layer.active_adapters
    is_product = isinstance(layer.get_base_layer(), nn.Linear | Conv1D)
    has_it = len(names) == 1 and names[0] in layer.lora_A and not getattr(layer, "use_dora", {}).get(names[0])
    return is_product and has_it and not layer.disable_adapters and not getattr(layer, "lora_bias", {}).get(names[0])


@torch.no_grad()
def _copy(layer: Any, computes_in: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ANN401
    """The merged weight of a layer, and its bias."""
    base = layer.get_base_layer()
    is_quantised = not base.weight.is_floating_point()
    weight = _unpacked(base) if is_quantised else base.weight
    dtype = computes_in if is_quantised else weight.dtype
    return (weight.float() + layer.get_delta_weight(layer.active_adapters[0]).float()).to(dtype), base.bias


def _unpacked(base: Any) -> torch.Tensor:  # noqa: ANN401
    """The weight of a module of bitsandbytes. Of 8 bits it keeps the scales with the weight, until the first pass moves
    them into the module's state, where peft (0.21) doesn't find them before."""
    if not hasattr(base, "state"):
        return dequantize_module_weight(base)
    scales = base.state.SCB if base.state.SCB is not None else base.weight.SCB
    return base.weight.data.float() * (scales.float() / 127).unsqueeze(1)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: ANN401
    return nn.functional.linear(x.to(weight.dtype), weight, bias if bias is None else bias.to(weight.dtype)).to(x.dtype)

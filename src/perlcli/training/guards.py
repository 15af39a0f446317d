"""The checks that no run goes without: what must move moved, what must stay stayed, the policy began at its anchor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from perlcli.errors import RunFailed
from perlcli.model import roles


def checksum(model: nn.Module, adapter: str) -> str:
    """A digest of an adapter's weights; of the base's, with its quantised state, for an empty name.

    Sums each tensor's bytes where it lies, at memory speed: it is to notice training, not forgery.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model, adapter):
        digest.update(f"{name} {sums(tensor)}".encode())
    return digest.hexdigest()


def sums(tensor: torch.Tensor) -> str:
    """What tells one tensor's content from another's."""
    flat = tensor.detach().contiguous().flatten()
    return f"{_total(flat)} {float(flat[::97].double().sum())!r}"


def _total(flat: torch.Tensor) -> int:
    """The sum of a tensor's bytes, eight by eight: torch would sum narrower types in a copy eight times as large."""
    data, total = flat.view(torch.uint8), 0
    is_aligned = data.data_ptr() % 8 == data.storage_offset() % 8 == 0  # in a mapped file a weight may lie anywhere
    for piece in data.split(1 << 30 if is_aligned else 1 << 20):
        part = piece if is_aligned else piece.clone()
        whole = len(part) // 8 * 8
        total += int(part[:whole].view(torch.int64).sum()) + int(part[whole:].sum(dtype=torch.int64))
    return total % 2**64


def _tensors(model: nn.Module, adapter: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if roles.is_of(adapter, name) if adapter else roles.is_base(name):
            yield name, parameter
            if getattr(parameter, "quant_state", None) is not None:
                yield from ((f"{name} state {i}", t) for i, t in enumerate(roles.quantised_state(parameter)))
    for name, module in [] if adapter else model.named_modules():
        scale = int8_scale(module)
        if scale is not None:
            yield f"{name} scale", scale


def int8_scale(module: nn.Module) -> torch.Tensor | None:
    """The row scales of an 8-bit layer, which bitsandbytes moves from the weight to the layer at the first forward."""
    own = dict(module.named_parameters(recurse=False)).get(
        "weight"
    )  # peft's wrapper shows its layer's weight as its own
    for holder in (own, getattr(module, "state", None) if own is not None else None):
        scale = getattr(holder, "SCB", None)
        if scale is not None:
            return scale
    return None


def checksums(model: Any) -> dict[str, str]:
    """A digest for each role on the base; under full tuning of the policy alone."""
    adapters = list(getattr(model, "peft_config", {}))
    if not adapters:
        return {roles.POLICY: checksum(model, "")}
    return {"": checksum(model, ""), **{name: checksum(model, name) for name in adapters}}


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """The policy must have moved, and the value model where there is one; nothing else may. Raises RunFailed."""
    for name, mark in before.items():
        word = f"The {told(name)}"
        if name in (roles.POLICY, roles.VALUE):
            assert_moved(mark, after[name], word)
        else:
            assert_still(mark, after[name], f"{word} adapter" if name.startswith(roles.REWARD) else word)


def told(name: str) -> str:
    """A role's name for a person to read; the empty one is the base's."""
    words = {"": "base", roles.POLICY: "policy", roles.ANCHOR: "anchor", roles.VALUE: "value model"}
    return words.get(name, name)


def assert_moved(before: str, after: str, what: str) -> None:
    """Fail a run whose trained adapter is what it was: it learned nothing."""
    if before == after:
        raise RunFailed(f"{what} did not change: nothing was learned", "check --learning-rate and the data")


def assert_still(before: str, after: str, what: str) -> None:
    """Fail a run that changed what must stay frozen."""
    if before != after:
        raise RunFailed(f"{what} changed during the run, though it is frozen: the result can't be trusted")


class TrainsExactly(TrainerCallback):
    """Stops a run before its first step where its optimiser holds other parameters than those that are to train."""

    def __init__(self, intended: Collection[nn.Parameter], names: Mapping[int, str]) -> None:
        self.intended, self.names = {id(parameter) for parameter in intended}, names

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not self.intended:
            raise RunFailed("No parameter is left to train: nothing can be learned")
        for what, odd in (("would train", held - self.intended), ("would not train", self.intended - held)):
            if odd:
                first = self.names.get(next(iter(odd)), "a parameter outside the model")
                raise RunFailed(f"{len(odd)} parameters {what} against what was asked for, {first} among them")


def intended(model: nn.Module, more: Iterable[nn.Parameter] = ()) -> TrainsExactly:
    """The guard for a run that trains the policy's adapter, everything under full tuning, and what is named beside."""
    named = dict(model.named_parameters())
    adapters = getattr(model, "peft_config", None)
    wanted = [p for name, p in named.items() if adapters is None or roles.is_of(roles.POLICY, name)]
    return TrainsExactly([*wanted, *more], {id(parameter): name for name, parameter in named.items()})


class StartsAtAnchor(TrainerCallback):
    """Stops a run whose first logged KL is not 0, where the policy is its own anchor at the start."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1 and logs and logs.get("kl") is not None:
            assert_at_anchor(logs["kl"], self.dtype)


def assert_at_anchor(kl: float, dtype: torch.dtype) -> None:
    """Fail a run whose policy is not its anchor before the first step; `kl` is the mean per token.

    The two are computed alike, so their difference is 0, or rounding whose mean stays far below the dtype's step.
    """
    limit = max(1e-5, torch.finfo(dtype).eps / 10)
    if not abs(kl) <= limit or not math.isfinite(kl):
        raise RunFailed(
            f"The policy is not its own anchor at the start: KL {kl:.3g} per token, above the {limit:.1g} of {dtype}",
            "this is a fault of perlcli or a library below it: please report it with the model and the options",
        )

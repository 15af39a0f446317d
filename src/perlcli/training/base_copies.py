"""What is in memory: how many copies of the base, counted from the live tensors, and what each role adds to one."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from perlcli.model import roles
from perlcli.text import megabytes
from perlcli.training.guards import Model

IN_LAYER = re.compile(r"\.\d+\.")
Shape = tuple[int, ...]


def base_copies(model: nn.Module) -> float:
    """How many copies of the base's layers are in memory, in any precision: 1 if every role shares them. This is the
    size of all live tensors with the shape of one of the base's layer matrices, divided by the size of the base's own.
    Views of one storage count once; gradients and optimiser states don't count."""
    own: Counter[Shape] = Counter()
    for name, parameter in model.named_parameters():
        shape = _shape(parameter)
        if roles.is_base(name) and IN_LAYER.search(name) and len(shape) > 1:
            own[shape] += 1
    adapters = {id(parameter) for name, parameter in model.named_parameters() if not roles.is_base(name)}
    live = _count_live(set(own), adapters)
    size = {shape: torch.Size(shape).numel() for shape in own}
    total = sum(size[shape] * count for shape, count in own.items())
    return sum(size[shape] * live[shape] for shape in own) / total if total else 0.0


def _count_live(wanted: set[Shape], adapters: set[int]) -> Counter[Shape]:
    """How many storages of each wanted shape are in memory, not counting the model's own adapters."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [item for item in objects if issubclass(type(item), torch.Tensor)]
    gradients = {id(tensor.grad) for tensor in tensors if tensor.is_leaf and tensor.grad is not None}
    optimisers: list[Any] = [item for item in objects if issubclass(type(item), torch.optim.Optimizer)]
    states = [state for optimiser in optimisers for state in optimiser.state.values()]
    ignored = adapters | gradients | {id(value) for state in states for value in state.values()}
    counts: Counter[Shape] = Counter()
    seen: set[int] = set()
    for tensor in tensors:
        if tensor.device.type == "meta" or id(tensor) in ignored or _shape(tensor) not in wanted:
            continue
        storage = tensor.untyped_storage().data_ptr()
        if storage not in seen:
            seen.add(storage)
            counts[_shape(tensor)] += 1
    return counts


def _shape(tensor: torch.Tensor) -> Shape:
    """The shape of the weight that a tensor holds: 4-bit packing stores it flat."""
    state = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape)


def of_roles(model: Model, anchor: nn.Module | None, rewards: Mapping[str, int], value: int) -> dict[str, float]:
    """Megabytes of the base and of what each role adds to it; under full tuning each role is a separate model.
    `rewards` (by name) and `value` are given in bytes; a reward function takes none."""
    base = roles.bytes_of(p for name, p in model.named_parameters() if roles.is_base(name))
    if isinstance(model, PeftModel):
        sizes = {"base": base, "policy": roles.adapter_bytes(model, roles.POLICY)}
        sizes["anchor"] = roles.adapter_bytes(model, roles.ANCHOR)
    else:
        sizes = {"policy": base}
    if anchor is not None:
        sizes["anchor"] = roles.bytes_of(anchor.parameters())
    sizes |= {f"reward {name}" if len(rewards) > 1 else "reward": size for name, size in rewards.items() if size}
    if value:
        sizes["value"] = value
    return {name: round(size / 1e6, 3) for name, size in sizes.items()}


def line(copies: float, sizes: Mapping[str, float]) -> str:
    """The memory of a run as one line, from megabytes by role."""
    start = f"base copies resident: {copies:.3g}"
    if "base" in sizes:
        start += f" ({megabytes(sizes['base'])})"
    return start + "; " + ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items() if name != "base")

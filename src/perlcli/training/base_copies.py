"""What lies in memory: how many copies of the base, counted from the live tensors, and what each role adds to one."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from perlcli.model import roles
from perlcli.text import megabytes

IN_LAYER = re.compile(r"\.\d+\.")
Shape = tuple[int, ...]


def base_copies(model: nn.Module) -> float:
    """How often the base's layers lie in memory, in any precision: 1 where every role shares them.

    Counts, over all live tensors of the process, those of the shapes that the base's layer matrices have, against the
    base's own; views of one storage count once, gradients and optimiser states not at all.
    """
    own: Counter[Shape] = Counter()
    for name, parameter in model.named_parameters():
        if roles.is_base(name) and IN_LAYER.search(name) and len(_shape(parameter)) > 1:
            own[_shape(parameter)] += 1
    adapters = {id(parameter) for name, parameter in model.named_parameters() if not roles.is_base(name)}
    live = _live(set(own), adapters)
    size = {shape: torch.Size(shape).numel() for shape in own}
    total = sum(size[shape] * count for shape, count in own.items())
    return sum(size[shape] * live[shape] for shape in own) / total if total else 0.0


def _live(wanted: set[Shape], adapters: set[int]) -> Counter[Shape]:
    """How many storages of these shapes lie in memory, but for the model's own adapters."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [item for item in objects if issubclass(type(item), torch.Tensor)]
    kept = adapters | {id(grad) for tensor in tensors if tensor.is_leaf and (grad := tensor.grad) is not None}
    for item in objects:
        if issubclass(type(item), torch.optim.Optimizer):
            kept |= {id(value) for state in item.state.values() for value in state.values()}
    found: Counter[Shape] = Counter()
    seen: set[int] = set()
    for tensor in tensors:
        if tensor.device.type == "meta" or id(tensor) in kept or _shape(tensor) not in wanted:
            continue
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            found[_shape(tensor)] += 1
    return found


def _shape(tensor: torch.Tensor) -> Shape:
    """The shape that a weight stands for: packing in 4 bits stores it flat."""
    state = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape)


def of_roles(model: Any, anchor: Any, rewards: Mapping[str, int], value: int) -> dict[str, float]:
    """MB of the base and of what each role adds to it; under full tuning each role is a model of its own.

    `rewards` and `value` come in bytes; a reward function takes none.
    """
    adapters = getattr(model, "peft_config", None)
    own = roles.bytes_of(p for name, p in model.named_parameters() if roles.is_base(name))
    found = {"base": own} if adapters is not None else {}
    found["policy"] = roles.adapter_bytes(model, roles.POLICY) if adapters is not None else own
    if anchor is not None:
        found["anchor"] = roles.bytes_of(anchor.parameters())
    elif adapters is not None:
        found["anchor"] = roles.adapter_bytes(model, roles.ANCHOR)
    found |= {f"reward {name}" if len(rewards) > 1 else "reward": size for name, size in rewards.items() if size}
    if value:
        found["value"] = value
    return {name: round(size / 1e6, 3) for name, size in found.items()}


def line(copies: float, parts: Mapping[str, float]) -> str:
    """The memory of a run as one line."""
    start = f"base copies resident: {copies:.3g}"
    if "base" in parts:
        start += f" ({megabytes(parts['base'])})"
    return start + "; " + ", ".join(f"{name} {megabytes(size)}" for name, size in parts.items() if name != "base")

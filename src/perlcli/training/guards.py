"""Checks that no run skips: what trains has changed, what is frozen has not, the policy started at its anchor; and how
many copies of the base are in memory, counted from the live tensors."""

from __future__ import annotations

import gc
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerState

from perlcli.errors import RunFailed
from perlcli.model import roles
from perlcli.model.roles import Model
from perlcli.run.lifecycle import Run
from perlcli.text import counted, megabytes

IN_LAYER = re.compile(r"\.\d+\.")
Shape = tuple[int, ...]
Digests = dict[str, str]  # by role; the base's role is ""
Save = Callable[[Model, Path], None]  # writes a model into a folder
SKIPPED = "skipped_steps"  # in the record's guards
TRAINED = (roles.POLICY, roles.VALUE)
WORDS = {"": "base", roles.POLICY: "policy", roles.ANCHOR: "anchor", roles.VALUE: "value model"}


def checksum(model: nn.Module, adapter: str) -> str:
    """A digest of an adapter's weights, or for an empty name of the base's weights with their quantised state. Sums the
    bytes of each tensor without a copy, at memory speed: it is meant to notice training, not forgery."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(model, adapter):
        digest.update(f"{name} {sums(tensor)}".encode())
    return digest.hexdigest()


def sums(tensor: torch.Tensor) -> str:
    """Two sums over a tensor's content that change if the content does."""
    flat = tensor.detach().contiguous().flatten()
    return f"{_total(flat)} {float(flat[::97].double().sum())!r}"


def _total(flat: torch.Tensor) -> int:
    """The sum of a tensor's bytes as 64-bit numbers: torch would sum narrower types in a copy eight times as large."""
    data, total = flat.view(torch.uint8), 0
    # a weight in a memory-mapped file can start at any byte, and a view as int64 needs a multiple of 8
    is_aligned = data.data_ptr() % 8 == data.storage_offset() % 8 == 0
    for piece in data.split(1 << 30 if is_aligned else 1 << 20):
        part = piece if is_aligned else piece.clone()
        end = len(part) // 8 * 8
        total += int(part[:end].view(torch.int64).sum()) + int(part[end:].sum(dtype=torch.int64))
    return total % 2**64


def _tensors(model: nn.Module, adapter: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if not (roles.is_of(adapter, name) if adapter else roles.is_base(name)):
            continue
        yield name, parameter
        if getattr(parameter, "quant_state", None) is not None:
            yield from ((f"{name} state {i}", state) for i, state in enumerate(roles.quantised_state(parameter)))
    if adapter:
        return
    for name, module in model.named_modules():
        scale = int8_scale(module)
        if scale is not None:
            yield f"{name} scale", scale


def int8_scale(module: nn.Module) -> torch.Tensor | None:
    """The row scales of an 8-bit layer; None for any other module. bitsandbytes moves them from the weight to the
    layer's state at the first forward pass."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")  # peft's wrapper shows its layer's as its own
    if weight is None:
        return None
    scale = getattr(weight, "SCB", None)
    return getattr(getattr(module, "state", None), "SCB", None) if scale is None else scale


def checksums(model: Model) -> Digests:
    """A digest for each role on the base; under full tuning only for the policy."""
    if not isinstance(model, PeftModel):
        return {roles.POLICY: checksum(model, "")}
    return {"": checksum(model, ""), **{name: checksum(model, name) for name in model.peft_config}}


class Watch:
    """Compares the weights of each role before training with those after it. `digests` gives a digest for each role;
    `trained` are the roles that must change, while all others must not."""

    def __init__(self, digests: Callable[[], Digests], trained: Collection[str] = TRAINED) -> None:
        self.digests, self.trained = digests, trained
        self.before = digests()
        self.after: Digests = {}

    def before_saving(self, save: Save) -> Save:
        """`save`, which takes the digests first: saving rounds the head of a reward model and fully tuned weights."""

        def digest_and_save(model: Model, folder: Path) -> None:
            self.after = self.digests()
            save(model, folder)

        return digest_and_save

    def check(self) -> dict[str, list[str]]:
        """The names of the roles that trained and of those that did not. Raises RunFailed, as `compare` does."""
        compare(self.before, self.after, self.trained)
        names = sorted((WORDS.get(role, role), role in self.trained) for role in self.before)
        trained = [name for name, is_trained in names if is_trained]
        return {"trained": trained, "unchanged": [name for name, is_trained in names if not is_trained]}


def compare(before: Digests, after: Digests, trained: Collection[str] = TRAINED) -> None:
    """Raises RunFailed if one of the trained roles did not change, or any other role did."""
    for role, digest in before.items():
        name, has_changed = WORDS.get(role, role), after[role] != digest
        if role in trained and not has_changed:
            raise RunFailed(f"The {name} did not change: nothing was learned", "check --learning-rate and the data")
        if role not in trained and has_changed:
            what = f"{name} adapter" if role.startswith(roles.REWARD) else name
            raise RunFailed(f"The {what} changed during training although it is frozen: the result can't be trusted")


class TrainsExactly(TrainerCallback):
    """Stops a run before its first step unless its optimiser holds exactly the policy's adapter (under full tuning all
    of the model) and `more` parameters."""

    def __init__(self, model: nn.Module, more: Iterable[nn.Parameter] = ()) -> None:
        named = dict(model.named_parameters())
        is_full = not isinstance(model, PeftModel)
        policy = [parameter for name, parameter in named.items() if is_full or roles.is_of(roles.POLICY, name)]
        self.intended = {id(parameter) for parameter in (*policy, *more)}
        self.names = {id(parameter): name for name, parameter in named.items()}

    def on_train_begin(self, *_: object, optimizer: Any = None, **__: object) -> None:
        if not self.intended:
            raise RunFailed("No parameter is trainable: nothing can be learned")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._refuse(held - self.intended, "would train {} that should stay frozen, such as {}")
        self._refuse(self.intended - held, "leaves out {} that should train, such as {}")

    def _refuse(self, parameters: set[int], fault: str) -> None:
        if parameters:
            example = self.names.get(next(iter(parameters)), "one outside the model")
            count = f"{len(parameters)} parameter{'s' * (len(parameters) != 1)}"
            raise RunFailed(f"The optimiser {fault.format(count, example)}")


class SkippedSteps(TrainerCallback):
    """Counts the steps that float16's gradient scaler skips because a gradient overflowed, and keeps the count in the
    record. They change no weight and halve the scale, which starts at 65,536: the first steps are often skipped."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.count = 0
        self.earlier = run.before.guards.get(SKIPPED, 0) if run.before is not None else 0  # of the run that it resumes

    def on_optimizer_step(self, *_: object, optimizer: Any = None, **__: object) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # accelerate's wrapper of the optimiser says it
            self.count += 1
            self.run.record.guards[SKIPPED] = self.earlier + self.count

    def check(self) -> None:
        """Note how many steps were skipped. Raises RunFailed if all were, in a run that was not resumed."""
        record, count = self.run.record, self.earlier + self.count
        if count and count == record.steps and self.run.before is None:
            problem = f"float16's gradient scaler skipped all {counted(count, 'step')}: nothing was learned"
            hint = "it halves its scale with each until gradients fit: train for more steps, or use --dtype bfloat16 or"
            raise RunFailed(problem, f"{hint} float32")
        if count:
            self.run.note(
                f"float16's gradient scaler skipped {count:,} of {record.steps:,} steps, in which a gradient "
                "overflowed: nothing was learned in them."
            )


class StartsAtAnchor(TrainerCallback):
    """Stops a run whose first logged KL is not 0, for a policy that starts at its anchor."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def on_log(
        self, args: object, state: TrainerState, *_: object, logs: dict[str, float] | None = None, **__: object
    ) -> None:
        if state.global_step == 1 and logs and logs.get("kl") is not None:
            assert_at_anchor(logs["kl"], self.dtype)


def assert_at_anchor(kl: float, dtype: torch.dtype) -> None:
    """Raises RunFailed if the policy differs from its anchor before the first step; `kl` is the mean per token. Both
    are computed in the same way, so they differ by 0, or by rounding whose mean is far below the dtype's epsilon."""
    limit = max(1e-5, torch.finfo(dtype).eps / 10)
    if not abs(kl) <= limit or not math.isfinite(kl):
        raise RunFailed(
            f"The policy differs from its anchor before the first step: KL {kl:.3g} per token, and rounding in {dtype} "
            f"explains at most {limit:.1g}",
            "this is a bug in perlcli or in a library it uses: please report it with the model and the options",
        )


# What is in memory


def base_copies(model: nn.Module) -> float:
    """How many copies of the base's layers are in memory, in any precision: 1 if every role shares them. This is the
    size of all live tensors with the shape of one of the base's layer matrices, divided by the size of the base's own.
    Views of one storage count once; gradients and optimiser states don't count."""
    shapes = {name: _shape(parameter) for name, parameter in model.named_parameters() if roles.is_base(name)}
    in_layers = {shape for name, shape in shapes.items() if IN_LAYER.search(name) and len(shape) > 1}
    own = Counter(shape for shape in shapes.values() if shape in in_layers)  # a projector may have a layer's shape
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
    by_storage: dict[int, Shape] = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and id(tensor) not in ignored and _shape(tensor) in wanted:
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), _shape(tensor))
    return Counter(by_storage.values())


def _shape(tensor: torch.Tensor) -> Shape:
    """The shape of the weight that a tensor holds: 4-bit packing stores it flat."""
    state = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape)


def sizes_of_roles(model: Model, anchor: nn.Module | None, rewards: Mapping[str, int], value: int) -> dict[str, float]:
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


def memory_line(copies: float, sizes: Mapping[str, float]) -> str:
    """The memory of a run as one line, from megabytes by role."""
    start = f"base copies resident: {copies:.3g}"
    if "base" in sizes:
        start += f" ({megabytes(sizes['base'])})"
    return start + "; " + ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items() if name != "base")

"""A model that is lent to a trainer: how it was before, and how it gets back there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

# Of a module's own attributes, what transformers, accelerate and TRL set; and where torch keeps hooks.
SET = ("forward", "_original_forward", "training", "gradient_checkpointing", "_gradient_checkpointing_func")
HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
State = list[dict[Any, Any]]


class Part:
    """Entries of one dictionary in a model: those with these keys, or all of them."""

    def __init__(self, entries: MutableMapping[Any, Any], keys: Sequence[str] | None = None) -> None:
        self.entries, self.keys = entries, keys

    def read(self) -> dict[Any, Any]:
        """The entries as they are now."""
        keys = self.entries if self.keys is None else self.keys
        return {key: self.entries[key] for key in keys if key in self.entries}

    def write(self, values: Mapping[Any, Any]) -> None:
        """Replace the entries by others."""
        for key in self.read():
            del self.entries[key]
        self.entries.update(values)


class Lent:
    """The state of a model before a trainer takes it: its configs (TRL turns `output_router_logits` on, transformers
    `use_cache` off), generation config, forward methods, hooks, train or eval mode, and gradient checkpointing. Its
    weights, and which of them train, are not a part of it."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = list(_parts(model))
        self.before = self._read()

    def give_back(self) -> None:
        """Put everything back as it was before."""
        self._write(self.before)

    @contextmanager
    def given_back(self) -> Iterator[None]:
        """Put everything back for a while, such as for saving; then the trainer has the model again as it left it."""
        now = self._read()
        self.give_back()
        try:
            yield
        finally:
            self._write(now)

    def _read(self) -> State:
        return [part.read() for part in self.parts]

    def _write(self, state: State) -> None:
        for part, values in zip(self.parts, state, strict=True):
            part.write(values)


def _parts(model: Any) -> Iterator[Part]:  # noqa: ANN401
    """What of a model a trainer may change."""
    holders = [getattr(model, "generation_config", None)]
    for module in model.modules():
        yield Part(vars(module), SET)
        yield from (Part(getattr(module, name)) for name in HOOKS)
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            holders += [config, *(getattr(config, name, None) for name in config.sub_configs)]
    yield from {id(holder): Part(vars(holder)) for holder in holders if holder is not None}.values()

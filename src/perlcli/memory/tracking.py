"""Follows the bytes of tensors while code runs, for any size of batch at once."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS, LOGITS, GRADIENTS, CACHE = TAGS = ("activations", "logits", "gradients", "cache")
# The batch that is run: a large prime. What it divides grows with the batch, as no other dimension is a multiple of it.
# It is small enough that no count of bytes overflows.
ROWS = 1_048_573


class Live(TorchDispatchMode):
    """Follows the bytes of tensors that are made while it is on, fake or real; views of one storage count once."""

    def __init__(self) -> None:
        super().__init__()
        self.tag = ACTIVATIONS
        self.events: list[tuple[str, int, int]] = []  # tag, change in bytes, event that made the tensor
        self.seen: dict[int, tuple[object, str, int]] = {}  # by storage: what keeps its id valid, tag, event

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor):
                self.add(item)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor until its storage is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return

        def gone(_: object) -> None:
            _, tag, birth = self.seen.pop(key)
            self.events.append((tag, -size, birth))

        here = len(self.events)
        self.seen[key] = (weakref.ref(storage, gone), self.tag, here)
        self.events.append((self.tag, size, here))

    def retag(self, tensor: torch.Tensor, tag: str) -> None:
        """Count a living tensor under another tag."""
        storage = tensor.untyped_storage()
        if id(storage) in self.seen:
            reference, before, birth = self.seen[id(storage)]
            self.seen[id(storage)] = (reference, tag, birth)
            self.events += [(before, -storage.nbytes(), birth), (tag, storage.nbytes(), birth)]

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave out tensors that existed before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.seen.setdefault(id(storage), (storage, "", -1))

    def series(self) -> torch.Tensor:
        """The change of each tag's bytes at each event, (events, 2, tags): for any batch, and for each of its rows."""
        changes = [
            [[part if tag == other else 0 for other in TAGS] for part in split(size)] for tag, size, _ in self.events
        ]
        return torch.tensor(changes, dtype=torch.int64).reshape(-1, 2, len(TAGS))

    def peak(self) -> int:
        """The most bytes that lived at once."""
        return max(itertools.accumulate((size for _, size, _ in self.events), initial=0))


def split(size: int) -> tuple[int, int]:
    """The bytes of a tensor that every batch takes, and those that each row adds."""
    return (0, size // ROWS) if size % ROWS == 0 else (size, 0)

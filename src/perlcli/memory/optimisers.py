"""What an optimiser keeps for each tensor that it trains, in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from perlcli import settings
from perlcli.errors import PerlError

DEFAULT: str = settings.GENERAL["optim"]
FLOAT = 4  # weights, gradients and states are in float32
BLOCK = 256  # bitsandbytes: values of an 8-bit state that share a scale
LEAST_8BIT = 4096  # bitsandbytes: values of a tensor from which on its state has 8 bits
LEAST_PAGED = 100_000  # bitsandbytes: values of a state from which on it is paged
SHORT_RUN = "a short run reports its peak: --max-steps 2"


class Tensors(NamedTuple):
    """Trained tensors of one shape."""

    shape: tuple[int, ...]
    number: int = 1
    is_embedding: bool = False

    @property
    def size(self) -> int:
        """The values of one of them."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Optimiser:
    """How an optimiser keeps its state, and what a step takes for a moment."""

    kept: Literal["moments", "8-bit moments", "factors", "nothing"] = "moments"
    is_paged: bool = False  # in memory that the driver moves to the host's while the GPU needs it
    is_foreach: bool = False  # a step on a GPU holds a copy of all second moments


# By name in transformers. Sources: torch/optim/adamw.py, bitsandbytes/optim/optimizer.py, transformers/optimization.py;
# SGD has no momentum unless `--set optim_args=` gives one.
OPTIMISERS = {
    "adamw_torch": Optimiser(is_foreach=True),
    "adamw_torch_fused": Optimiser(),
    "adamw_bnb_8bit": Optimiser("8-bit moments"),
    "adamw_8bit": Optimiser("8-bit moments"),
    "paged_adamw_32bit": Optimiser(is_paged=True),
    "paged_adamw_8bit": Optimiser("8-bit moments", is_paged=True),
    "adafactor": Optimiser("factors"),
    "sgd": Optimiser("nothing"),
}


@dataclass(frozen=True)
class States:
    """The bytes of an optimiser's state, and what a step takes for a moment."""

    resident: int
    paged: int = 0  # on a GPU, outside torch's allocator
    momentary: int = 0


def known(name: str) -> Optimiser:
    """The optimiser of this name. Raises PerlError for one whose memory can't be predicted."""
    if name not in OPTIMISERS:
        raise PerlError(f"--optim {name}: memory is only predicted for {', '.join(OPTIMISERS)}", SHORT_RUN)
    return OPTIMISERS[name]


def states(name: str, trained: Iterable[Tensors], *, cuda: bool) -> States:
    """What an optimiser takes for these tensors. Raises PerlError for one whose memory can't be predicted."""
    optimiser, resident, paged, momentary = known(name), 0, 0, 0
    for each in trained:
        tensor, scales = _bytes_of(optimiser, each)
        is_paged = optimiser.is_paged and cuda and each.size >= LEAST_PAGED
        paged += each.number * tensor * is_paged
        resident += each.number * (scales + tensor * (not is_paged))
        if optimiser.is_foreach and cuda:
            momentary += each.number * FLOAT * each.size
        elif optimiser.kept == "factors":  # the step of a tensor, and the product of its factors
            momentary = max(momentary, 2 * FLOAT * each.size)
    return States(resident, paged, momentary)


def _bytes_of(optimiser: Optimiser, each: Tensors) -> tuple[int, int]:
    """The bytes of one tensor's state, and of the scales of its blocks."""
    if optimiser.kept == "nothing":
        return 0, 0
    if optimiser.kept == "factors":
        is_flat = len(each.shape) < 2
        rows = math.prod(each.shape[:-1])
        columns = math.prod((*each.shape[:-2], *each.shape[-1:]))
        return FLOAT * (each.size if is_flat else rows + columns), 0
    # transformers keeps an embedding's moments in 32 bits (Trainer.create_optimizer)
    if optimiser.kept == "8-bit moments" and each.size >= LEAST_8BIT and not each.is_embedding:
        return 2 * each.size, 2 * FLOAT * math.ceil(each.size / BLOCK)
    return 2 * FLOAT * each.size, 0

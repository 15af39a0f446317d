"""What is traced: a training step of a stage or of the value model, or a forward pass of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["sft", "reward", "rl", "value", "prefill", "decode"]
LEARNING = ("sft", "reward", "rl", "value")


@dataclass(frozen=True)
class Step:
    """One step of a run, in all that its memory depends on but the batch."""

    kind: Kind
    length: int  # tokens per row; decode: those in the cache
    completion: int = 0  # rl: tokens whose log-probabilities are taken; value: tokens whose returns are predicted
    dtype: str = "float32"  # of the weights; for a quantised base, what it computes in
    autocast: str = ""  # dtype of mixed precision, if it is on
    bits: int = 0  # 4 or 8 if the base is quantised
    rank: int = 0  # of the adapter; 0: every parameter trains
    targets: tuple[str, ...] | str = ()
    dora: bool = False
    checkpointing: bool = False
    accumulated: bool = False  # gradients of an earlier pass exist already
    cuda: bool = False

    @property
    def computes_in(self) -> torch.dtype | None:
        """The dtype of mixed precision; None if it is off."""
        return torch_dtype(self.autocast) if self.autocast else None


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype

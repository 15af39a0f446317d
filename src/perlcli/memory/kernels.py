"""Stand-ins for kernels: they allocate what CUDA's, bitsandbytes' and TRL's allocate, and compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from perlcli.memory.steps import Step, torch_dtype
from perlcli.memory.tracking import ACTIVATIONS, LOGITS, Live

TILE_TOKENS, TILE_WIDTH = 4096, 32768  # of TRL's fused head, which never holds all logits (trl/kernels)
CPU_TILE = {"forward": 12, "backward": 29}  # bytes per element next to the tile, if torch folds it and not Triton

Tensor = torch.Tensor


class Kernels(TorchFunctionMode):
    """Replaces calls whose kernels on the run's device hold other tensors than a CPU's. `quantised` are the ids of the
    weights that bitsandbytes quantises."""

    def __init__(self, step: Step, quantised: set[int]) -> None:
        super().__init__()
        self.step, self.quantised = step, quantised

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        functional = nn.functional
        if self.step.bits and func is functional.linear and id(args[1]) in self.quantised:
            return _Quantised.apply(args[0], args[1], self.step.bits)
        if self.step.cuda and func is functional.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return _Attention.apply(*_lowered(args[:3], self.step), mask)
        if self.step.cuda and self.step.autocast and func is functional.layer_norm:  # in float32 under CUDA's autocast
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


def _lowered(tensors: Sequence[Tensor], step: Step) -> list[Tensor]:
    """The tensors in the dtype of mixed precision, if it is on."""
    return [tensor if step.computes_in is None else tensor.to(step.computes_in) for tensor in tensors]


class _Attention(torch.autograd.Function):
    """The memory of CUDA's fused attention: no scores of all pairs, but the mask of a padded batch as a bias."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(query)
        bias = None if mask is None else torch.empty(mask.shape, dtype=query.dtype)
        ctx.save_for_backward(query, key, value, out, bias, torch.empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


class _Quantised(torch.autograd.Function):
    """The memory of a bitsandbytes product: weights unpacked while it runs; 8 bits keep the input until backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bits: int) -> Tensor:
        ctx.weight = weight
        if bits == 8:
            ctx.save_for_backward(x)
            held = [torch.empty(x.shape, dtype=torch.float16), torch.empty(x.shape, dtype=torch.int8)]
            held.append(torch.empty(*x.shape[:-1], _width(x, weight), dtype=torch.int32))
        else:
            held = [torch.empty(weight.shape, dtype=weight.dtype)]
        out = torch.empty(*x.shape[:-1], _width(x, weight), dtype=weight.dtype)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        del held
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        unpacked = torch.empty(ctx.weight.shape, dtype=ctx.weight.dtype)
        to_input = torch.empty(ctx.shape, dtype=ctx.dtype)
        del unpacked
        return to_input, None, None


def _width(x: Tensor, weight: Tensor) -> int:
    """The width of the output: a linear module's weight is (out, in), a Conv1D's (in, out)."""
    return int(weight.shape[0] if weight.shape[1] == x.shape[-1] else weight.shape[1])


def fused_head(hidden: Tensor, weight: Tensor, step: Step, live: Live) -> Tensor:
    """The memory of TRL's log-probabilities, (tokens,), from `hidden`, (tokens, hidden size), and the head's weight."""
    logprobs: Tensor = _Head.apply(hidden, weight, step, live)
    return logprobs


class _Head(torch.autograd.Function):
    """TRL's fused head (trl/kernels/chunked_logprob.py): tiles of logits, made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, step: Step, live: Live) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.step, ctx.live, ctx.dtype = step, live, torch_dtype(step.autocast or step.dtype)
        held = [*_tile(ctx, hidden, weight, "forward"), torch.empty(len(hidden), 7, dtype=torch.float32)]
        logprobs = torch.empty(len(hidden), dtype=torch.float32)
        del held
        return logprobs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        to_hidden = torch.empty(hidden.shape, dtype=torch.float32)
        to_weight = torch.empty(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        held = _tile(ctx, hidden, weight, "backward")
        del held
        return to_hidden.to(hidden.dtype), to_weight.to(weight.dtype) if to_weight is not None else None, None, None


def _tile(ctx: Any, hidden: Tensor, weight: Tensor, direction: str) -> list[Tensor]:
    """What a tile of logits takes while it is folded; a prediction cuts its rows to TILE_TOKENS."""
    width = min(TILE_WIDTH, weight.size(0))
    held = [weight[:width].to(ctx.dtype)]
    ctx.live.tag = LOGITS
    extra = 0 if ctx.step.cuda else CPU_TILE[direction]
    held.append(torch.empty(len(hidden), TILE_WIDTH, dtype=ctx.dtype))
    held.append(torch.empty(len(hidden), width * extra, dtype=torch.int8))
    held.append(hidden.to(ctx.dtype))
    ctx.live.tag = ACTIVATIONS
    return held

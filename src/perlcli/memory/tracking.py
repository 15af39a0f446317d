"""Follows the bytes of tensors while code runs, for any size of batch at once.

Stand-ins for kernels allocate what those of CUDA, bitsandbytes and TRL allocate, and compute nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perlcli.memory.skeletons import Step, torch_dtype

ACTIVATIONS, LOGITS, GRADIENTS, CACHE = TAGS = ("activations", "logits", "gradients", "cache")
# The batch that is run: a large prime. What it divides grows with the batch, as no other dimension is a multiple of it.
# It is small enough that no count of bytes overflows.
ROWS = 1_048_573
TILE_TOKENS, TILE_WIDTH = 4096, 32768  # of TRL's fused head, which never holds all logits (trl/kernels)
CPU_TILE = {"forward": 12, "backward": 29}  # bytes per element next to the tile, if torch folds it and not Triton


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
            if isinstance(item, Tensor):
                self.add(item)
        return result

    def add(self, tensor: Tensor) -> None:
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

    def retag(self, tensor: Tensor, tag: str) -> None:
        """Count a living tensor under another tag."""
        storage = tensor.untyped_storage()
        if id(storage) in self.seen:
            reference, before, birth = self.seen[id(storage)]
            self.seen[id(storage)] = (reference, tag, birth)
            self.events += [(before, -storage.nbytes(), birth), (tag, storage.nbytes(), birth)]

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out tensors that existed before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.seen.setdefault(id(storage), (storage, "", -1))

    def series(self) -> Tensor:
        """The change of each tag's bytes at each event, (events, 2, tags): for any batch, and for each of its rows."""
        changes = [
            [[part if tag == other else 0 for other in TAGS] for part in split(size)] for tag, size, _ in self.events
        ]
        return torch.tensor(changes, dtype=torch.int64).reshape(-1, 2, len(TAGS))


def split(size: int) -> tuple[int, int]:
    """The bytes of a tensor that every batch takes, and those that each row adds."""
    return (0, size // ROWS) if size % ROWS == 0 else (size, 0)


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
            return (_EightBits if self.step.bits == 8 else _FourBits).apply(args[0], args[1])
        if func in (functional.grouped_mm, torch._grouped_mm):  # without data it takes bfloat16 only
            return _Grouped.apply(args[0], args[1])
        if self.step.cuda and func is functional.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            dtype = self.step.computes_in
            lowered = args[:3] if dtype is None else [tensor.to(dtype) for tensor in args[:3]]
            return _Attention.apply(*lowered, mask)
        if self.step.cuda and self.step.autocast and func is functional.layer_norm:  # in float32 under CUDA's autocast
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


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


class _Grouped(torch.autograd.Function):
    """The memory of a product of (rows, in) by the experts' (experts, in, out), whichever expert each row goes to."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        needs_rows = ctx.needs_input_grad[1]  # only for the weight's gradient
        ctx.save_for_backward(*((rows, weight) if needs_rows else (weight,)))
        return torch.empty(rows.shape[0], weight.shape[-1], dtype=rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *_, weight = ctx.saved_tensors
        to_rows = torch.empty(gradient.shape[0], weight.shape[1], dtype=gradient.dtype)
        return to_rows, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _FourBits(torch.autograd.Function):
    """The memory of bitsandbytes' MatMul4Bit: the weight is unpacked while it multiplies, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.shape, ctx.dtype = weight, x.shape, x.dtype
        unpacked = torch.empty(weight.shape, dtype=weight.dtype)
        out = torch.empty(*x.shape[:-1], _width(x, weight), dtype=weight.dtype)
        del unpacked
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        unpacked = torch.empty(ctx.weight.shape, dtype=ctx.weight.dtype)
        to_input = torch.empty(ctx.shape, dtype=ctx.dtype)
        del unpacked
        return to_input, None


class _EightBits(torch.autograd.Function):
    """The memory of bitsandbytes' MatMul8bitLt on CUDA. Its input stays on the context as an attribute, so that
    checkpointing can only drop it if it is reentrant (`plans.is_reentrant`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.tensors = weight, (x,)
        half = x.to(torch.float16)
        outliers = [half.abs(), torch.empty(half.shape, dtype=torch.bool)]
        del outliers[0]
        rows = [torch.empty(half.shape, dtype=torch.int8), torch.empty(half.shape[:-1], dtype=torch.float32)]
        del half, outliers
        product = torch.empty(*x.shape[:-1], _width(x, weight), dtype=torch.int32)
        out = torch.empty(product.shape, dtype=x.dtype)
        del rows, product
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.tensors, ctx.weight
        unpacked = torch.empty(weight.shape, dtype=x.dtype)
        cast = gradient.to(x.dtype)
        to_input = torch.empty(x.shape, dtype=x.dtype)
        del unpacked, cast
        return to_input, None


def _width(x: Tensor, weight: Tensor) -> int:
    """The width of the output: a linear module's weight is (out, in), a Conv1D's (in, out)."""
    return int(weight.shape[0] if weight.shape[1] == x.shape[-1] else weight.shape[1])


class Head(torch.autograd.Function):
    """The memory of TRL's log-probabilities, (tokens,), from `hidden`, (tokens, hidden size), and the head's weight
    (trl/kernels/chunked_logprob.py): tiles of logits, made again in the backward pass."""

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

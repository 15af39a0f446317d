"""What a step holds at its highest: the model's own code and autograd, run on tensors that have shapes and no data.

Nothing is computed and no weight is read. A tracker sees every tensor that comes and goes, so that activations, caches
and logits follow from the architecture itself, whatever it is. Three layers are run and the middle one is repeated;
where layers differ, all are run. The batch that is run is a large prime: what it divides grows with the batch, as no
other dimension is a multiple of it, and so one run tells of every batch. What a kernel takes for itself while it runs
is unseen; where CUDA's kernels hold other tensors than a CPU's (attention, bitsandbytes, TRL's head), stand-ins hold
what they hold.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import json
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from perlcli.errors import PerlError
from perlcli.model import roles

Kind = Literal["sft", "reward", "rl", "value", "prefill", "decode"]
LEARNING = ("sft", "reward", "rl", "value")
ACTIVATIONS, LOGITS, GRADIENTS, CACHE = TAGS = ("activations", "logits", "gradients", "cache")
TILE_TOKENS, TILE_WIDTH = 4096, 32768  # of TRL's fused head, which never holds all logits (trl/kernels)
CPU_TILE = {"forward": 12, "backward": 29}  # bytes an element beside the tile, where torch folds it and not Triton
RUN_LAYERS = 3
ROWS = 1_048_573  # of the batch that is run: a prime, small enough that no count of bytes overflows


@dataclass(frozen=True)
class Step:
    """What is run: a training step of a stage or of the value model, or the forward pass of sampling."""

    kind: Kind
    length: int  # tokens a row; decode: those in the cache
    completion: int = 0  # rl: tokens whose log-probabilities are taken, or whose returns are predicted
    dtype: str = "float32"  # of the weights; of a quantised base, what it computes in
    autocast: str = ""  # the dtype of mixed precision, where it is on
    bits: int = 0  # 4 or 8 where the base is quantised
    rank: int = 0  # of the adapter; 0: every parameter trains
    targets: tuple[str, ...] | str = ()
    dora: bool = False
    checkpointing: bool = False
    accumulated: bool = False  # gradients of an earlier pass lie there already
    cuda: bool = False


class Live(TorchDispatchMode):
    """Follows the bytes of tensors that are made while it is on, fake or real; views of one storage count once."""

    def __init__(self) -> None:
        super().__init__()
        self.tag = ACTIVATIONS
        self.events: list[tuple[str, int, int]] = []  # tag, change in bytes, event that made the tensor
        self.seen: dict[int, tuple[Any, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for item in tree_leaves(found):
            if isinstance(item, torch.Tensor):
                self.add(item)
        return found

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor until its storage is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return

        def gone(_: Any) -> None:
            _, tag, birth = self.seen.pop(key)
            self.events.append((tag, -size, birth))

        here = len(self.events)
        self.seen[key] = (weakref.ref(storage, gone), self.tag, here)
        self.events.append((self.tag, size, here))

    def retag(self, tensor: torch.Tensor, tag: str) -> None:
        """Count a tensor that lives already under another name."""
        storage = tensor.untyped_storage()
        if id(storage) in self.seen:
            reference, before, birth = self.seen[id(storage)]
            self.seen[id(storage)] = (reference, tag, birth)
            self.events += [(before, -storage.nbytes(), birth), (tag, storage.nbytes(), birth)]

    def ignore(self, tensors: Any) -> None:
        """Leave out tensors that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.seen.setdefault(id(storage), (storage, "", -1))

    def series(self) -> torch.Tensor:
        """The change of each tag's bytes at each event, (events, 2, tags): those of any batch, and those of a row."""
        changes = [
            [[0 if tag != other else part for other in TAGS] for part in split(size)] for tag, size, _ in self.events
        ]
        return torch.tensor(changes, dtype=torch.int64).reshape(-1, 2, len(TAGS))

    def peak(self) -> int:
        """The most bytes that lived at once."""
        return max(itertools.accumulate((size for _, size, _ in self.events), initial=0))


def split(size: int) -> tuple[int, int]:
    """The bytes of a tensor of the run that every batch takes, and those that each row adds."""
    return (0, size // ROWS) if size % ROWS == 0 else (size, 0)


@dataclass(frozen=True)
class Traced:
    """What a step holds over time beside its weights, for a batch of any size."""

    fixed: torch.Tensor  # (events, tags) bytes that no row adds to
    a_row: torch.Tensor  # bytes that each row of the batch adds
    tile_rows: float  # rows of the batch that fill a tile of logits: beyond them it grows no more

    def at_peak(self, batch: int) -> dict[str, int]:
        """The bytes of each tag at the moment when most is held."""
        rows = torch.full((len(TAGS),), float(batch), dtype=torch.float64)
        rows[TAGS.index(LOGITS)] = min(float(batch), self.tile_rows)
        held = self.fixed + self.a_row * rows
        where = int(held.sum(1).argmax())
        return {tag: max(0, round(float(size))) for tag, size in zip(TAGS, held[where], strict=True)}


def trace(config: Any, step: Step, *, trust_remote_code: bool = False) -> Traced:
    """What this step holds, for the model of this config; raises PerlError where its code can't run without data."""
    if step.kind == "sft" and not step.cuda and not step.autocast and not has_dropout(config):
        step = replace(step, kind="rl")  # a CPU's head takes every token there too: one run for both
    if step.kind == "rl" and not step.cuda:
        step = replace(step, completion=0)
    return _trace(_Config(_key_of(config), config, trust_remote_code), step)


def has_dropout(config: Any) -> bool:
    """Whether any chance in the config says that training drops something out."""
    chances = {name: value for name, value in config.to_dict().items() if "drop" in name and value}
    return any(isinstance(value, int | float) for value in chances.values())


def _key_of(config: Any) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


class _Config:
    """A config that can be a key."""

    def __init__(self, key: str, config: Any, trust_remote_code: bool) -> None:
        self.key, self.config, self.trust_remote_code = key, config, trust_remote_code

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.key == other.key


@functools.lru_cache(maxsize=256)
def _trace(given: _Config, step: Step) -> Traced:
    config = shortened_once(given.config)
    try:
        held = _run(given, config, step).cumsum(0)
    except PerlError:
        raise
    except Exception as error:  # modelling code can ask for what only data can tell
        kind = type(error).__name__
        raise PerlError(
            f"The memory of {given.config.model_type} can't be predicted: its code doesn't run without data ({kind})",
            "a step of a real run tells its peak: perl reward … --max-steps 2",
        ) from error
    tokens = step.completion if step.kind == "rl" and step.cuda else max(1, step.length - 1)
    return Traced(held[:, 0].double(), held[:, 1].double(), TILE_TOKENS / tokens)


def shortened_once(config: Any) -> Any:
    """The config as `shortened` gives it, found once for each."""
    return _shortened(_Config(_key_of(config), config, False))


@functools.cache
def _shortened(given: _Config) -> Any:
    return shortened(given.config)


def shortened(config: Any) -> Any:
    """The config with three layers, where all layers are alike; else the same."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    if text is not config or len(kinds) > 1 or text.num_hidden_layers <= RUN_LAYERS or _layers_differ(config):
        return config
    short = copy.deepcopy(config)
    short.num_hidden_layers = RUN_LAYERS
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:RUN_LAYERS]
    return short


def _layers_differ(config: Any) -> bool:
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in layers_of(model)]
    return any(shape != shapes[0] for shape in shapes)


def has_experts(model: nn.Module) -> bool:
    """Whether tokens are sent to experts by what they are, so that memory depends on data."""
    return any("experts" in name.split(".") for name, _ in model.named_modules())


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers, in order."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    wanted = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
    return next((list(found) for found in lists if len(found) == wanted), [])


def skeleton(config: Any, step: Step, *, trust_remote_code: bool = False) -> Any:
    """The model of this step with its adapter on the meta device, each weight in its dtype and with its gradient."""
    kind = AutoModelForSequenceClassification if step.kind == "reward" else AutoModelForCausalLM
    config = copy.deepcopy(config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = 0
    dtype = getattr(torch, step.dtype)
    with torch.device("meta"), no_init_weights():
        model: Any = kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()  # initialising would
        model.requires_grad_(step.rank == 0)
        if step.rank == 0:
            return model
        lora = LoraConfig(
            r=step.rank, lora_alpha=step.rank, use_dora=step.dora,
            target_modules=step.targets if isinstance(step.targets, str) else list(step.targets),
            task_type=TaskType.SEQ_CLS if step.kind == "reward" else TaskType.CAUSAL_LM,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        )  # fmt: skip
        return roles.as_float32(get_peft_model(model, lora))


def _run(given: _Config, config: Any, step: Step) -> torch.Tensor:
    """The changes of each tag over a step of the whole depth, (events, 2, tags)."""
    model = skeleton(config, step, trust_remote_code=given.trust_remote_code)
    live = Live()
    marks = _Marks(live)
    with FakeTensorMode():
        _fill(model)
        inner = model.get_base_model() if step.rank else model
        quantised = _quantised(inner) if step.bits else set()
        _set_up(model, inner, step, quantised)
        cache = _cache(inner, step, ROWS) if step.kind == "decode" else None
        marks.watch(layers_of(inner))
        live.ignore([*model.parameters(), *model.buffers()])
        if cache is not None:
            live.tag = CACHE
            for tensor in tensors_of(cache):
                live.add(tensor)
            live.tag = ACTIVATIONS
        with _undisturbed(), _Kernels(step, quantised), live, _learning(model, step, live):
            with _autocast(step):
                loss = _forward(model, inner, step, live, cache)
                before = len(live.events)
            # autocast frees in any order
            live.events[before:] = sorted(live.events[before:], key=lambda event: event[2])
            if loss is not None:
                loss.backward()
    return marks.repeated(int(given.config.get_text_config().num_hidden_layers), len(layers_of(inner)))


def _set_up(model: Any, inner: Any, step: Step, quantised: set[int]) -> None:
    """The model as it is when the step begins: in training, with checkpointing and earlier gradients where asked."""
    model.train()
    for module in model.modules() if step.kind != "sft" else ():  # TRL's reward and RL trainers turn it off
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if step.checkpointing and step.kind in LEARNING:
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _Kernels(step, quantised))}
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        inner.enable_input_require_grads()
    if step.accumulated:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without Python's collector, whose moments would stand among the events by chance, and torch's log of faults."""
    was_on, log = gc.isenabled(), logging.getLogger(FakeTensorMode.__module__)
    level = log.level
    gc.disable()
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        if was_on:
            gc.enable()


def _fill(model: nn.Module) -> None:
    """Put tensors of the CPU without data in the place of the meta device's: autocast looks at the device."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                if tensor is not None:
                    store[name] = made[id(tensor)]


def _quantised(model: Any) -> set[int]:
    """The ids of the weights that bitsandbytes quantises: those of linear modules but the output head."""
    head = model.get_output_embeddings()
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    found = [m for n, m in named if "lora_" not in n and not n.startswith("score")]
    return {id(module.weight) for module in found}


def _autocast(step: Step) -> Any:
    if not step.autocast:
        return nullcontext()
    dtype = getattr(torch, step.autocast)
    return torch.autocast("cpu", dtype if dtype != torch.float16 else torch.bfloat16)


@contextmanager
def _learning(model: Any, step: Step, live: Live) -> Iterator[None]:
    """Gradients under their own tag; adapters that don't convert their input where `perl rl` has them not to."""

    def keep(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            live.retag(parameter.grad, GRADIENTS)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(keep)
    with roles.casting(model, on=not (step.kind == "rl" and step.autocast)):
        yield


def _forward(model: Any, inner: Any, step: Step, live: Live, cache: Any) -> Any:
    """Run the step's forward pass; gives the loss of a training step."""
    ids = torch.ones(ROWS, 1 if step.kind == "decode" else step.length, dtype=torch.long)
    mask = torch.ones(ROWS, step.length, dtype=torch.long)
    if step.kind in ("prefill", "decode"):
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, use_cache=True, past_key_values=cache, logits_to_keep=1)
            for tensor in tensors_of(out.past_key_values):
                live.retag(tensor, CACHE)
            live.tag = LOGITS
            scores = out.logits[:, -1].to(torch.float32, copy=True)
            nn.functional.softmax(scores / 0.7, dim=-1).multinomial(1)
        return None
    if step.kind == "reward":
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)
        return nn.functional.logsigmoid(logits).mean()  # chosen and rejected lie in one batch
    hidden = inner.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    if step.kind == "value":
        with torch.autocast("cpu", enabled=False):
            head = nn.Parameter(torch.empty(1, hidden.size(-1)))
            return nn.functional.linear(hidden[:, -step.completion :].float(), head).square().mean()
    rows = hidden[:, -step.completion :] if step.kind == "rl" and step.cuda else hidden
    head = inner.get_output_embeddings()
    found: Any = _Head.apply(rows.reshape(-1, rows.size(-1)), head.weight, step, live)
    return found.sum()


def _cache(inner: Any, step: Step, batch: int) -> Any:
    """The keys and values of all tokens but the last."""
    ids = torch.ones(batch, step.length - 1, dtype=torch.long)
    with torch.no_grad(), _autocast(step):
        return inner(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def tensors_of(cache: Any) -> list[torch.Tensor]:
    """Every key and value, and other states, of a cache of transformers."""
    held = [value for layer in getattr(cache, "layers", [cache]) for value in vars(layer).values()]
    return [item for item in tree_leaves(held) if isinstance(item, torch.Tensor)]


class _Marks:
    """Where each layer begins, forward and backward, among the events."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.end = 0  # of the last layer's forward pass

    def watch(self, layers: list[nn.Module]) -> None:
        """Mark each first pass through a layer, and the arrival of its output's gradient."""
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(functools.partial(self._before, index))
            layer.register_forward_hook(functools.partial(self._after, index == len(layers) - 1))

    def _before(self, index: int, *_: Any) -> None:
        if len(self.forward) == index:  # else it is computed again, for its backward pass
            self.forward.append(len(self.live.events))

    def _after(self, is_last: bool, module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if is_last and not self.end:
            self.end = len(self.live.events)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.backward.append(len(self.live.events)))

    def repeated(self, layers: int, ran: int) -> torch.Tensor:
        """The changes with the middle layer's part as often as the model has such layers, (events, 2, tags)."""
        series, more = self.live.series(), layers - ran
        if not more or ran < RUN_LAYERS:
            return series
        begin, end = self.forward[1], self.forward[2]
        back = sorted(set(self.backward))
        # What every layer leaves until the forward pass is over (autocast's copies of weights) goes for each layer; not
        # what the next layer alone still reads.
        after = range(self.end, back[0] if back else len(series))
        freed = [(place, *self.live.events[place]) for place in after if self.live.events[place][2] != place]
        of_first = {(tag, size) for _, tag, size, birth in freed if self.forward[0] <= birth < begin}
        for place, tag, size, birth in freed:
            if begin <= birth < end and (tag, size) in of_first:
                series[place] *= 1 + more
        middle = series[begin:end].repeat(more, 1, 1)
        if len(back) < RUN_LAYERS:
            return torch.cat([self._before_all(series[:begin], more), series[begin:end], middle, series[end:]])
        first, last = back[-2:]
        again = series[first:last].repeat(more, 1, 1)
        return torch.cat([series[:end], middle, series[end:last], again, series[last:]])

    def _before_all(self, series: torch.Tensor, more: int) -> torch.Tensor:
        """What was there at the start, of a cache for each layer."""
        kept = series.clone()
        start, cache = self.forward[0], TAGS.index(CACHE)
        kept[start - 1 : start, :, cache] += kept[:start, :, cache].sum(0) * more // RUN_LAYERS
        return kept


class _Kernels(TorchFunctionMode):
    """Stand-ins that hold what other kernels hold than a CPU's, and compute nothing."""

    def __init__(self, step: Step, quantised: set[int]) -> None:
        super().__init__()
        self.step, self.quantised = step, quantised

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def _lowered(tensors: Any, step: Step) -> list[torch.Tensor]:
    dtype = getattr(torch, step.autocast) if step.autocast else None
    return [tensor if dtype is None else tensor.to(dtype) for tensor in tensors]


class _Attention(torch.autograd.Function):
    """The memory of CUDA's fused attention: no scores of all pairs, but the mask of a padded batch as a bias."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        out = torch.empty_like(query)
        bias = None if mask is None else torch.empty(mask.shape, dtype=query.dtype)
        ctx.save_for_backward(query, key, value, out, bias, torch.empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


class _Quantised(torch.autograd.Function):
    """The memory of a bitsandbytes product: weights unpacked for the moment; 8 bits keep the input until backward."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bits: int) -> Any:
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
    def backward(ctx: Any, gradient: Any) -> Any:
        unpacked = torch.empty(ctx.weight.shape, dtype=ctx.weight.dtype)
        found = torch.empty(ctx.shape, dtype=ctx.dtype)
        del unpacked
        return found, None, None


def _width(x: Any, weight: Any) -> int:
    """The output's width: of a linear module (out, in), of a Conv1D (in, out)."""
    return int(weight.shape[0] if weight.shape[1] == x.shape[-1] else weight.shape[1])


class _Head(torch.autograd.Function):
    """The memory of TRL's fused head (trl/kernels/chunked_logprob.py): tiles of logits, made again going backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, step: Step, live: Live) -> Any:
        dtype = getattr(torch, step.autocast or step.dtype)
        ctx.save_for_backward(hidden, weight)
        ctx.step, ctx.live, ctx.dtype = step, live, dtype
        held = [*_tile(ctx, hidden, weight, "forward"), torch.empty(len(hidden), 7, dtype=torch.float32)]
        found = torch.empty(len(hidden), dtype=torch.float32)
        del held
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        hidden, weight = ctx.saved_tensors
        to_hidden = torch.empty(hidden.shape, dtype=torch.float32)
        to_weight = torch.empty(weight.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        held = _tile(ctx, hidden, weight, "backward")
        del held
        return to_hidden.to(hidden.dtype), to_weight.to(weight.dtype) if to_weight is not None else None, None, None


def _tile(ctx: Any, hidden: Any, weight: Any, way: str) -> list[torch.Tensor]:
    """What a tile of logits takes while it is folded; its rows are cut to TILE_TOKENS when a batch is asked for."""
    width = min(TILE_WIDTH, weight.size(0))
    held = [weight[:width].to(ctx.dtype)]
    ctx.live.tag = LOGITS
    extra = 0 if ctx.step.cuda else CPU_TILE[way]
    held += [
        torch.empty(len(hidden), TILE_WIDTH, dtype=ctx.dtype),
        torch.empty(len(hidden), width * extra, dtype=torch.int8),
    ]
    held.append(hidden.to(ctx.dtype))
    ctx.live.tag = ACTIVATIONS
    return held

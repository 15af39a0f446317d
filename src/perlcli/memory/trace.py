"""What a step holds at its peak: the model's own code and autograd, run on tensors that have shapes but no data.

Nothing is computed and no weight is read. A tracker follows every tensor, so that activations, caches and logits follow
from the architecture itself, whatever it is. Three layers are run and the middle one is repeated; if layers differ, all
are run. One run serves every batch (tracking.ROWS says why). What a kernel allocates for itself while it runs is not
seen; if CUDA's kernels hold other tensors than a CPU's (attention, bitsandbytes, TRL's head), stand-ins hold the same.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from perlcli.errors import PerlError
from perlcli.memory import skeletons, tracking
from perlcli.memory.skeletons import LEARNING, RUN_LAYERS, HashedConfig, Step
from perlcli.memory.tracking import ACTIVATIONS, CACHE, GRADIENTS, LOGITS, TAGS, Kernels, Live
from perlcli.model import dropout, roles
from perlcli.model.shared_prompts import can_share

CACHES = ("past_key_values", "cache_params")  # as models of attention and of state spaces call what they keep
Named = tuple[str, Cache]
SHORT_RUN = "a short real run reports its peak: perl reward … --max-steps 2"


@dataclass(frozen=True)
class Traced:
    """What a step holds over time in addition to its weights, for a batch of any size."""

    fixed: torch.Tensor  # (events, tags) bytes that no row adds to
    a_row: torch.Tensor  # (events, tags) bytes that each row of the batch adds, or each group of rows
    tile_rows: float  # rows of the batch that fill a tile of logits, which doesn't grow beyond them
    group: int = 1

    def at_peak(self, batch: int) -> dict[str, int]:
        """The bytes of each tag at the moment when the most is held."""
        units = float(math.ceil(batch / self.group))
        rows = torch.full((len(TAGS),), units, dtype=torch.float64)
        rows[TAGS.index(LOGITS)] = min(units, self.tile_rows)
        held = self.fixed + self.a_row * rows
        where = int(held.sum(1).argmax())
        return {tag: max(0, round(float(size))) for tag, size in zip(TAGS, held[where], strict=True)}


def trace(config: PreTrainedConfig, step: Step, *, trust_remote_code: bool = False) -> Traced:
    """What this step holds, for the model of this config. Raises PerlError if its code can't run without data."""
    return _trace(HashedConfig(config, trust_remote_code=trust_remote_code), step)


def shares(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> bool:
    """Whether completions can share what the model's cache holds of their prompt."""
    return _shares(HashedConfig(config, trust_remote_code=trust_remote_code))


@functools.lru_cache(maxsize=64)
def _shares(hashed: HashedConfig) -> bool:
    step = Step("rl", 4)
    try:
        model = skeletons.bare(hashed.config, step, trust_remote_code=hashed.trust_remote_code)
        with FakeTensorMode(), torch.no_grad():
            _fill(model)
            ids = torch.ones(1, 4, dtype=torch.long)
            kept = _body(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        return can_share(kept.get("past_key_values"))
    except Exception:  # modelling code; what it can't do without data is said by `trace`
        return False


@functools.lru_cache(maxsize=256)
def _trace(hashed: HashedConfig, step: Step) -> Traced:
    try:
        held = _run(hashed, step).cumsum(0)
    except Exception as error:  # modelling code can ask for what only data can answer
        problem = f"The memory of {hashed.config.model_type} can't be predicted: its code doesn't run without data"
        raise PerlError(f"{problem} ({type(error).__name__})", SHORT_RUN) from error
    tokens = step.completion if step.kind == "rl" else max(1, step.length - 1)
    return Traced(held[:, 0].double(), held[:, 1].double(), tracking.TILE_TOKENS / (tokens * step.group), step.group)


def _run(hashed: HashedConfig, step: Step) -> torch.Tensor:
    """The changes of each tag over a step of the model in its full depth, (events, 2, tags)."""
    # where completions share a prompt, each layer runs twice, and all layers are run
    short = hashed.config if step.group > 1 else skeletons.shortened(hashed.config)
    inner = skeletons.bare(short, step, trust_remote_code=hashed.trust_remote_code)
    model = skeletons.with_adapter(inner, step)
    live = Live()
    marks = _Marks(live)
    with FakeTensorMode():
        _fill(model)
        quantised = _quantised(inner) if step.bits else set()
        _set_up(model, inner, step, quantised)
        cache = _cache(inner, step) if step.kind == "decode" else None
        marks.watch(skeletons.layers_of(inner))
        live.ignore([*model.parameters(), *model.buffers()])
        if cache is not None:
            live.tag = CACHE
            for tensor in tensors_of(cache[1]):
                live.add(tensor)
            live.tag = ACTIVATIONS
        with _undisturbed(), Kernels(step, quantised), live, _learning(model, step, live):
            with _autocast(step):
                loss = _forward(model, inner, step, live, cache)
                before = len(live.events)
            # autocast frees in any order
            live.events[before:] = sorted(live.events[before:], key=lambda event: event[2])
            if loss is not None:
                loss.backward()
    layers = int(hashed.config.get_text_config().num_hidden_layers)
    return marks.repeated(layers, len(skeletons.layers_of(inner)))


def _set_up(model: nn.Module, inner: PreTrainedModel, step: Step, quantised: set[int]) -> None:
    """Put the model in the state in which the step starts: training mode, checkpointing, earlier gradients."""
    model.train()
    if step.kind != "sft":  # `perl reward` and `perl rl` turn dropout off
        dropout.turn_off(model)
    if step.checkpointing and step.kind in LEARNING:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": step.reentrant})
        inner.enable_input_require_grads()
        for module in inner.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                again: Any = functools.partial(_checkpoint, step, quantised)
                module._gradient_checkpointing_func = again
    if step.accumulated:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None


def _checkpoint(step: Step, quantised: set[int], function: Callable[..., object], *args: object) -> object:
    """Run a layer as `torch.utils.checkpoint` does, with Kernels also when it runs again: `backward` turns them off."""

    def under_kernels(*inputs: object) -> object:
        with Kernels(step, quantised):
            return function(*inputs)

    return checkpoint(under_kernels, *args, use_reentrant=step.reentrant)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Turns off Python's garbage collector, which would add events at random moments, and torch's log of faults."""
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
    """Replace the meta device's tensors by the CPU's, without data: autocast looks at the device."""
    made: dict[int, torch.Tensor] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_empty_like(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]  # a parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), _empty_like(buffer))


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _quantised(model: PreTrainedModel) -> set[int]:
    """The ids of the weights that bitsandbytes quantises: those of linear modules except the output head."""
    head = model.get_output_embeddings()
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if skeletons.is_quantisable(module)
        and module is not head
        and "lora_" not in name
        and not name.startswith("score")
    }


def _autocast(step: Step) -> AbstractContextManager[object]:
    """Mixed precision as the step has it; a CPU's autocast has no float16, and bfloat16 takes as much."""
    if step.computes_in is None:
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16 if step.computes_in == torch.float16 else step.computes_in)


@contextmanager
def _learning(model: nn.Module, step: Step, live: Live) -> Iterator[None]:
    """Gradients under their own tag; in training under autocast, adapters don't convert their input."""

    def keep(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            live.retag(parameter.grad, GRADIENTS)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(keep)
    with roles.casting(model, on=not (step.kind in LEARNING and step.autocast)):
        yield


def _forward(
    model: nn.Module, inner: PreTrainedModel, step: Step, live: Live, cache: Named | None
) -> torch.Tensor | None:
    """Run the step's forward pass; gives the loss of a training step, None for sampling."""
    if step.kind in ("prefill", "decode"):
        _sample(model, step, live, cache)
        return None
    ids = torch.ones(tracking.ROWS, step.length, dtype=torch.long)
    mask = torch.ones_like(ids)
    if step.kind == "reward":
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)
        return nn.functional.logsigmoid(logits).mean()  # chosen and rejected are in one batch
    if step.group > 1:
        rows = _of_shared(_body(inner), step)
        return _scored(rows, inner, step, live)
    hidden = _body(inner)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    if step.kind == "value":
        with torch.autocast("cpu", enabled=False):
            value_head = nn.Parameter(torch.empty(1, hidden.size(-1)))
            return nn.functional.linear(hidden[:, -step.completion :].float(), value_head).square().mean()
    return _scored(hidden[:, -step.completion :] if step.kind == "rl" else hidden, inner, step, live)


def _of_shared(body: Any, step: Step) -> torch.Tensor:
    """The states that completions are scored by, where each prompt is read once for `step.group` of them."""
    ids = torch.ones(tracking.ROWS, step.length - step.completion, dtype=torch.long)
    start = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    for layer in start.past_key_values.layers:
        layer.keys = layer.keys.repeat_interleave(step.group, 0)
        layer.values = layer.values.repeat_interleave(step.group, 0)
    ids = torch.ones(tracking.ROWS * step.group, step.completion, dtype=torch.long)
    mask = torch.ones(tracking.ROWS * step.group, step.length, dtype=torch.long)
    rest = body(input_ids=ids, attention_mask=mask, past_key_values=start.past_key_values, use_cache=True)
    last = start.last_hidden_state[:, -1:].repeat_interleave(step.group, 0)
    return torch.cat([last, rest.last_hidden_state[:, :-1]], dim=1)


def _scored(hidden: torch.Tensor, inner: PreTrainedModel, step: Step, live: Live) -> torch.Tensor:
    head: Any = inner.get_output_embeddings()
    return tracking.Head.apply(hidden.reshape(-1, hidden.size(-1)), head.weight, step, live).sum()


def _body(inner: PreTrainedModel) -> Any:
    """The model without its output head, and without the towers of a multimodal one."""
    found = next((body for body in (inner.get_decoder(), inner.base_model) if body is not inner), None)
    embeddings = inner.get_input_embeddings()
    return found or next(part for part in inner.children() if embeddings in part.modules())


def _sample(model: nn.Module, step: Step, live: Live, cache: Named | None) -> None:
    """Sample a token for every row: after reading the prompt, or with a full cache."""
    kept = {} if cache is None else {cache[0]: cache[1]}
    ids = torch.ones(tracking.ROWS, 1 if kept else step.length, dtype=torch.long)  # all again without a cache
    mask = torch.ones(tracking.ROWS, step.length, dtype=torch.long)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **kept)
        made = _kept(out)
        for tensor in tensors_of(made[1]) if made is not None else ():
            live.retag(tensor, CACHE)
        live.tag = LOGITS
        scores = out.logits[:, -1].to(torch.float32, copy=True)
        nn.functional.softmax(scores / 0.7, dim=-1).multinomial(1)


def _cache(inner: PreTrainedModel, step: Step) -> Named | None:
    """The keys and values of all tokens but the last, or other states."""
    ids = torch.ones(tracking.ROWS, step.length - 1, dtype=torch.long)
    with torch.no_grad(), _autocast(step), Kernels(step, set()):
        return _kept(inner(input_ids=ids, use_cache=True, logits_to_keep=1))


def _kept(out: Any) -> Named | None:
    """The cache that a forward pass returns, with its name; None if it keeps none."""
    return next(((name, out[name]) for name in CACHES if out.get(name) is not None), None)


def tensors_of(cache: Cache) -> list[torch.Tensor]:
    """Every key, value and other state of a cache of transformers."""
    held = [value for layer in getattr(cache, "layers", [cache]) for value in vars(layer).values()]
    return [item for item in tree_leaves(held) if isinstance(item, torch.Tensor)]


class _Marks:
    """Where each layer starts, forward and backward, among the events."""

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

    def _before(self, index: int, *_: object) -> None:
        if len(self.forward) == index:  # else it is computed again, for its backward pass
            self.forward.append(len(self.live.events))

    def _after(self, is_last: bool, module: nn.Module, inputs: object, output: Any) -> None:
        hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
        if is_last and not self.end:
            self.end = len(self.live.events)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.backward.append(len(self.live.events)))

    def repeated(self, layers: int, ran: int) -> torch.Tensor:
        """The changes with the middle layer's part as often as the model has such layers, (events, 2, tags). `layers`
        are the model's, `ran` those that were run."""
        series, more = self.live.series(), layers - ran
        if not more or ran < RUN_LAYERS:
            return series
        begin, end = self.forward[1], self.forward[2]
        back = sorted(set(self.backward))
        self._repeat_freed(series, back[0] if back else len(series), more)
        middle = series[begin:end].repeat(more, 1, 1)
        if len(back) < RUN_LAYERS:
            return torch.cat([self._before_all(series[:begin], more), series[begin:end], middle, series[end:]])
        first, last = back[-2:]
        again = series[first:last].repeat(more, 1, 1)
        return torch.cat([series[:end], middle, series[end:last], again, series[last:]])

    def _repeat_freed(self, series: torch.Tensor, turn: int, more: int) -> None:
        """Free for each layer what every layer keeps until the forward pass is over (autocast's copies of weights).
        What only the next layer still reads is freed once. `turn` is where the backward pass starts."""
        begin, end = self.forward[1], self.forward[2]
        freed = [
            (place, *self.live.events[place]) for place in range(self.end, turn) if self.live.events[place][2] != place
        ]
        of_first = {(tag, size) for _, tag, size, birth in freed if self.forward[0] <= birth < begin}
        for place, tag, size, birth in freed:
            if begin <= birth < end and (tag, size) in of_first:
                series[place] *= 1 + more

    def _before_all(self, series: torch.Tensor, more: int) -> torch.Tensor:
        """The series with what existed at the start, of a cache, for each layer."""
        kept = series.clone()
        start, cache = self.forward[0], TAGS.index(CACHE)
        kept[start - 1 : start, :, cache] += kept[:start, :, cache].sum(0) * more // RUN_LAYERS
        return kept

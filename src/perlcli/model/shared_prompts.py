"""Rows that start alike share the forward pass of their start: each prompt is computed once for all of its completions,
with gradients through the shared keys and values.

A decoder reads the different starts of a batch once, keeps their keys and values in transformers' own cache, repeats
these for the rows, and reads the rest of each row behind them. That costs P + G x R tokens in place of G x (P + R) for
a prompt of P tokens with G completions of R tokens. The results are those of separate rows up to rounding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from perlcli.errors import line
from perlcli.model import heads
from perlcli.model.prompt_splits import Part, Rest, Split, grouped, inverse, split_columns, split_groups

WORTH = 0.95  # a batch is shared if it then has at most this share of its tokens
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache that rows can share; others hold a running state
ASKED = ("output_hidden_states", "output_attentions")  # outputs of every token that a shared pass doesn't put together
TAKEN = ("input_ids", "attention_mask", "use_cache", "return_dict", "output_router_logits", *ASKED)
TAKEN_BY_PREFILL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "cache_position", "use_cache")
# What a decoder is tried with: two groups of two rows, whose last two tokens differ
TRIED = [[2, 3, 5, 7, 11, 13, 17, 19], [2, 3, 5, 7, 11, 13, 23, 29], [31, 37, 41, 43, 47, 2, 53, 3]]
TRIED.append([*TRIED[2][:6], 5, 7])
SMALL = 2**17  # values of a parameter whose gradient is tried: under full tuning all would take as much as the model
ROUNDING, COARSE = 1e-4, 0.05  # how far sharing may move states and gradients in the trial: float32, fewer bits


@dataclass
class Count:
    """How many tokens decoders were given, and how many they read since rows shared their starts."""

    given: int = 0
    read: int = 0

    @property
    def saved(self) -> int:
        """The tokens that were not read again."""
        return self.given - self.read

    def summary(self) -> dict[str, int]:
        """The counts for a run's record; empty if nothing was given."""
        return {"given": self.given, "read": self.read} if self.given else {}


@dataclass(frozen=True)
class Starts:
    """Where rows start alike: in their first `columns`, which may begin with padding; or as far as the rows of a group
    have the same tokens, in batches that are padded on the right; or everywhere, in the first pass of sampling."""

    columns: int | None = None
    groups: Sequence[int] = ()  # for each row, the number of its group
    is_prefill: bool = False


class Sharer:
    """Lets the rows of the batches that a model reads share their starts, and counts the tokens that this saves.

    Calls that would share nothing, that ask for more than the last hidden state, or that go on from a cache, go through
    as they are. So does everything if `why_not` says why the model can't share."""

    def __init__(self, model: nn.Module, *, is_on: bool = True) -> None:
        self.model, self.is_on = model, is_on
        self.count, self.why_not = Count(), ""
        self._was_tried = False

    def twin(self, model: nn.Module) -> Sharer:
        """The same for another model of the same kind, with one count for both."""
        made = Sharer(model, is_on=self.is_on)
        made.count, made.why_not, made._was_tried = self.count, self.why_not, True
        return made

    @property
    def shares(self) -> bool:
        """Whether rows share their starts."""
        return self.is_on and not self.why_not

    def columns(self, columns: int) -> AbstractContextManager[None]:
        """Inside, rows with the same tokens in the first `columns` share them."""
        return self._sharing(Starts(columns=columns))

    def groups(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """Inside, the rows of each group share what all of them start with; `numbers` has the group of each row."""
        return nullcontext() if len(set(numbers)) == len(numbers) else self._sharing(Starts(groups=numbers))

    def prefill(self) -> AbstractContextManager[None]:
        """Inside, sampling reads equal prompts once, before it writes their completions."""
        return self._sharing(Starts(is_prefill=True))

    @contextmanager
    def _sharing(self, starts: Starts) -> Iterator[None]:
        if not self._was_tried:
            self.try_out()
        if not self.shares:
            yield
            return
        with ExitStack() as stack:
            for decoder in decoders_of(self.model):
                stack.enter_context(self._replaced(decoder, starts))
            yield

    @contextmanager
    def _replaced(self, decoder: nn.Module, starts: Starts) -> Iterator[None]:
        own, forward = vars(decoder).get("forward"), decoder.forward
        names = list(inspect.signature(forward).parameters)

        def shared(*args: Any, **inputs: Any) -> Any:  # noqa: ANN401
            if self.why_not:
                return forward(*args, **inputs)
            return self._read(decoder, forward, starts, dict(zip(names, args, strict=False)) | inputs)

        decoder.forward = shared
        try:
            yield
        finally:
            if own is None:
                del decoder.forward
            else:
                decoder.forward = own

    def _read(self, decoder: nn.Module, forward: Any, starts: Starts, inputs: dict[str, Any]) -> Any:  # noqa: ANN401
        if starts.is_prefill:
            return self._prefill(forward, inputs)
        ids = inputs.get("input_ids")
        split = _split(decoder, starts, inputs)
        with _without_image_offsets(decoder):
            output = None if split is None else _in_parts(forward, split, inputs)
        if split is not None and output is None:
            self.why_not = f"{type(decoder).__name__} keeps a running state, not only keys and values"
        if ids is not None:
            self._add(ids.numel(), ids.numel() if output is None or split is None else split.tokens)
        return forward(**inputs) if output is None else output

    def _prefill(self, forward: Any, inputs: dict[str, Any]) -> Any:  # noqa: ANN401
        """The decoder's output for prompts of which some are equal: each is read once, then the cache is repeated."""
        groups = _equal_prompts(inputs)
        ids = inputs.get("input_ids")
        if groups is None or ids is None:
            return forward(**inputs)
        first = [group[0] for group in groups]
        rows = ("input_ids", "attention_mask", "position_ids")
        once = {name: value[first] if name in rows and value is not None else value for name, value in inputs.items()}
        output = forward(**once)
        order = [row for group in groups for row in group]
        again = torch.tensor([index for index, group in enumerate(groups) for _ in group], device=ids.device)
        again = again[inverse(order)]
        inputs["past_key_values"].batch_select_indices(again)
        output.last_hidden_state = output.last_hidden_state[again]
        self._add(ids.numel(), once["input_ids"].numel())
        return output

    def _add(self, given: int, read: int) -> None:
        self.count.given += given
        self.count.read += read

    def try_out(self) -> None:
        """Try sharing on a few tokens, also with gradients if the model trains; `why_not` then says if it can't share,
        because its cache holds more than keys and values, or its results differ by more than rounding."""
        self._was_tried = True
        if not self.is_on:
            return
        decoder = decoders_of(self.model)[-1]
        weight: Any = self.model.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.tensor(TRIED, device=weight.device) % len(weight)
        count, self.count = self.count, Count()
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()  # without dropout
        try:
            alone = _states_and_gradients(decoder, ids)
            with self.groups([0, 0, 1, 1]):
                shared = _states_and_gradients(decoder, ids)
                self.count = Count()
                with torch.no_grad():
                    _inner(self.model).base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            if not self.why_not and not self.count.given:  # Llama 4 with images
                self.why_not = f"{type(decoder).__name__} is given embeddings instead of tokens"
                return
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:  # of any model
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.why_not = f"{type(decoder).__name__} fails with a cache ({line(error)})"
            return
        finally:
            self.count = count
            for module, was_training in modes:
                module.training = was_training
        limit = ROUNDING if alone[0].dtype == torch.float32 else COARSE
        moved = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(shared, alone, strict=True))
        if not self.why_not and not moved <= limit:
            self.why_not = f"{type(decoder).__name__} gives other results with a cache (by {moved:.2g})"


def decoders_of(model: Any) -> list[nn.Module]:  # noqa: ANN401
    """Where a model reads tokens: its text decoder last, and before it what a multimodal model wraps around that."""
    base = _inner(model)
    decoder, outer = heads.decoder_of(base), base.base_model
    return [decoder] if outer is decoder or outer is base else [outer, decoder]


def _inner(model: Any) -> Any:  # noqa: ANN401
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _states_and_gradients(decoder: Any, ids: torch.Tensor) -> list[torch.Tensor]:  # noqa: ANN401
    """The last hidden states, and the gradients of a sum over them in one line if the decoder trains."""
    mask = torch.ones_like(ids)
    states = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    every = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    trained = [parameter for parameter in every if parameter.numel() <= SMALL] or every[:1]
    if not trained or not torch.is_grad_enabled():
        return [states.detach().float()]
    slope = torch.linspace(-1, 1, states.shape[-1], device=states.device)
    found = torch.autograd.grad((states.float() * slope).sin().sum(), trained, allow_unused=True)
    return [states.detach().float(), torch.cat([each.float().flatten() for each in found if each is not None])]


def _split(decoder: Any, starts: Starts, inputs: dict[str, Any]) -> Split | None:  # noqa: ANN401
    """The parts of a batch, if its rows can share their starts and that pays."""
    given = {name for name, value in inputs.items() if value is not None}
    if given - set(TAKEN) or "input_ids" not in given or any(inputs.get(name) for name in (*ASKED, "use_cache")):
        return None
    if torch.is_grad_enabled() and decoder.training and _is_checkpointing(decoder):
        return None  # transformers turns its cache off
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"] if "attention_mask" in given else torch.ones_like(ids)
    if mask.dim() != 2 or len(ids) < 2:
        return None
    if starts.columns is not None:
        split = split_columns(ids, mask, starts.columns)
    else:
        split = split_groups(ids, mask, starts.groups) if len(starts.groups) == len(ids) else None
    return split if split is not None and split.tokens <= WORTH * ids.numel() else None


@contextmanager
def _without_image_offsets(decoder: Any) -> Iterator[None]:  # noqa: ANN401
    """Inside, a multimodal decoder doesn't shift positions by the offsets that it computed for the last sampled batch.
    Qwen-VL and related models keep these between the steps of sampling, and add them to all reads with a cache."""
    kept = getattr(decoder, "rope_deltas", None)
    if kept is None:
        yield
        return
    decoder.rope_deltas = None
    try:
        yield
    finally:
        decoder.rope_deltas = kept


def _is_checkpointing(decoder: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def _in_parts(forward: Any, split: Split, inputs: dict[str, Any]) -> Any:  # noqa: ANN401
    """The decoder's output for a batch, from its parts; None if rows can't share what its cache holds."""
    same = {name: value for name, value in inputs.items() if name in ("return_dict", "output_router_logits")}
    outputs = []
    for part in split.parts:
        start = forward(input_ids=part.start, attention_mask=part.mask, use_cache=True, **same, **_positions(part))
        cache: Any = getattr(start, "past_key_values", None)
        if not can_share(cache):
            return None
        outputs.append(start)
        for rest in part.rests:
            kept = repeated(cache, rest.owners)
            read = {"input_ids": rest.ids, "attention_mask": rest.mask, "past_key_values": kept, **_positions(rest)}
            outputs.append(forward(**read, use_cache=True, **same))
    output = outputs[-1]
    output.past_key_values = None
    routed = [getattr(each, "router_logits", None) for each in outputs]
    output.last_hidden_state = _joined([each.last_hidden_state for each in outputs], split.places)
    if routed[0] is not None:
        layers = zip(*routed, strict=True)  # all have them, if the first has
        output.router_logits = tuple(_joined(layer, split.places).flatten(0, 1) for layer in layers)
    return output


def _positions(read: Part | Rest) -> dict[str, torch.Tensor]:
    return {} if read.positions is None else {"position_ids": read.positions}


def _joined(states: Sequence[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """The states of a batch's tokens, (batch, tokens, size), from those of all its parts, (…, size) each. An embedding
    sums the gradients of a state that several rows share in a fixed order; indexing doesn't, with several threads."""
    return nn.functional.embedding(places, torch.cat([part.reshape(-1, part.shape[-1]) for part in states]))


def _equal_prompts(inputs: dict[str, Any]) -> list[list[int]] | None:
    """The rows of the first pass of sampling, by equal prompts; None for another pass, or if none are equal."""
    given = {name: value for name, value in inputs.items() if value is not None}
    if not {"input_ids", "past_key_values"} <= given.keys():
        return None
    ids, cache = given["input_ids"], given["past_key_values"]
    mask = given.get("attention_mask", torch.ones_like(ids))
    if not can_share(cache) or cache.get_seq_length() or not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return None
    unknown = {name for name in given if name not in TAKEN_BY_PREFILL and isinstance(given[name], torch.Tensor)}
    if unknown or given.get("position_ids", ids).shape != ids.shape:
        return None
    groups = grouped([tuple(row) for row in torch.cat([ids * mask, mask], dim=1).tolist()])
    return groups if len(groups) < len(ids) else None


def can_share(cache: Any) -> bool:  # noqa: ANN401
    """Whether rows can share what a cache holds: keys and values of each token, without any running state."""
    return type(cache) is DynamicCache and all(type(layer) in PLAIN for layer in cache.layers)


def repeated(cache: DynamicCache, owners: Sequence[int]) -> DynamicCache:
    """A cache that has, for each of its rows, the one of these rows of another cache; with gradients: those of a row
    are the sum of its repetitions', in a fixed order, so that a run can be repeated to the bit."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    runs = [(owner, sum(1 for _ in run)) for owner, run in groupby(owners)]
    for layer in made.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name)
            if held is not None and held.numel():
                parts = [held[owner : owner + 1].expand(count, *held.shape[1:]) for owner, count in runs]
                setattr(layer, name, torch.cat(parts))
    return made

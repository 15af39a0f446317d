"""Reward models as scorers of token ids: an adapter and a head on the shared base, or a separate classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn

from perlcli.errors import PerlError
from perlcli.model import heads, weights
from perlcli.model.roles import REWARD, adapter_bytes, add_adapter, bytes_of, device_of, switched
from perlcli.model.shared_prompts import Sharer
from perlcli.model.target_modules import HEADS
from perlcli.model.tokenizers import batches_by_length, padded

Rows = Sequence[list[int]]
Groups = Sequence[int]  # for each row, a number that rows with the same prompt have in common


class Scorer(Protocol):
    """Scores rows of token ids, `size` at a time (None: all in one batch)."""

    def __call__(
        self,
        rows: Rows,
        size: int | None = None,
        done: Callable[[int], None] | None = None,
        groups: Groups | None = None,
    ) -> list[float]:
        """One score per row, in order; `done` is called with the number of rows scored so far. Rows of one group are
        scored together and share the forward pass of what they start with."""


def attach_reward(policy: PeftModel, folder: str, name: str = REWARD, label: int = 0) -> torch.Tensor:
    """Add a reward adapter to the policy's base, frozen; returns the head of one label, (1, hidden), in float32,
    rounded to the base's dtype as a plain load has it. Raises PerlError if the adapter doesn't fit the base, or has no
    head."""
    add_adapter(policy, folder, name)
    dtype = policy.dtype if policy.dtype.is_floating_point else torch.bfloat16
    return read_head(folder)[label : label + 1].to(device_of(policy), dtype).float()


def read_head(folder: str) -> torch.Tensor:
    """The weight of the head in a reward adapter's folder, (labels, hidden). Raises PerlError if it can't be read, or
    has no head: TRL's default task type saves none."""
    if weights.file_of(folder, weights.ADAPTER_WEIGHTS) is None:
        raise PerlError(f"The reward adapter {folder} can't be read: it has no {weights.ADAPTER_WEIGHTS}")
    try:
        head = heads.saved(folder)
    except PerlError as error:
        raise PerlError(f"The reward adapter {folder} can't be read: {error.problem}") from error
    if head is None:
        hint = "train it with `perl reward`, or with task_type=SEQ_CLS"
        raise PerlError(f"The adapter {folder} has no reward head", hint)
    return head


class SharedScorer:
    """Scores rows of token ids with a reward adapter on the policy's base. `head` is (1, hidden), `pad` fills a batch.
    No score is read at the token `unread`: the padding that the reward was trained with, if that was EOS."""

    def __init__(
        self, policy: PeftModel, head: torch.Tensor, pad: int, unread: int | None = None, adapter: str = REWARD
    ) -> None:
        self.policy, self.head, self.pad, self.unread, self.adapter = policy, head, pad, unread, adapter
        self.sharer = Sharer(policy)

    @property
    def bytes(self) -> int:
        """The memory that this reward adds to the base."""
        return adapter_bytes(self.policy, self.adapter) + self.head.numel() * self.head.element_size()

    @torch.no_grad()
    def __call__(
        self,
        rows: Rows,
        size: int | None = None,
        done: Callable[[int], None] | None = None,
        groups: Groups | None = None,
    ) -> list[float]:
        """One reward per row, float32; without groups, equal to those of the reward model on its own base for the same
        batches."""
        with switched(self.policy, self.adapter), torch.autocast(self.head.device.type, enabled=False):
            return in_batches(self._scores, rows, size, done, groups)

    def _scores(self, rows: Rows, groups: Groups) -> list[float]:
        ids, mask = padded(rows, self.pad, self.head.device)
        base: Any = self.policy.get_base_model()
        with self.sharer.groups(groups):
            hidden = heads.decoder_of(base)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        scores = nn.functional.linear(hidden.float(), self.head)
        return at_last(scores, mask if self.unread is None else mask * (ids != self.unread))


class ClassifierScorer:
    """Scores rows of token ids with one label of a sequence classifier, as plain transformers and peft would, but for
    the head's product: in bfloat16 it would round scores to three digits, so it is taken in float32."""

    def __init__(self, model: nn.Module, pad_token_id: int, label: int = 0) -> None:
        self.model, self.pad, self.label, self.sharer = model, pad_token_id, label, Sharer(model)

    @property
    def bytes(self) -> int:
        """The memory that this reward takes, its own base included."""
        return bytes_of(self.model.parameters())

    @torch.no_grad()
    def __call__(
        self,
        rows: Rows,
        size: int | None = None,
        done: Callable[[int], None] | None = None,
        groups: Groups | None = None,
    ) -> list[float]:
        """One reward per row, float32."""
        was_training = self.model.training
        self.model.eval()
        with _float32_head(self.model), torch.autocast(self._device.type, enabled=False):
            scores = in_batches(self._scores, rows, size, done, groups)
        self.model.train(was_training)
        return scores

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _scores(self, rows: Rows, groups: Groups) -> list[float]:
        ids, mask = padded(rows, self.pad, self._device)
        with self.sharer.groups(groups):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        scores: list[float] = logits[:, self.label].float().tolist()
        return scores


@contextmanager
def _float32_head(model: nn.Module) -> Iterator[None]:
    """Let the classifier's linear head multiply in float32, whatever its dtype; where the model reads the score stays
    its own business. A head of several layers, or another name than decoders have, computes as it is."""

    named = model.named_modules()
    linear = [(set(name.split(".")), module) for name, module in named if type(module) is nn.Linear]
    ours = [each for parts, each in linear if heads.SCORE in parts or (each.bias is None and parts & set(HEADS))]
    kept = [(parameter, parameter.data) for head in ours for parameter in head.parameters()]
    hooks = [head.register_forward_pre_hook(_from_float32) for head in ours]
    try:
        for parameter, data in kept:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
        for hook in hooks:
            hook.remove()


def _from_float32(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].float(), *inputs[1:])  # Mamba's hidden states are float32 on a base in bfloat16


def at_last(scores: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The score at each row's last unmasked token, from scores of shape (rows, tokens, 1) and a mask (rows, tokens)."""
    last = heads.last_of(mask)
    read: list[float] = scores[torch.arange(len(last)), last, 0].float().tolist()
    return read


def in_batches(
    score: Callable[[Rows, Groups], list[float]],
    rows: Rows,
    size: int | None,
    done: Callable[[int], None] | None = None,
    groups: Groups | None = None,
) -> list[float]:
    """Scores of many rows, in order, from batches of `size` rows of similar length; rows of one group are together.
    `score` gets the rows of a batch with their groups; without groups, each row has its own."""
    scores, count = [0.0] * len(rows), 0
    numbers = range(len(rows)) if groups is None else groups
    for part in batches_by_length(rows, size, groups):
        values = score([rows[index] for index in part], [numbers[index] for index in part])
        for index, value in zip(part, values, strict=True):
            scores[index] = value
        count += len(part)
        if done is not None:
            done(count)
    return scores

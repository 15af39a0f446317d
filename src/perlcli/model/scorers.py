"""Reward models as scorers of token ids: an adapter and a head on the shared base, or a separate classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn

from perlcli.errors import PerlError
from perlcli.model.roles import REWARD, adapter_bytes, add_adapter, bytes_of, device_of, switched
from perlcli.model.tokenizers import padded
from perlcli.model.weights import ADAPTER_WEIGHTS, file_of

Scorer = Callable[[Sequence[list[int]]], list[float]]  # scores rows of token ids
HEAD = "score.weight"


def attach_reward(policy: PeftModel, folder: str, name: str = REWARD) -> torch.Tensor:
    """Add a reward adapter to the policy's base, frozen; returns its head, (1, hidden), in the base's dtype. Raises
    PerlError if the adapter doesn't fit the base, or has no head."""
    add_adapter(policy, folder, name)
    dtype = policy.dtype if policy.dtype.is_floating_point else torch.bfloat16
    return read_head(folder).to(device_of(policy), dtype)


def read_head(folder: str) -> torch.Tensor:
    """The weight of the head in a reward adapter's folder, (1, hidden). Raises PerlError if it can't be read, or has no
    head: TRL's default task type saves none."""
    try:
        with safe_open(str(file_of(folder, ADAPTER_WEIGHTS)), framework="pt") as file:
            name = next((key for key in file.keys() if key.endswith(HEAD)), None)  # noqa: SIM118 (not a mapping)
            # Cloned: in the mapped file it may be unaligned, and CPU kernels then round differently.
            head = file.get_tensor(name).clone() if name else None
    except (OSError, RuntimeError, SafetensorError) as error:
        raise PerlError(f"The reward adapter {folder} can't be read: {error}") from error
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

    @property
    def bytes(self) -> int:
        """The memory that this reward adds to the base."""
        return adapter_bytes(self.policy, self.adapter) + self.head.numel() * self.head.element_size()

    @torch.no_grad()
    def __call__(self, rows: Sequence[list[int]]) -> list[float]:
        """One reward per row, float32; equal to those of the reward model on its own base for the same batch."""
        ids, mask = padded(rows, self.pad, self.head.device)
        backbone: Any = self.policy.get_base_model().base_model
        with switched(self.policy, self.adapter), torch.autocast(ids.device.type, enabled=False):
            hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            scores = nn.functional.linear(hidden, self.head.to(hidden.dtype))
        return at_last(scores, mask if self.unread is None else mask * (ids != self.unread))


class ClassifierScorer:
    """Scores rows of token ids with a sequence classifier, as plain transformers and peft would."""

    def __init__(self, model: nn.Module, pad_token_id: int) -> None:
        self.model, self.pad = model, pad_token_id

    @property
    def bytes(self) -> int:
        """The memory that this reward takes, its own base included."""
        return bytes_of(self.model.parameters())

    @torch.no_grad()
    def __call__(self, rows: Sequence[list[int]]) -> list[float]:
        """One reward per row, float32."""
        was_training = self.model.training
        self.model.eval()
        ids, mask = padded(rows, self.pad, next(self.model.parameters()).device)
        with torch.autocast(ids.device.type, enabled=False):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        self.model.train(was_training)
        return [float(score) for score in logits[:, 0].float().cpu()]


def at_last(scores: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The score at each row's last unmasked token, from scores of shape (rows, tokens, 1) and a mask (rows, tokens)."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
    return [float(score) for score in scores[torch.arange(len(last)), last, 0].float().cpu()]


def scores_in_batches(scorer: Scorer, rows: Sequence[list[int]], size: int) -> list[float]:
    """Scores of many rows, `size` at a time, in order."""
    return [score for start in range(0, len(rows), size) for score in scorer(rows[start : start + size])]

"""Reward models as scorers of token ids: an adapter and head on the shared base, or a classifier of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn

from perlcli.errors import PerlError
from perlcli.model.roles import POLICY, REWARD, adapter_bytes, add_adapter, bytes_of, device_of, is_of, switched
from perlcli.model.weights import ADAPTER_WEIGHTS

HEAD = "score.weight"


def attach_reward(policy: PeftModel, folder: str, name: str = REWARD) -> torch.Tensor:
    """Put a reward adapter on the policy's base, frozen; gives its head, of shape (1, hidden), in the base's dtype."""
    add_adapter(policy, folder, name)
    return read_head(folder).to(device_of(policy), policy.dtype if policy.dtype.is_floating_point else torch.bfloat16)


def read_head(folder: str) -> torch.Tensor:
    """The head's weight in an adapter folder; raises PerlError where it has none, as TRL's default task type saves."""
    path = Path(folder) / ADAPTER_WEIGHTS
    if not Path(folder).is_dir():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(folder, ADAPTER_WEIGHTS))
    try:
        with safe_open(str(path), framework="pt") as file:
            name = next((key for key in file.keys() if key.endswith(HEAD)), None)  # noqa: SIM118 (not a mapping)
            # cloned: in the mapped file it lies anywhere, and kernels for CPUs round otherwise where it isn't aligned
            head = file.get_tensor(name).clone() if name else None
    except (OSError, RuntimeError, SafetensorError) as error:
        raise PerlError(f"The reward adapter {folder} can't be read: {error}") from error
    if head is None:
        raise PerlError(f"The adapter {folder} has no reward head", "train it with `perl reward`, or task_type=SEQ_CLS")
    return head


class SharedScorer:
    """Scores rows of token ids with the reward adapter on the policy's own base.

    `unread` is a token that it never reads a score at: the padding of its training, where that was EOS.
    """

    def __init__(
        self, policy: PeftModel, head: torch.Tensor, pad: int, unread: int | None = None, adapter: str = REWARD
    ) -> None:
        self.policy, self.head, self.pad, self.unread, self.adapter = policy, head, pad, unread, adapter

    @property
    def bytes(self) -> int:
        """What this reward adds to the base."""
        return adapter_bytes(self.policy, self.adapter) + self.head.numel() * self.head.element_size()

    @torch.no_grad()
    def __call__(self, rows: Sequence[list[int]]) -> list[float]:
        """One reward a row, float32; equal to the stand-alone reward model's for the same batch."""
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
        """What this reward takes: its own base and all."""
        return bytes_of(self.model.parameters())

    @torch.no_grad()
    def __call__(self, rows: Sequence[list[int]]) -> list[float]:
        """One reward a row, float32."""
        was_training = self.model.training
        self.model.eval()
        ids, mask = padded(rows, self.pad, next(self.model.parameters()).device)
        with torch.autocast(ids.device.type, enabled=False):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        self.model.train(was_training)
        return [float(score) for score in logits[:, 0].float().cpu()]


def padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one tensor (rows, longest), padded on the right, and its mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def at_last(scores: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The score at each row's last token that the mask leaves, from scores of shape (rows, longest, 1)."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
    return [float(score) for score in scores[torch.arange(len(last)), last, 0].float().cpu()]


def round_head(model: PeftModel, dtype: torch.dtype) -> None:
    """Round the trained head to what a plain load of the base in `dtype` would keep of it, and hold it so.

    peft loads a head into a module of the base's dtype; rounding it before it is saved keeps scores the same for all.
    """
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and is_of(POLICY, name):
            parameter.data = parameter.data.to(dtype)


def scores_in_batches(scorer: Any, rows: Sequence[list[int]], size: int) -> list[float]:
    """Scores of many rows, `size` at a time, in order."""
    return [score for start in range(0, len(rows), size) for score in scorer(rows[start : start + size])]

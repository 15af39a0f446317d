"""The value model of REINFORCE: an adapter of its own on the policy's base and a scalar head, the paper's baseline."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from perlcli.errors import RunFailed
from perlcli.model import roles

HEAD_FILE = "value_head.safetensors"
Batch = dict[str, torch.Tensor]


class ValueModel:
    """Predicts, at every position of a completion, the return that is still to come (paper, section 2.3).

    The adapter has the policy's rank and modules and begins at nothing, as does the head. Both learn in float32.
    """

    def __init__(self, policy: PeftModel) -> None:
        self.policy = policy
        config = copy.deepcopy(policy.peft_config[roles.POLICY])
        config.inference_mode = False
        was_training = policy.training
        with torch.random.fork_rng():  # else its initialisation would shift the stream that samples completions
            policy.add_adapter(roles.VALUE, config)
        policy.train(was_training)
        policy.set_adapter(roles.POLICY)
        roles.as_float32(policy)
        roles.begin_at_base(policy, roles.VALUE)
        inner: Any = policy.get_base_model()
        width = inner.config.get_text_config().hidden_size
        self.head = nn.utils.skip_init(nn.Linear, width, 1, device=roles.device_of(policy), dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def bytes(self) -> int:
        """What the value model adds to the base."""
        return roles.adapter_bytes(self.policy, roles.VALUE) + roles.bytes_of(self.head.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """What the value model learns, in a fixed order."""
        adapter = [p for name, p in self.policy.named_parameters() if roles.is_of(roles.VALUE, name)]
        return [*adapter, *self.head.parameters()]

    def guess(self, start: float) -> None:
        """Begin at a first guess of the return: the head's bias."""
        nn.init.constant_(self.head.bias, start)

    def predict(self, batch: Batch, autocast: AbstractContextManager[Any]) -> torch.Tensor:
        """The predicted returns before each token of the completions, (rows, tokens), without gradients."""
        with torch.no_grad(), roles.switched(self.policy, roles.VALUE), autocast:
            return self._values(batch)

    def learn(self, batches: Sequence[Batch], autocast: Any, scale: float = 1.0) -> float:
        """Put the gradients of the squared error on the parameters; gives the mean squared error over the tokens.

        `scale` lifts the loss on the way back, so that float16 doesn't round its gradients to 0.
        """
        for parameter in self.parameters():
            parameter.grad = None
        total = 0.0
        for batch in batches:
            mask = batch["completion_mask"]
            with roles.switched(self.policy, roles.VALUE, train=True):
                with autocast():
                    values = self._values(batch)
                error = ((values - batch["returns"]).square() * mask).sum() / mask.sum().clamp(min=1)
                (0.5 * scale * error / len(batches)).backward()
            total += float(error.detach()) / len(batches)
        grads = [p.grad.div_(scale).norm() for p in self.parameters() if p.grad is not None]
        if not torch.isfinite(torch.stack(grads).sum()):
            raise RunFailed("The value model's gradient is not a finite number", "try a lower --value-learning-rate")
        return total

    def _values(self, batch: Batch) -> torch.Tensor:
        backbone: Any = self.policy.get_base_model().base_model
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        before = hidden[:, -batch["completion_ids"].size(1) - 1 : -1]  # the state in which each token was chosen
        with torch.autocast(ids.device.type, enabled=False):
            return self.head(before.float())[:, :, 0]

    def save_head(self, folder: Path) -> None:
        """Write the head beside the adapter, which peft writes."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.head.state_dict().items()}
        save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})

    def load_head(self, folder: Path) -> None:
        """Read the head back."""
        self.head.load_state_dict(load_file(folder / HEAD_FILE, device=str(roles.device_of(self.policy))))

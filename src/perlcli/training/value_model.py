"""The value model of REINFORCE, the paper's baseline: another adapter on the policy's base, with a scalar head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from perlcli import device
from perlcli.errors import RunFailed
from perlcli.model import heads, roles
from perlcli.model.shared_prompts import Sharer
from perlcli.model.weights import VALUE_HEAD

Autocast = AbstractContextManager[object]
Batch = dict[str, torch.Tensor]  # TRL's names: prompt_ids, prompt_mask, completion_ids, completion_mask


class ValueModel:
    """Predicts, at every position of a completion, the return that is still to come (paper, section 2.3). The adapter
    has the policy's rank and target modules. It and the head start by predicting 0 and are kept in float32."""

    def __init__(self, policy: PeftModel, learning_rate: float, sharer: Sharer) -> None:
        self.policy, self.learning_rate, self.sharer = policy, learning_rate, sharer
        config = copy.deepcopy(policy.peft_config[roles.POLICY])
        config.inference_mode = False
        was_training = policy.training
        with device.fork_rng():  # otherwise its initialisation would shift the stream that samples completions
            policy.add_adapter(roles.VALUE, config)
        policy.train(was_training)
        policy.set_adapter(roles.POLICY)
        roles.as_float32(policy)
        roles.begin_at_base(policy, roles.VALUE)
        base: Any = policy.get_base_model()
        width = base.config.get_text_config().hidden_size
        self.head = nn.utils.skip_init(nn.Linear, width, 1, device=roles.device_of(policy), dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def bytes(self) -> int:
        """The memory that the value model adds to the base."""
        return roles.adapter_bytes(self.policy, roles.VALUE) + roles.bytes_of(self.head.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """The value model's trainable parameters, in a fixed order."""
        adapter = [p for name, p in self.policy.named_parameters() if roles.is_of(roles.VALUE, name)]
        return [*adapter, *self.head.parameters()]

    def guess(self, start: float) -> None:
        """Start from a first guess of the return, as the head's bias."""
        nn.init.constant_(self.head.bias, start)

    def predict(self, batch: Batch, autocast: Autocast) -> torch.Tensor:
        """The predicted return before each completion token, (rows, completion tokens), without gradients."""
        with torch.no_grad(), roles.switched(self.policy, roles.VALUE), autocast:
            return self._values(batch)

    def learn(self, batches: Sequence[Batch], autocast: Callable[[], Autocast], scale: float = 1.0) -> float:
        """Put the gradient of half the squared error on the parameters and return the mean squared error per token.
        Each batch also has its `returns`, (rows, completion tokens). `scale` multiplies the loss during the backward
        pass, so that float16 doesn't round its gradients to 0. Raises RunFailed if a gradient is NaN or infinite."""
        for parameter in self.parameters():
            parameter.grad = None
        total = 0.0
        for batch in batches:
            mask = batch["completion_mask"]
            # backward inside the switch: gradient checkpointing recomputes with the adapter that is active then
            with roles.switched(self.policy, roles.VALUE, train=True):
                with autocast():
                    values = self._values(batch)
                error = ((values - batch["returns"]).square() * mask).sum() / mask.sum().clamp(min=1)
                (0.5 * scale * error / len(batches)).backward()
            total += float(error.detach()) / len(batches)
        norms = [p.grad.div_(scale).norm() for p in self.parameters() if p.grad is not None]
        if not torch.isfinite(torch.stack(norms).sum()):
            raise RunFailed("The value model's gradient is NaN or infinite", "try a lower --value-learning-rate")
        return total

    def _values(self, batch: Batch) -> torch.Tensor:
        base: Any = self.policy.get_base_model()
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with self.sharer.columns(batch["prompt_ids"].shape[1]):
            hidden = heads.decoder_of(base)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        before = hidden[:, -batch["completion_ids"].size(1) - 1 : -1]  # the state from which each token was sampled
        with torch.autocast(ids.device.type, enabled=False):
            return self.head(before.float())[:, :, 0]

    def save_head(self, folder: Path) -> None:
        """Write the head next to the adapter, which peft writes."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.head.state_dict().items()}
        save_file(tensors, folder / VALUE_HEAD, metadata={"format": "pt"})

    def load_head(self, folder: Path) -> None:
        """Read the head back from a folder."""
        self.head.load_state_dict(load_file(folder / VALUE_HEAD, device=str(roles.device_of(self.policy))))

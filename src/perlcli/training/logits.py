"""What log-probabilities are computed from: TRL's fused output layer, which is given completions only, or the model's
own logits, where a check shows that TRL's is wrong or fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from perlcli.errors import line
from perlcli.model.shared_prompts import decoders_of
from perlcli.run import out_of_memory
from perlcli.run.lifecycle import Run

IGNORED = -100
ROWS = [[2, 3, 5, 7, 11, 13, 17, 19], [23, 29, 31, 37, 41, 43, 47, 53]]
ROUNDING = 1e-4  # how far log-probs of the two may differ in float32, as a share of the largest logit


@dataclass
class Scores:
    """What TRL's trainers read from a model with its fused output layer; all but the last are (rows, tokens - 1), and
    0 where the label is -100."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    label_mask: torch.Tensor
    aux_loss: torch.Tensor | None


class OwnLogits:
    """A model as TRL's trainers call it, `model(..., labels=labels, fused_lm_head=True)`, which scores the labels by
    the model's own logits.

    TRL (1.16, `add_fused_lm_head`) multiplies the last hidden state by the output layer's weight, and looks up a few
    names for what a model does to its logits, and for how many experts it has. That fails for Llama 4's text model,
    whose `base_model` is the model itself, and for Phi-MoE and Granite-MoE, whose configs name experts otherwise; and
    it is silently wrong where logits are capped or scaled under another name (RecurrentGemma). A fault of the same kind
    is https://github.com/huggingface/trl/issues/5754 (GPT-OSS).
    Remove this, and `check`, when TRL takes such models; tests/training/test_logits.py fails without it until then.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        self.model, self.temperature = model, temperature

    def __call__(self, *, fused_lm_head: bool = False, **inputs: Any) -> Any:  # noqa: ANN401
        """The scores of the labels, or without `fused_lm_head` the model's own output."""
        if not fused_lm_head:
            return self.model(**inputs)
        labels = inputs.pop("labels")
        output = self.model(**inputs)
        labels = labels[:, 1:].to(output.logits.device)
        mask = labels != IGNORED
        logits = output.logits[:, :-1][mask].float() / self.temperature  # (labels that count, vocabulary)
        table, wanted = logits.log_softmax(dim=-1), labels[mask]
        chosen = table.gather(1, wanted.unsqueeze(1))[:, 0]
        with torch.no_grad():
            entropy = -(table.exp() * table).nan_to_num().sum(dim=-1)  # 0 x -inf: a token that can't be
            is_right = logits.argmax(dim=-1) == wanted
        log_probs, entropy, is_top1 = (
            x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (chosen, entropy, is_right)
        )
        return Scores(log_probs, entropy, is_top1, mask, getattr(output, "aux_loss", None))


class OnlyCompletions:
    """A model as TRL's trainers call it, whose fused output layer reads the last `width` tokens of each row only.

    Off the GPU, TRL (1.16, `add_fused_lm_head`) multiplies every position of a batch, those of prompts too, and takes
    out the completions' afterwards, since some devices compile a program for each number of positions. On a CPU that
    took half of the time of the log-probabilities, and most of their memory, with prompts of 256 tokens.
    Remove this when TRL leaves out the others there; tests/training/test_logits.py says so.
    """

    def __init__(self, model: Any, width: int) -> None:  # noqa: ANN401
        self.model, self.width = model, width

    def __call__(self, *, fused_lm_head: bool = False, **inputs: Any) -> Any:  # noqa: ANN401
        """The scores of the last tokens, (rows, `width`), or without `fused_lm_head` the model's own output."""
        if not fused_lm_head:
            return self.model(**inputs)
        labels = inputs.pop("labels")[:, -self.width :]
        handle = decoders_of(self.model)[0].register_forward_hook(self._cut)
        try:
            return self.model(**inputs, shift_labels=labels, fused_lm_head=True)
        finally:
            handle.remove()

    def _cut(self, _: nn.Module, inputs: object, output: Any) -> None:  # noqa: ANN401
        output.last_hidden_state = output.last_hidden_state[:, -self.width - 1 : -1]  # each predicts the next token


def wrapped(trainer: Any, model: Any, width: int | None = None) -> Any:  # noqa: ANN401
    """The model as the trainer should call it: as it is or, given the `width` of completions, for these only; or with
    its own logits if `check` found that it must be."""
    if trainer.own_logits:
        return OwnLogits(model, getattr(trainer, "temperature", 1.0))
    return model if width is None else OnlyCompletions(model, width)


@torch.no_grad()
def check(trainer: Trainer, run: Run) -> None:
    """Make the trainer use the model's own logits if TRL's fused output layer fails or gives other log-probs on a few
    tokens, with a note; and turn off a load-balancing loss that the model itself can't compute."""
    held: Any = trainer
    model = held.model
    was_training = model.training
    model.eval()
    ids = torch.tensor(ROWS, device=model.get_input_embeddings().weight.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if held.aux_loss_enabled:
        inputs["output_router_logits"] = True
    try:
        why = _fault(held, inputs, ids)
    finally:
        model.train(was_training)
    if why is None:
        return
    held.own_logits = True
    run.note(f"The loss is computed from all logits at once, which takes more memory: TRL's chunked loss {why}.")
    if held.aux_loss_enabled and OwnLogits(model)(**inputs, labels=ids, fused_lm_head=True).aux_loss is None:
        held.aux_loss_enabled = False
        run.note("The model gives no load-balancing loss: its experts are not balanced in training.")


def _fault(trainer: Any, inputs: dict[str, Any], labels: torch.Tensor) -> str | None:  # noqa: ANN401
    """What is wrong with the fused output layer on the trainer's model; None if nothing is."""
    model, temperature = trainer.model, getattr(trainer, "temperature", 1.0)
    try:
        fused = model(**inputs, labels=labels, fused_lm_head=True).log_probs
    except Exception as error:  # code of TRL and of any model
        if out_of_memory.is_cause(error):
            raise
        return f"fails on this model ({line(error)})"
    logits = model(**inputs).logits.float() / temperature
    own = logits[:, :-1].log_softmax(dim=-1).gather(2, labels[:, 1:].unsqueeze(2))[..., 0]
    moved = float((fused - own).abs().max())
    limit = max(ROUNDING, torch.finfo(model.dtype).eps) * float(logits.abs().max())
    return f"is off by {moved:.2g} per token on this model" if moved > limit else None

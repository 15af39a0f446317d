"""TRL's `SFTTrainer` with held-out figures that don't depend on the batch, and the checks that packing needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from trl import SFTConfig, SFTTrainer

from perlcli.errors import PerlError, RunFailed, line
from perlcli.training.logits import wrapped

# Families that don't keep the rows of a packed sequence apart (transformers 5.23): they build masks or position biases
# from the attention mask alone, which packing leaves out, or carry a state from row to row. `leak` measures it.
LEAKING = ("gpt_oss", "falcon", "mpt", "bloom", "opt", "minimax", "jamba", "mamba2")
PROBE = 8  # tokens of each of two rows
# How far rounding may move the logits of a row with another one before it, as a share of the largest: in float32, else.
ROUNDING, COARSE = 1e-5, 2e-2
UNPACKED = "leave out --set packing=true: rows are padded instead"
AVERAGED = ("mean_token_accuracy", "entropy")  # TRL's metrics that are means over a batch's tokens


class TokenMeanTrainer(SFTTrainer):
    """TRL's trainer, whose held-out loss, accuracy and entropy are means over all tokens. Its own are means over
    batches, so that a batch of short rows counts as much as one of long rows (transformers `evaluation_loop`, TRL 1.16
    `SFTTrainer.log`)."""

    own_logits = False  # whether the loss is computed from the model's own logits (`logits.check`)

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._tokens = 0
        self._sums: dict[str, float] = {}

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """TRL's loss; with the model's outputs if asked for."""
        return super().compute_loss(wrapped(self, model), *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # noqa: ANN401
        """The held-out figures, each a mean over all tokens that are predicted."""
        self._tokens, self._sums = 0, {}
        has_aux, self.aux_loss_enabled = self.aux_loss_enabled, False  # a mean over a batch, and no part of this loss
        try:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        finally:
            self.aux_loss_enabled = has_aux
        return metrics | {f"eval_{name}": value / max(1, self._tokens) for name, value in self._sums.items()}

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """TRL's step, after which its batch's means are added up by tokens."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        count = int((inputs["labels"][..., 1:] != -100).sum())
        values = {name: self._metrics["eval"][name][-1] for name in AVERAGED} | {"loss": float(result[0])}
        self._tokens += count
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * count
        return result


def check_packing(config: SFTConfig, family: str) -> None:
    """Raises PerlError if rows that TRL packs into one sequence would see each other in this family of models."""
    if not config.packing:
        return
    if config.packing_strategy == "wrapped":
        problem = "--set packing_strategy=wrapped cuts rows and lets those in one sequence see each other"
        raise PerlError(problem, "leave it out, so that rows stay complete and apart (bfd)")
    if family in LEAKING:
        problem = f"--set packing=true: with {family}, the rows that are packed into one sequence would see each other"
        raise PerlError(problem, UNPACKED)


def check_apart(trainer: SFTTrainer) -> None:
    """Measure that a row in a packed sequence doesn't see the one before it, with two rows as TRL packs them. Raises
    RunFailed if it does."""
    args: Any = trainer.args
    if not args.packing:
        return
    model: Any = trainer.model
    try:
        moved = leak(model, trainer.data_collator)
    except ValueError as error:  # from models whose convolutions need another package to keep rows apart
        raise RunFailed(f"--set packing=true doesn't work with this model: {line(error)}", UNPACKED) from error
    if not moved <= (ROUNDING if model.dtype == torch.float32 else COARSE):
        problem = "--set packing=true: with this model, the rows that are packed into one sequence see each other"
        raise RunFailed(f"{problem} (another row before it moves a row's logits by {moved:.1%})", UNPACKED)


@torch.no_grad()
def leak(model: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> float:  # noqa: ANN401
    """How far the logits of a row move when the row packed before it changes, as a share of the largest."""
    second = [token % 7 + 11 for token in range(PROBE)]
    was_training = model.training
    model.eval()
    logits = []
    for start in (2, 22):
        rows = [[token % 5 + start for token in range(PROBE)], second]
        batch = collate([{"input_ids": row, "labels": row, "seq_lengths": [PROBE]} for row in rows])
        inputs = {name: item.to(model.device) if hasattr(item, "to") else item for name, item in batch.items()}
        inputs.pop("labels")
        logits.append(model(**inputs, use_cache=False).logits[0, PROBE:].float())
    model.train(was_training)
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1e-9))

"""What an engine's rounding does to learning: how far its log-probabilities are from training's, and the weights that
correct for it (truncated importance sampling, as in verl and TRL's GRPO)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def padded_like(sampled: Sequence[Sequence[float]], mask: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of the tokens of each completion, as a tensor like its mask, (rows, tokens)."""
    filled = torch.zeros(mask.shape, dtype=torch.float32)
    for row, values in enumerate(sampled):
        filled[row, : len(values)] = torch.tensor(values)
    return filled.to(mask.device)


def figures(trained: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """The mean and largest difference of the log-probabilities, and KL(sampler || trainer), per token. All arguments
    are (rows, tokens)."""
    gaps = ((sampled - trained) * mask)[mask.bool()]
    if not gaps.numel():
        return {"diff_mean": 0.0, "diff_max": 0.0, "kl": 0.0}
    return {"diff_mean": float(gaps.abs().mean()), "diff_max": float(gaps.abs().max()), "kl": float(gaps.mean())}


def weights(
    trained: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor, cap: float, *, per_token: bool
) -> torch.Tensor:
    """The probability of what was written in training over that in sampling, at most `cap`: of completions, (rows,),
    or of tokens, (rows, tokens)."""
    gaps = (trained - sampled) * mask
    return (gaps if per_token else gaps.sum(dim=1)).exp().clamp(max=cap)

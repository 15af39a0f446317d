"""Whether TRL's head for log-probabilities computes correctly, forward and backward, compared with plain torch.

On a GPU it compiles Triton kernels while it runs, which takes a C compiler and Python's headers."""

from __future__ import annotations

import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import selective_log_softmax_and_entropy

from perlcli import device

TOKENS, WIDTH, VOCABULARY, CHUNK = 12, 32, 96, 64  # the vocabulary takes a complete chunk and a part of one
Result = tuple[torch.Tensor, torch.Tensor]  # log-probabilities, (tokens,), and the gradient, (tokens, width)


def error() -> float:
    """The largest error of log-probabilities and gradients, by both ways that sft and rl compute them."""
    place = torch.cuda.current_device() if device.kind() == "cuda" else "cpu"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(place).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(place)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator).to(place)
    logits = hidden @ weight.T
    wanted = _with_gradient(logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0], hidden)
    chunked = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ("entropy",))[0]
    selected = selective_log_softmax_and_entropy(hidden @ weight.T, targets)[0]
    found = [_with_gradient(log_probs, hidden) for log_probs in (chunked, selected)]
    differences = [(a - b).abs().max() for each in found for a, b in zip(each, wanted, strict=True)]
    return float(torch.stack(differences).max())


def _with_gradient(log_probs: torch.Tensor, hidden: torch.Tensor) -> Result:
    (gradient,) = torch.autograd.grad(log_probs.sum(), hidden)
    return log_probs.detach(), gradient

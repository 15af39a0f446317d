"""How likely a model finds completions, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from perlcli.model.roles import Model
from perlcli.model.tokenizers import batches_by_length, padded

LOGITS = 2**25  # at most so many at once, 128 MB in float32: with all tokens of a batch they can outgrow the model
Ids = list[int]


@torch.no_grad()
def log_probs(
    model: Model, prompts: Sequence[Ids], written: Sequence[Ids], temperature: float, size: int | None = None
) -> list[list[float]]:
    """The log-probability of each completion token under the model at this temperature, one list per completion, from
    batches of `size` rows of similar length (None: one batch)."""
    rows = [prompt + completion for prompt, completion in zip(prompts, written, strict=True)]
    result: list[list[float]] = [[] for _ in rows]
    for part in batches_by_length(rows, size):
        values = iter(_log_probs(model, [rows[i] for i in part], [len(prompts[i]) for i in part], temperature))
        for index in part:
            result[index] = [next(values) for _ in written[index]]
    return result


def _log_probs(model: Model, rows: Sequence[Ids], starts: Sequence[int], temperature: float) -> list[float]:
    """The log-probabilities of all tokens of a batch that come after the start of their row, row by row."""
    ids, mask = padded(rows, 0, model.device)
    spans = enumerate(zip(starts, map(len, rows), strict=True))
    places = [(index, token) for index, (start, end) in spans for token in range(start, end)]
    row, token = torch.tensor(places, device=ids.device).reshape(-1, 2).T
    step = max(1, LOGITS // int(model.config.get_text_config().vocab_size))
    # the logits at a position are for the token that follows it
    predicted = _logits(model, ids, mask, (row, token - 1), step)
    result: list[float] = []
    for logits, target in zip(predicted, ids[row, token].split(step), strict=True):
        scaled = logits.float() / temperature
        result += (scaled.gather(1, target.unsqueeze(1))[:, 0] - scaled.logsumexp(dim=1)).tolist()
    return result


def _logits(
    model: Model, ids: torch.Tensor, mask: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor], step: int
) -> Iterator[torch.Tensor]:
    """The logits at some places of a batch, (places, vocabulary), `step` places at a time. The model's output layer is
    given only their hidden states, so that no others are computed, and the model scales or caps the logits itself."""
    head = model.get_output_embeddings()
    parts: list[torch.Tensor] = []

    def select(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        parts.extend(inputs[0][places].split(step))
        return (parts[0].unsqueeze(0),)

    with _before(head, select):
        yield model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    for part in parts[1:]:
        with _before(head, lambda *_, states=part: (states.unsqueeze(0),)):
            yield model(input_ids=ids[:1, :1], use_cache=False).logits[0]  # one token: its own state isn't used


@contextmanager
def _before(module: nn.Module, hook: Callable[..., tuple[torch.Tensor, ...]]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()

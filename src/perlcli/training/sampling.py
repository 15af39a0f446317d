"""Sampling completions, and how likely a model finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from perlcli import device
from perlcli.data import Renderer
from perlcli.model.tokenizers import batches_by_length, padded
from perlcli.training.guards import Model

LOGITS = 2**25  # at most so many at once, 128 MB in float32: with all tokens of a batch they can outgrow the model
Ids = list[int]
# Sampling from the full distribution, as RL does. Whatever is not set here, transformers takes from the model's own
# generation config (Qwen2.5-Instruct's has a repetition penalty).
FULL_DISTRIBUTION = {
    "do_sample": True,
    "num_beams": 1,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@dataclass(frozen=True)
class Sampling:
    """How to sample completions: from the full distribution at this temperature, as RL does."""

    temperature: float
    max_new_tokens: int
    seed: int


@torch.no_grad()
def sample(model: Model, render: Renderer, prompts: Sequence[Ids], how: Sampling) -> list[Ids]:
    """One completion's token ids for each prompt, including EOS if the completion ended with it. Leaves torch's random
    state unchanged."""
    tokenizer = render.tokenizer
    ids, mask = padded(prompts, tokenizer.pad_token_id, model.device, on_left=True)
    config = GenerationConfig(
        **FULL_DISTRIBUTION,
        temperature=how.temperature,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=list(render.eos_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    was_training = model.training
    model.eval()
    try:
        with device.fork_rng():
            torch.manual_seed(how.seed)
            generate: Any = model.generate  # peft's wrapper passes it on
            out = generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        model.train(was_training)
    written: list[Ids] = out[:, ids.shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(row) if token in render.eos_ids), len(row) - 1) for row in written]
    return [row[: end + 1] for row, end in zip(written, ends, strict=True)]


def sample_batches(
    model: Model, render: Renderer, prompts: Sequence[Ids], how: Sampling, size: int
) -> Iterator[list[Ids]]:
    """Sample the completions of `size` prompts at a time; each batch has a seed that depends on its place only."""
    for start in range(0, len(prompts), size):
        yield sample(model, render, prompts[start : start + size], replace(how, seed=how.seed + start))


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

"""Sampling completions, and how likely a model finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig

from perlcli.data import Renderer
from perlcli.model.tokenizers import padded
from perlcli.training.guards import Model

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
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        generate: Any = model.generate  # peft's wrapper passes it on
        out = generate(input_ids=ids, attention_mask=mask, generation_config=config)
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
def log_probs(model: Model, prompts: Sequence[Ids], written: Sequence[Ids], temperature: float) -> list[list[float]]:
    """The log-probability of each completion token under the model at this temperature, one list per completion."""
    rows = [prompt + completion for prompt, completion in zip(prompts, written, strict=True)]
    ids, mask = padded(rows, 0, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (rows, longest, vocabulary)
    result = []
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        # the logits at a position are for the token that follows it
        predicted = logits[index, len(prompt) - 1 : len(row) - 1].float() / temperature
        target = ids[index, len(prompt) : len(row)]
        chosen = predicted.log_softmax(dim=-1).gather(1, target.unsqueeze(1))[:, 0]
        result.append([float(value) for value in chosen.cpu()])
    return result

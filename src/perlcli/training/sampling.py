"""Sampling completions, and how likely a model finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from perlcli.data import Renderer
from perlcli.model.batches import padded

# Sampling from the whole distribution, as RL does. What isn't said here, transformers takes from the generation config
# that a model brings (Qwen2.5-Instruct's has a repetition penalty).
WHOLE = {
    "do_sample": True, "num_beams": 1, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: the whole distribution at this temperature, as RL draws them."""

    temperature: float
    max_new_tokens: int
    seed: int


@torch.no_grad()
def sample(model: Any, render: Renderer, prompts: Sequence[list[int]], how: Sampling) -> list[list[int]]:
    """One completion's token ids for each prompt, EOS included where it was reached.

    Leaves the random state as it was.
    """
    tokenizer = render.tokenizer
    ids, mask = padded(prompts, tokenizer.pad_token_id, model.device, on_left=True)
    config = GenerationConfig(
        **WHOLE, temperature=how.temperature, max_new_tokens=how.max_new_tokens,
        eos_token_id=list(render.eos_ids), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    model.train(was_training)
    return [_until_end(row, render) for row in out[:, ids.shape[1] :].tolist()]


def _until_end(ids: list[int], render: Renderer) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in render.eos_ids), len(ids) - 1)
    return ids[: end + 1]


@torch.no_grad()
def log_probs(
    model: Any, prompts: Sequence[list[int]], written: Sequence[list[int]], temperature: float
) -> list[list[float]]:
    """The log-probability of each written token under the model at this temperature, a list a row."""
    ids, mask = padded([p + w for p, w in zip(prompts, written, strict=True)], 0, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for index, (prompt, completion) in enumerate(zip(prompts, written, strict=True)):
        span = logits[index, len(prompt) - 1 : len(prompt) + len(completion) - 1].float() / temperature
        target = ids[index, len(prompt) : len(prompt) + len(completion)]
        picked = span.log_softmax(dim=-1).gather(1, target.unsqueeze(1))[:, 0]
        found.append([float(value) for value in picked.cpu()])
    return found

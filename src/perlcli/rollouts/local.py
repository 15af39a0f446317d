"""Samples completions from the model in memory, as TRL does.

Both draw the same tokens from the same random state: they are given the same options, and `without_habits` takes away
what a model's generation config would add."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from perlcli import device
from perlcli.data import Renderer
from perlcli.errors import RunFailed
from perlcli.model.roles import Model
from perlcli.model.tokenizers import padded
from perlcli.rollouts.how import Ids, Sampling
from perlcli.rollouts.stops import Ends

# Of a model's own generation config, what changes only how tokens are computed.
HARMLESS = ("cache_implementation", "cache_config", "use_cache", "prefill_chunk_size")


@torch.no_grad()
def sample(
    model: Model, render: Renderer, prompts: Sequence[Ids], how: Sampling, *processors: LogitsProcessor
) -> list[Ids]:
    """One completion's token ids for each prompt, including the EOS or stop string that it ended with; `processors` see
    the model's logits. Leaves torch's random state unchanged."""
    ends = Ends(render, how.stop)
    ids, mask = padded(prompts, render.tokenizer.pad_token_id, model.device, on_left=True)
    was_training = model.training
    model.eval()
    try:
        with device.fork_rng(), without_habits(model), finite():
            torch.manual_seed(how.seed)
            generate: Any = model.generate  # peft's wrapper passes it on
            out = generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config_of(render, how),
                stopping_criteria=ends.criteria(ids.shape[1]),
                logits_processor=LogitsProcessorList(processors),
            )
    finally:
        model.train(was_training)
    return [ends.cut(row) for row in out[:, ids.shape[1] :].tolist()]


def config_of(render: Renderer, how: Sampling) -> GenerationConfig:
    """What transformers is asked for, with what a model's own config would fill in otherwise."""
    tokenizer = render.tokenizer
    return GenerationConfig(
        **how.distribution(),
        do_sample=True,
        min_new_tokens=how.min_new_tokens or None,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=list(render.eos_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


@contextmanager
def finite() -> Iterator[None]:
    """Raises RunFailed where torch can't sample, since a probability is NaN or infinite."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("probability tensor contains"):
            raise
        problem = "The policy's probabilities of the next token are NaN or infinite"
        raise RunFailed(problem, "its weights have NaN or infinite values, or it needs another --dtype") from error


@contextmanager
def without_habits(model: Model) -> Iterator[None]:
    """Take away what the model's own generation config adds to sampling: transformers fills in from it whatever its
    caller leaves unset (the repetition penalty of Qwen2.5-Instruct, suppressed tokens, …)."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = inner.generation_config
    standard = GenerationConfig().to_dict().keys() - set(HARMLESS)
    kept = {name: value for name, value in own.to_dict().items() if name not in standard}
    model.generation_config = inner.generation_config = GenerationConfig(**kept)  # peft's wrapper may have its own
    try:
        yield
    finally:
        model.generation_config = inner.generation_config = own


def sample_batches(
    model: Model, render: Renderer, prompts: Sequence[Ids], how: Sampling, size: int
) -> Iterator[list[Ids]]:
    """Sample the completions of `size` prompts at a time; each batch has a seed that depends on its place only."""
    for start in range(0, len(prompts), size):
        yield sample(model, render, prompts[start : start + size], replace(how, seed=how.seed + start))

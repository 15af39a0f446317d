"""Sampling by transformers' continuous batching: a completion that ends makes room for the next one at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

import torch
from transformers import ContinuousBatchingConfig

from perlcli import device
from perlcli.data import Renderer
from perlcli.errors import RunFailed, line
from perlcli.model.roles import Model
from perlcli.rollouts.how import Ids, Sampling
from perlcli.rollouts.local import config_of, without_habits
from perlcli.rollouts.server import Written
from perlcli.rollouts.stops import Ends

PAGE = 32  # tokens of one layer that a page of the cache holds; transformers' 256 are too many for short completions
MOST = 2**15  # tokens in the cache, unless one completion needs more


@dataclass
class Continuous:
    """Samples from a model in memory. The pages of its cache are as many as the completions need: by default
    transformers takes nine tenths of the memory that is free."""

    render: Renderer

    def sample(self, model: Model, prompts: Sequence[Ids], how: Sampling) -> list[Written]:
        """One completion for each prompt. Raises RunFailed if transformers gives up on one."""
        ends = Ends(self.render, how.stop)
        was_training, generating = model.training, cast(Any, model)  # peft's wrapper passes generate_batch on
        model.eval()
        try:
            with torch.no_grad(), device.fork_rng(), without_habits(model):
                outputs: dict[str, Any] = generating.generate_batch(
                    [list(ids) for ids in prompts],
                    generation_config=config_of(self.render, how),
                    continuous_batching_config=batching(prompts, how),
                    progress_bar=False,
                )
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            raise RunFailed(f"--rollouts continuous failed: {line(error)}", "--rollouts transformers") from error
        finally:
            model.train(was_training)
        failed = [output.error for output in outputs.values() if output.error]
        if failed or len(outputs) != len(prompts):
            why = failed[0] if failed else f"{len(outputs)} of {len(prompts)} completions were written"
            raise RunFailed(f"--rollouts continuous failed: {why}", "--rollouts transformers")
        return [_until_end(ends, output) for output in outputs.values()]

    def compares(self, how: Sampling) -> bool:
        """Whether the log-probabilities are of the distribution whose log-probabilities training computes."""
        return how.is_full

    def close(self) -> None:
        """Nothing is kept between generations."""


def batching(prompts: Sequence[Ids], how: Sampling) -> ContinuousBatchingConfig:
    """How transformers batches: with a cache for all completions, or for as many as `MOST` tokens hold."""
    longest = max(map(len, prompts)) + how.max_new_tokens
    tokens = max(longest, min(MOST, sum(len(ids) + how.max_new_tokens for ids in prompts)))
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=ceil(tokens / PAGE) + len(prompts),
        max_batch_tokens=max(longest, 512),
        return_logprobs=True,
        seed=how.seed,
        drop_unsupported_processors=False,
    )


def _until_end(ends: Ends, output: Any) -> Written:  # noqa: ANN401
    ids = ends.cut(list(output.generated_tokens))
    return Written(ids, [float(value) for value in output.logprobs[: len(ids)]])

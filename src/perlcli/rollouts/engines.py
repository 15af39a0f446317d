"""What can sample completions: the model in memory as TRL does it, or an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from perlcli.data import Renderer
from perlcli.model.roles import Model
from perlcli.rollouts import local, vllm
from perlcli.rollouts.continuous import Continuous
from perlcli.rollouts.how import Ids, Sampling
from perlcli.rollouts.merged import Merged
from perlcli.rollouts.server import EXAMPLE, Written
from perlcli.settings.sampling import RolloutSettings


class Engine(Protocol):
    """Samples completions, with the log-probability of each token."""

    def sample(self, model: Model, prompts: Sequence[Ids], how: Sampling) -> list[Written]:
        """One completion for each prompt, by the role that the model is switched to."""

    def compares(self, how: Sampling) -> bool:
        """Whether its log-probabilities are of the distribution whose log-probabilities training computes."""

    def close(self) -> None:
        """Leave nothing behind."""


def chosen(values: RolloutSettings, folder: Path, render: Renderer) -> Engine | None:
    """The engine of these settings; None for the model in memory. Raises PerlError if a server can't be reached."""
    if values.rollouts == "vllm":
        urls = values.vllm_server_base_url or (EXAMPLE,)
        return vllm.connected(urls, folder, render, values.vllm_max_logprob_diff)
    if values.rollouts == "merged":
        return Merged(render)
    return Continuous(render) if values.rollouts == "continuous" else None


def sample_batches(
    engine: Engine | None, model: Model, render: Renderer, prompts: Sequence[Ids], how: Sampling, size: int
) -> Iterator[list[Ids]]:
    """One completion for each prompt: in batches of `size` from the model in memory, by other engines all at once."""
    if engine is None:
        yield from local.sample_batches(model, render, prompts, how, size)
    elif isinstance(engine, Merged):
        for start in range(0, len(prompts), size):
            written = engine.sample(model, prompts[start : start + size], replace(how, seed=how.seed + start))
            yield [each.ids for each in written]
    else:
        yield [written.ids for written in engine.sample(model, prompts, how)]

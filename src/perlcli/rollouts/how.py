"""How completions are sampled, whatever engine samples them."""

from __future__ import annotations

from dataclasses import dataclass

Ids = list[int]

# The options by which tokens are drawn from another distribution than that of the log-probabilities, and their value
# for the full one, each by its name in TRL and transformers.
FULL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Sampling:
    """How to sample completions: from the full distribution at this temperature, unless more is given."""

    temperature: float
    max_new_tokens: int
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0

    @property
    def is_full(self) -> bool:
        """Whether tokens come from the distribution whose log-probabilities training computes."""
        return all(getattr(self, name) == full for name, full in FULL.items()) and not self.min_new_tokens

    def distribution(self) -> dict[str, float | int | None]:
        """What decides the distribution of tokens, as TRL's config and transformers' call it."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        return {name: getattr(self, name) for name in names} | {"min_p": self.min_p or None}

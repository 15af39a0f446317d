"""Where a completion ends: at an EOS, or with the token that completes a stop string.

The policy learns from all tokens that it wrote, those of the stop string too. What reads a completion (a reward, a gold
check, a person) gets it without the stop string and with an EOS in its place, as an answer that ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from perlcli.data import Renderer
from perlcli.model.roles import Model
from perlcli.rollouts.how import Ids

MARGIN = 8  # tokens before the longest stop string that are decoded with it, as the first of a text may lose its space


class Ends:
    """Knows where completions end, by the model's EOS tokens and these stop strings; empty ones are left out."""

    def __init__(self, render: Renderer, stop: Sequence[str]) -> None:
        self.render = render
        self.stop = tuple(filter(None, stop))
        # a token is at least a byte, so that no stop string is longer than this
        self.window = max((len(text.encode()) for text in self.stop), default=0) + MARGIN

    def stops(self, written: Ids) -> bool:
        """Whether a stop string is among the last tokens, as it is in a completion that was cut after it."""
        if not self.stop or not written:
            return False
        text = self._decoded(written[-self.window :])
        return any(stop in text for stop in self.stop)

    def cut(self, written: Ids) -> Ids:
        """The completion up to the token that ends it, without the padding that `generate` puts after it."""
        for index, token in enumerate(written):
            if token in self.render.eos_ids or self.stops(written[: index + 1]):
                return written[: index + 1]
        return written

    def ended(self, written: Ids) -> bool:
        """Whether a completion ended by itself; otherwise it was cut off."""
        return self.render.ended(written) or self.stops(written)

    def answer(self, written: Ids) -> Ids:
        """What a reward reads of a completion: its tokens as they are; if it ended with a stop string, those before it
        and an EOS. Text that shares a token with the start of the stop string is encoded anew."""
        if self.render.ended(written) or not self.stops(written):
            return written
        text, eos = self._decoded(written), self.render.tokenizer.eos_token_id
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        before = text[: min(places, default=len(text))]
        for count in range(len(written) - 1, -1, -1):
            start = self._decoded(written[:count])
            if not before.startswith(start):
                continue  # part of the stop string, or half of a character
            rest = self.render.encoder.chat(before[len(start) :])
            if self._decoded([*written[:count], *rest]) == before:
                return [*written[:count], *rest, eos]
        return [*self.render.encoder.chat(before), eos]

    def criteria(self, width: int) -> StoppingCriteriaList:
        """Ends the rows of `generate` at the stop strings; `width` is the length of the padded prompts."""
        return StoppingCriteriaList([AtStop(self, width)] if self.stop else [])

    def _decoded(self, ids: Ids) -> str:
        return str(self.render.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class AtStop(StoppingCriteria):
    """Ends a row once its completion contains a stop string. transformers' own criterion also finds one that begins in
    the prompt, and spends seconds on a large vocabulary."""

    def __init__(self, ends: Ends, width: int) -> None:
        self.ends, self.width = ends, width

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """Whether each row is done, (rows,)."""
        rows = input_ids[:, self.width :][:, -self.ends.window :].tolist()
        return torch.tensor([self.ends.stops(row) for row in rows], device=input_ids.device)


@contextmanager
def stopping(model: Model, ends: Ends) -> Iterator[None]:
    """Lets every `model.generate` inside end at the stop strings.

    A workaround: TRL gives `generate` neither the tokenizer that `stop_strings` needs nor criteria (TRL 1.16,
    `RLOOTrainer._generate_single_turn`). It can go once `generation_kwargs={"stop_strings": …}` works there
    (https://github.com/huggingface/trl/issues/2820)."""
    if not ends.stop:
        yield
        return
    patched: Any = model
    generate = patched.generate

    def ending(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return generate(*args, **kwargs, stopping_criteria=ends.criteria(kwargs["input_ids"].shape[1]))

    patched.generate = ending
    try:
        yield
    finally:
        del patched.generate

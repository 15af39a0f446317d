"""Completions that a reward can't score: named, and then the run stops, skips them or gives them a reward."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from perlcli.data import Prompt, Renderer
from perlcli.errors import PerlError, RunFailed
from perlcli.run import out_of_memory
from perlcli.training.reward_errors import PATIENCE, OnError, RewardRaised, Scored
from perlcli.training.rewards import FunctionReward, Weighted

ROWS = [Prompt(f"order {index}") for index in range(4)]
WORDS = ("tall", "small", "large", "hot")


@pytest.fixture
def judged(render: Renderer) -> Callable[..., Any]:
    """Scores four completions by a function of their texts, with a decision on errors."""

    def score(function: Callable[[list[str]], list[Any]], decision: str | float, rows: int = 4, **more: Any) -> Scored:
        def reward(completions: list[str], **_: Any) -> list[Any]:
            return function(completions)

        written = [render.tokenizer(text)["input_ids"] for text in WORDS[:rows]]
        parts = {"one": FunctionReward(reward, "m:f", render)}
        return Weighted(parts, (2.0,), on_error=OnError(decision, render, **more))(ROWS[:rows], written)

    return score


def raising_at(*bad: str) -> Callable[[list[str]], list[float]]:
    """Scores by rank in the batch, and raises if one of the texts is in it."""

    def reward(texts: list[str]) -> list[float]:
        if set(texts) & set(bad):
            raise ValueError("no such drink")
        return [float(sorted(texts).index(text)) for text in texts]

    return reward


def nan_at(*bad: str) -> Callable[[list[str]], list[float]]:
    return lambda texts: [math.nan if text in bad else 1.0 for text in texts]


def test_a_completion_that_makes_the_function_fail_is_named(judged: Any) -> None:
    with pytest.raises(RewardRaised) as caught:
        judged(raising_at("small", "hot"), "stop")
    told = "The reward function m:f failed: ValueError: no such drink: the completion 'small' of the prompt 'order 1'"
    assert caught.value.problem == told
    assert caught.value.hint == "fix the reward, or --on-reward-error skip leaves such completions out"


def test_a_completion_that_scores_nan_is_named(judged: Any) -> None:
    with pytest.raises(RunFailed, match=r"^The reward one is nan: the completion 'large' of the prompt 'order 2'"):
        judged(nan_at("large"), "stop")
    with pytest.raises(RunFailed, match=r"^The reward one is -inf: the completion 'tall' of the prompt 'order 0'"):
        judged(lambda texts: [-math.inf, 1, 1, 1], "stop")


@pytest.mark.parametrize("decision", ["skip", "-3", 0])
def test_what_can_not_be_scored_is_skipped_or_gets_the_reward_that_was_decided(decision: Any, judged: Any) -> None:
    """The others keep the rewards that they have together, since a function may compare them."""
    instead = math.nan if decision == "skip" else float(decision)
    scored = judged(raising_at("small"), decision)
    assert scored.total == pytest.approx([4.0, instead, 2.0, 0.0], nan_ok=True)
    assert scored.faults == {1: "The reward function m:f failed: ValueError: no such drink"}
    assert scored.known == ([4, 2, 0] if decision == "skip" else [4, instead, 2, 0])
    scored = judged(nan_at("tall", "hot"), decision)
    assert scored.total == pytest.approx([instead, 2.0, 2.0, instead], nan_ok=True)
    assert scored.faults == {0: "The reward one is nan", 3: "The reward one is nan"}


def test_a_function_that_fails_for_a_batch_but_for_no_completion_of_it(judged: Any) -> None:
    def several(texts: list[str]) -> list[float]:
        if len(texts) > 1:
            raise ValueError("one at a time")
        return [1.0]

    with pytest.raises(RewardRaised, match=r"time: for 4 completions together, but for none of them on its own$"):
        judged(several, "stop")
    scored = judged(several, "skip")
    assert list(scored.faults) == [0, 1, 2, 3] and scored.known == []


def test_a_reward_that_is_broken_stops_the_run_whatever_was_decided(judged: Any, render: Renderer) -> None:
    """A lost connection must not skip all that is left."""
    careful = OnError("skip", render)
    fails = Weighted({"one": FunctionReward(lambda **_: 1 / 0, "m:f", render)}, (1.0,), on_error=careful)
    for _ in range(PATIENCE - 1):
        fails(ROWS, [[5]] * 4)
    with pytest.raises(RunFailed, match=r"^The reward could score nothing in 3 batches in a row: .*ZeroDivisionError"):
        fails(ROWS, [[5]] * 4)
    careful.barren = PATIENCE - 1
    assert careful.scored(ROWS[:1], [[5]], lambda rows, ids: Scored([1.0], {"one": [1.0]})).total == [1.0]
    assert careful.barren == 0
    with pytest.raises(RunFailed, match=r"^The reward could score none of the completions"):
        judged(nan_at(*WORDS), "skip", patience=1)


def test_out_of_memory_is_never_skipped(judged: Any) -> None:
    def full(texts: list[str]) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(PerlError) as caught:
        judged(full, "skip")
    assert out_of_memory.failure(caught.value) is not None


def test_a_completion_on_which_no_reward_has_an_opinion_is_named(render: Renderer) -> None:
    with pytest.raises(RunFailed, match=r"^Every reward is None: the completion"):
        OnError("stop", render).scored(ROWS[:1], [[5]], lambda rows, ids: Scored([math.nan], {"one": [None]}))  # type: ignore[list-item]


def test_a_function_that_returns_something_else_stops_the_run(judged: Any) -> None:
    with pytest.raises(PerlError, match="returned 1 rewards for 4 completions"):
        judged(lambda texts: [1.0], "skip")

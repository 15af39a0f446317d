"""The judge that TRL calls, and the probe before the first step."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from perlcli.data import Prompt, Renderer
from perlcli.errors import RunFailed
from perlcli.rollouts import local
from perlcli.settings import Rl
from perlcli.training.judge import PER_PROMPT, PROMPTS, ROUNDS, Judge, probe
from perlcli.training.rewards import Scored

Ids = list[int]


@pytest.fixture
def judge(render: Renderer) -> Callable[..., Any]:
    """A judge with the scores that a test gives, and a way to call it on completions."""
    kept: list[dict[str, Any]] = []
    run = SimpleNamespace(append=lambda name, row: kept.append(row))

    def make(found: list[float], decision: str = "stop", faults: Any = None, **parts: Any) -> Callable[..., Any]:
        chosen = SimpleNamespace(sampling=replace(Rl().sampling, on_reward_error=decision))
        prepared: Any = SimpleNamespace(renderer=render, run=run, settings=chosen)
        rows = [Prompt("a latte", {"order": "add_order_item(latte)"})]
        judge = Judge(prepared, lambda rows, ids, calling: Scored(found, parts or {"one": found}, faults or {}), rows)

        def call(*completions: str) -> tuple[list[float], dict[str, float], list[dict[str, Any]]]:
            logged: dict[str, float] = {}
            ids = [render.tokenizer(text)["input_ids"] for text in completions]
            state = SimpleNamespace(max_steps=1, global_step=0)
            taken = judge(
                completion_ids=ids, trainer_state=state, log_metric=logged.__setitem__, perlcli_row=[0] * len(ids)
            )
            return taken, logged, kept

        return call

    return make


def test_judge_counts_gold_and_keeps_samples(judge: Any) -> None:
    taken, logged, kept = judge([1.0, 2.0])("add_order_item(latte)<|im_end|>", "add_order_item(latte, ")
    assert taken == [1.0, 2.0]
    assert logged == {"gold": 0.5}
    assert kept == [{"step": 1, "prompt": "a latte", "policy": "add_order_item(latte)", "reward": 1.0}]


def test_judge_logs_how_reward_goes_with_length(judge: Any) -> None:
    _, logged, _ = judge([1.0, 2.0, math.nan, 0.0])("a latte", "add_order_item(latte)", "a", "a")
    assert logged["reward_by_length"] > 0.5
    _, logged, _ = judge([math.nan, 2.0])("a latte", "a")
    assert "reward_by_length" not in logged


def test_judge_logs_the_mean_of_each_of_several_rewards(judge: Any) -> None:
    _, logged, _ = judge([1.0, 2.0], first=[1.0, 3.0], second=[0.0, -1.0])("a", "b")
    assert logged == {"gold": 0, "rewards/first/mean": 2, "rewards/second/mean": -0.5}


def test_judge_keeps_the_completions_without_a_reward_and_counts_them(judge: Any) -> None:
    skipped = judge([math.nan, 2.0], "skip", {0: "The reward one is nan"}, one=[math.nan, 2.0], two=[math.nan, 0.0])
    taken, logged, kept = skipped("a", "b")
    assert taken == [None, 2.0]
    assert logged == {"gold": 0, "rewards/one/mean": 2, "rewards/two/mean": 0, "unscored": 0.5}
    error, sample = kept
    assert error == {
        "step": 1, "prompt": "a latte", "policy": "a", "reward": None, "problem": "The reward one is nan",
    }  # fmt: skip
    assert sample["reward"] is None


# The probe


@pytest.fixture
def probing(render: Renderer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a probe with the scores that a test gives, on completions that differ."""
    notes: list[str] = []
    written: list[Ids] = []

    def sample(model: Any, renderer: Any, prompts: list[Ids], how: Any) -> list[Ids]:
        found = [[*prompt, how.seed, index] for index, prompt in enumerate(prompts)]
        written.extend(found)
        return found

    monkeypatch.setattr(local, "sample", sample)

    def run(
        score: Callable[[int, Ids], float], algorithm: str = "rloo", is_function: bool = False, prompts: int = 20
    ) -> Any:
        settings = SimpleNamespace(
            rl=SimpleNamespace(algorithm=algorithm, num_generations=PER_PROMPT if algorithm == "rloo" else 1),
            sampling=replace(Rl().sampling, temperature=1.0, max_completion_length=8),
            run=SimpleNamespace(seed=0),
            train=SimpleNamespace(per_device_train_batch_size=8),
        )
        prepared: Any = SimpleNamespace(renderer=render, settings=settings, run=SimpleNamespace(note=notes.append))
        rows = [(Prompt(f"prompt {i}", {}), [i]) for i in range(prompts)]

        def scores(part: Any, ids: Any) -> Scored:
            found = [score(i, row) for i, row in enumerate(ids)]
            faults = {i: "it is nan" for i, value in enumerate(found) if math.isnan(value)}
            return Scored(found, {"one": found, "idle": [0.0] * len(found)}, faults)

        return probe(None, prepared, scores, rows, is_function=is_function)

    run.notes, run.written = notes, written  # type: ignore[attr-defined]
    return run


def test_probe_samples_several_completions_of_several_prompts(probing: Any) -> None:
    found = probing(lambda i, ids: float(i))
    assert found.prompts == [[i] for i in range(PROMPTS) for _ in range(PER_PROMPT)]
    assert found.summary() == {"completions": 16, "reward_low": 0, "reward_mean": 7.5, "reward_high": 15}
    assert probing.notes == ["The reward idle gives all 16 completions the same value: it has no effect so far."]


def test_probe_without_groups_takes_one_completion_per_prompt(probing: Any) -> None:
    found = probing(lambda i, ids: float(i), algorithm="reinforce")
    assert found.prompts == [[i] for i in range(PROMPTS * PER_PROMPT)]


def test_probe_reuses_prompts_if_there_are_few(probing: Any) -> None:
    assert probing(lambda i, ids: float(i), algorithm="reinforce", prompts=3).prompts[:4] == [[0], [1], [2], [0]]


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce"])
def test_probe_stops_at_equal_rewards_for_all(probing: Any, algorithm: str) -> None:
    told = r"^The reward gives all 16 completions the same value \(3\): nothing to learn\nHint: check that the reward"
    with pytest.raises(RunFailed, match=told):
        probing(lambda i, ids: 3.0, algorithm=algorithm)


def test_probe_stops_if_no_prompt_has_different_rewards(probing: Any) -> None:
    told = r"^The reward gives the 4 completions of each of 4 prompts the same value: .*\nHint: raise --temperature"
    with pytest.raises(RunFailed, match=told):
        probing(lambda i, ids: float(i // PER_PROMPT))
    assert probing(lambda i, ids: float(i // PER_PROMPT), algorithm="reinforce")


def test_probe_ignores_rounding_between_equal_completions(probing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "sample", lambda model, render, prompts, how: [[7] for _ in prompts])
    told = r"the 4 completions of each of 4 prompts the same value: .*\nHint: the policy writes the same completion"
    with pytest.raises(RunFailed, match=told):
        probing(lambda i, ids: 1 + i * 1e-7)


def test_probe_gives_a_function_more_rounds_on_other_prompts(probing: Any) -> None:
    prompts = PROMPTS * ROUNDS
    found = probing(lambda i, ids: float(ids[0] == prompts - 1), is_function=True, prompts=prompts)
    assert found.prompts[0] == [PROMPTS * (ROUNDS - 1)]
    assert len(probing.written) == ROUNDS * PROMPTS * PER_PROMPT
    with pytest.raises(RunFailed, match="the same value"):
        probing(lambda i, ids: 0.0, is_function=True)


def test_probe_tries_again_if_the_policy_wrote_the_same_each_time(
    probing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = local.sample

    def sample(model: Any, renderer: Any, prompts: list[Ids], how: Any) -> list[Ids]:
        if how.seed % 8 < ROUNDS - 1:  # the turn: batches of 8 add their start
            return [[7] for _ in prompts]
        return original(model, renderer, prompts, how)

    monkeypatch.setattr(local, "sample", sample)
    assert probing(lambda i, ids: float(sum(ids))).prompts[0] == [(PROMPTS * (ROUNDS - 1)) % 20]


def test_probe_stops_if_no_completion_can_be_scored(probing: Any) -> None:
    with pytest.raises(RunFailed, match=r"^The reward could score no completion: it is nan"):
        probing(lambda i, ids: math.nan)


def test_probe_leaves_out_completions_that_can_not_be_scored(probing: Any) -> None:
    found = probing(lambda i, ids: math.nan if i == 0 else float(i))
    assert found.summary()["reward_low"] == 1
    assert probing.notes[-1] == "The reward could not score 1 of 16 completions before the first step: it is nan"

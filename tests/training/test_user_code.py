"""What a reward function logs, and what it changes in the process that trains with it."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from perlcli.data import Prompt, Renderer
from perlcli.errors import PerlError
from perlcli.training.reward_functions import Calling, FunctionReward, find
from perlcli.training.rewards import Weighted

TWO = ([Prompt("a"), Prompt("b")], [[5], [6]])


@pytest.mark.parametrize(
    ("logs", "problem"),
    [
        (lambda metric, extra: metric("a", "x"), "logs a='x', not a number"),
        (lambda metric, extra: metric("a", None), "logs a=None, not a number"),
        (lambda metric, extra: metric("a", 10**400), "logs a=1000.*, not a number"),
        (lambda metric, extra: metric(5, 1.0), "calls log_metric with the name 5, not a short text"),
        (lambda metric, extra: metric("a\ud800", 1.0), "calls log_metric with the name .*, not a short text"),
        (lambda metric, extra: metric("a" * 5000, 1.0), "calls log_metric with the name .*, not a short text"),
        (lambda metric, extra: metric("reward", 1.0), "calls log_metric with the name reward, which training logs"),
        (lambda metric, extra: metric("loss", 1.0), "calls log_metric with the name loss, which training logs"),
        (lambda metric, extra: extra("a", [1]), r"logs a=\[1\], not a list of 2 values, one per completion"),
        (lambda metric, extra: extra("a", 5), "logs a=5, not a list of 2 values"),
        (lambda metric, extra: extra("a", "ab"), "logs a='ab', not a list of 2 values"),
        (lambda metric, extra: extra(None, [1, 2]), "calls log_extra with the name None"),
    ],
)
def test_what_a_function_logs_is_checked(logs: Callable[..., Any], problem: str, render: Renderer) -> None:
    """trl would fail on it later, without a word about the function."""

    def reward(completions: Any, log_metric: Any, log_extra: Any) -> list[float]:
        logs(log_metric, log_extra)
        return [1.0] * len(completions)

    with pytest.raises(PerlError, match=f"^The reward function m:f {problem}"):
        FunctionReward(reward, "m:f", render)(*TWO)


def test_what_a_function_logs_arrives(render: Renderer) -> None:
    def reward(completions: Any, log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("mine", torch.tensor(0.5))
        log_extra("lengths", torch.tensor([1, 2]))
        return [1.0] * len(completions)

    metrics: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    calling = Calling(TrainerState(), columns.__setitem__, metrics.__setitem__)
    assert FunctionReward(reward, "m:f", render)(*TWO, calling) == [1.0, 1.0]
    assert metrics == {"mine": 0.5} and columns == {"lengths": [1, 2]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda: os.chdir("/"), "changed the working directory, on which the run depends: from .* to /$"),
        (lambda: torch.set_default_dtype(torch.float64), "changed torch's default dtype, .* to torch.float64$"),
        (lambda: torch.set_grad_enabled(False), "changed whether torch takes gradients, .* from True to False$"),
    ],
)
def test_a_function_that_changes_the_process_is_an_error(
    change: Callable[[], Any], problem: str, render: Renderer, tmp_path: Path
) -> None:
    def reward(completions: Any) -> list[float]:
        change()
        return [1.0] * len(completions)

    with pytest.raises(PerlError, match=f"^The reward function m:f {problem}"):
        FunctionReward(reward, "m:f", render)(*TWO)
    assert Path.cwd() == tmp_path and torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


def test_a_module_that_changes_the_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "moves_away.py").write_text("import os\nos.chdir('/')\ndef f(completions): return [1.0]\n")
    problem = "^--reward moves_away.py:f: importing moves_away.py changed the working directory"
    with pytest.raises(PerlError, match=problem):
        find("moves_away.py:f", {})


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_that_seeds_torch_leaves_the_sampling_alone(is_async: bool, render: Renderer) -> None:
    """Otherwise all steps would sample with the same random numbers."""

    def seeds(completions: Any) -> list[float]:
        torch.manual_seed(0)
        return [1.0] * len(completions)

    async def waits(completions: Any) -> list[float]:
        return seeds(completions)

    state = torch.get_rng_state()
    Weighted({"seeds": FunctionReward(waits if is_async else seeds, "m:f", render)}, (1.0,))(*TWO)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_async_function_that_cancels_itself_is_an_error(render: Renderer) -> None:
    async def reward(completions: Any) -> list[float]:
        raise asyncio.CancelledError

    with pytest.raises(PerlError, match="cancelled its own task"):
        FunctionReward(reward, "m:f", render)(*TWO)

"""A policy compared with its anchor, on cases worked out by hand."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from perlcli.training import evaluation, sampling
from perlcli.training.evaluation import Samples

QUALITY = {"mean_reward", "gold", "gold_low", "gold_high"}
WRITTEN = {"prompts", "mean_length", "share_truncated", "distinct_1", "distinct_2"}
COMPARED = {"wins", "wins_low", "wins_high", "share_ties"} | {f"anchor_{name}" for name in QUALITY}


def test_divergence_is_estimated_on_the_written_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two completions of two tokens and one; the log ratios are 1, -1 and 0.5."""
    tables = {"policy": [[-1.0, -2.0], [-0.5]], "anchor": [[-2.0, -1.0], [-1.0]]}
    monkeypatch.setattr(sampling, "log_probs", lambda model, prompts, written, heat: tables[model])
    settings = SimpleNamespace(
        eval=SimpleNamespace(per_device_eval_batch_size=2), sampling=SimpleNamespace(temperature=0.7)
    )
    prepared: Any = SimpleNamespace(settings=settings)
    found = evaluation.divergence(prepared, "policy", lambda: nullcontext("anchor"), [[1], [1]], [[5, 6], [7]])
    k3 = sum(math.exp(-gap) - 1 + gap for gap in (1.0, -1.0, 0.5))
    assert found == pytest.approx(
        {
            "kl_k1_per_token": 0.5 / 3,
            "kl_k1_per_sequence": 0.25,
            "kl_k3_per_token": k3 / 3,
            "kl_k3_per_sequence": k3 / 2,
        }
    )


def test_metrics_of_a_case_worked_out_by_hand() -> None:
    mine = Samples(
        [[5, 6, 2], [5, 5], [7, 8, 9], [4, 2]], ["a", "b", "c", "d"], [1.0, 2.0, 3.0, 4.0], [True] * 3 + [False]
    )
    theirs = Samples([[5], [6], [7], [8]], list("wxyz"), [0.0, 2.0, 4.0, 3.0], [True, False, False, False])
    prepared: Any = SimpleNamespace(renderer=SimpleNamespace(ended=lambda ids: ids[-1] == 2))
    found = evaluation.measure(prepared, mine, theirs)
    assert set(found) == QUALITY | WRITTEN | COMPARED
    wanted = {
        "prompts": 4,
        "mean_reward": 2.5,
        "anchor_mean_reward": 2.25,
        "gold": 0.75,
        "anchor_gold": 0.25,
        "wins": 0.5,
        "share_ties": 0.25,
        "mean_length": 2.5,
        "share_truncated": 0.5,
        "distinct_1": 7 / 10,
        "distinct_2": 1.0,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["gold_low"] < 0.75 < found["gold_high"]
    assert found["wins_low"] < 0.5 < found["wins_high"]
    assert set(evaluation.measure(prepared, mine, None)) == QUALITY | WRITTEN

"""Records as text for a terminal."""

from typing import Any

import pytest

from perlcli.run.metrics import words
from perlcli.run.record import RunRecord
from perlcli.run.summary import figure, show, text


def record(**values: Any) -> RunRecord:
    return RunRecord(**{"settings": {"output": "runs/x"}, "elapsed_seconds": 61.6, "peak_memory_mb": 1234.5, **values})


def test_a_record_is_its_figures_then_the_cost_then_the_folder() -> None:
    found = text(
        record(
            metrics={"accuracy": 0.9, "mean_margin": 1.23456, "rows": 2000},
            steps=60,
            tokens=12345,
            trainable_parameters=50,
            total_parameters=1000,
        )
    )
    assert found.splitlines() == [
        "accuracy: 90.0%",
        "mean margin: 1.235",
        "rows: 2,000",
        "60 steps · 12,345 tokens · 62 s · peak memory 1.23 GB · trained 50 of 1,000 parameters (5.00%)",
        "Saved in runs/x",
    ]


def test_a_run_that_trains_nothing_has_no_steps_to_tell() -> None:
    assert text(record()).splitlines() == ["62 s · peak memory 1.23 GB", "Saved in runs/x"]


def test_an_interval_stands_beside_its_figure() -> None:
    metrics = {"accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.94, "auc": None}
    assert text(record(metrics=metrics)).splitlines()[0] == "accuracy: 90.0% (95 % interval 85.0% to 94.0%)"
    assert len(text(record(metrics=metrics)).splitlines()) == 3


def test_half_an_interval_is_left_out() -> None:
    assert text(record(metrics={"gold": 0.5, "gold_low": 0.4})).splitlines()[0] == "gold: 50.0%"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("accuracy", 1.0, "100.0%"),
        ("share_truncated", 0.125, "12.5%"),
        ("distinct_2", 0.5, "50.0%"),
        ("wins", 0.25, "25.0%"),
        ("anchor_gold", 0.0, "0.0%"),
        ("mean_reward", -1.23456, "-1.235"),
        ("reload_shift", 1.2e-7, "1.2e-07"),
        ("kl_k1_per_token", 0.0, "0"),
        ("prompts", 1200, "1,200"),
        ("kind", "pairs", "pairs"),
        ("wins", (0.5, 0.25, 0.75), "50.0% (95 % interval 25.0% to 75.0%)"),
    ],
)
def test_a_figure_is_told_as_a_person_reads_it(key: str, value: Any, expected: str) -> None:
    assert figure(key, value) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("mean_margin", "mean margin"),
        ("kl_k1_per_token", "KL k1 per token"),
        ("auc", "AUC"),
        ("share_truncated", "share truncated"),
    ],
)
def test_a_metric_has_a_name_in_words(key: str, expected: str) -> None:
    assert words(key) == expected


def test_a_dry_run_prints_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    show(None)
    assert capsys.readouterr().out == ""
    show(record())
    assert capsys.readouterr().out.endswith("Saved in runs/x\n")

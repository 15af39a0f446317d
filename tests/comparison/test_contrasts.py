"""Arms compared with their baseline: ratios, what may be chance, what else the runs differ in."""

import math
from typing import Any

import pytest

from perlcli.comparison import contrasts
from perlcli.comparison.results import ArmResult, Spread
from perlcli.run.record import RunRecord


def share(value: float, rows: int = 100, spread: float = 0.1) -> dict[str, Any]:
    return {"accuracy": value, "accuracy_low": value - spread, "accuracy_high": value + spread, "rows": rows}


@pytest.mark.parametrize(
    ("ratios", "speed", "told"),
    [
        ({"speed": 2.35, "cpu_speed": 1.6}, 1.6, "2.35x by the clock"),
        ({"speed": 1.0, "cpu_speed": 1.2}, 1.2, "1.00x by the clock"),
        ({"speed": 1.6, "cpu_speed": 1.55}, 1.6, ""),
        ({"speed": 1.6}, 1.6, ""),
        ({}, None, ""),
    ],
)
def test_on_a_shared_machine_the_processors_tell_the_speed(
    ratios: dict[str, float], speed: float | None, told: str, arm_of: Any
) -> None:
    arm = arm_of()
    arm.ratios = ratios
    assert contrasts.speed_of(arm) == speed
    assert [told in words for words in contrasts.disturbance(arm)] == ([True] if told else [])
    arm.reserved_mb = Spread(1, 1, 1)  # a GPU: processors only wait for it
    assert contrasts.speed_of(arm) == ratios.get("speed") and contrasts.disturbance(arm) == []


def test_ratios_are_to_the_baseline_of_the_same_model(arm_of: Any) -> None:
    full = arm_of("full", 2.0, memory_mb=1000.0, trainable_parameters=10_000, weights_bytes=40_000)
    other = arm_of("full", 8.0, of_arm={"model": "org/large"})
    found = contrasts.compare("reward", [arm_of(), other, full, arm_of(of_arm={"model": "org/large"})])
    assert [(arm.model, arm.name) for arm in found.arms] == [
        ("org/base", "full"),
        ("org/base", "lora r=16"),
        ("org/large", "full"),
        ("org/large", "lora r=16"),
    ]
    ratios = found.arms[1].ratios
    assert (ratios["memory"], ratios["speed"], ratios["cpu_speed"], ratios["tokens_per_second"]) == (0.5, 2, 2, 2)
    assert (ratios["trainable"], ratios["weights"], ratios["optimizer"]) == (0.01, 0.1, 1)
    assert found.arms[3].ratios["speed"] == 8
    assert found.arms[0].ratios == {}
    assert "reserved" not in ratios


def test_speed_is_held_against_the_same_steps_of_the_same_seed(arm_of: Any) -> None:
    full, lora = arm_of("full", seeds=(0, 1)), arm_of(seeds=(1, 2))
    full.runs[1].step_seconds, lora.runs[0].step_seconds = [4.0, 90.0, 6.0, 1.0], [2.0, 3.0, 3.0]
    assert contrasts.ratios(lora, full)["speed"] == 2  # of 2, 30 and 2
    lora.runs[0].seed = 9
    assert "speed" not in contrasts.ratios(lora, full)


def test_a_baseline_that_failed_gives_no_ratios(arm_of: Any) -> None:
    found = contrasts.compare("reward", [arm_of("full", status="out of memory"), arm_of()])
    assert found.arms[1].ratios == {}
    assert found.arms[1].memory_mb


def test_a_difference_within_the_noise_of_its_rows_may_be_chance(arm_of: Any) -> None:
    def compared(ours: float, rows: int) -> ArmResult:
        arms = [arm_of("full", metrics=share(0.78, rows)), arm_of(metrics=share(ours, rows))]
        return contrasts.compare("reward", arms).arms[1]

    near = compared(0.80, 500)
    noise = 1.96 * math.sqrt((0.78 * 0.22 + 0.8 * 0.2) / 500) * 100
    assert near.remarks == [f"accuracy: +2.0 points, within the ±{noise:.1f} that chance allows on 500 rows"]
    assert near.may_be_chance
    assert not compared(0.80, 50_000).remarks and not compared(0.80, 50_000).may_be_chance
    assert not compared(0.95, 500).may_be_chance


@pytest.mark.parametrize(
    ("ours", "chance"), [((0.70, 0.74), True), ((0.80, 0.82), False), ((0.79,), False), ((0.73,), True)]
)
def test_seeds_that_overlap_may_be_chance(ours: tuple[float, ...], chance: bool, arm_of: Any) -> None:
    full, lora = arm_of("full", seeds=(0, 1)), arm_of(seeds=tuple(range(len(ours))))
    for run, value in zip([*full.runs, *lora.runs], (0.72, 0.76, *ours), strict=True):
        run.metrics = share(value, spread=0.02)
    arm = contrasts.compare("reward", [full, lora]).arms[1]
    assert arm.may_be_chance is chance
    assert arm.remarks == (
        ["accuracy: the ranges of both arms overlap, so the difference may be chance"] if chance else []
    )


def test_one_seed_without_an_interval_may_be_chance_and_no_common_figure_says_nothing(arm_of: Any) -> None:
    full = arm_of("full", metrics={"eval_loss": 1.0})
    assert contrasts.compare("sft", [full, arm_of(metrics={"eval_loss": 2.0})]).arms[1].remarks == [
        "eval loss: only one seed, so the difference may be chance"
    ]
    assert contrasts.compare("sft", [full, arm_of(metrics={"train_loss": 2.0})]).arms[1].remarks == []


def test_one_learning_rate_for_full_tuning_and_adapters_is_warned_of(arm_of: Any) -> None:
    full, lora, dora = arm_of("full"), arm_of(of_arm={"learning_rate": 1e-5}), arm_of("dora")
    (warning,) = contrasts.compare("reward", [full, lora, dora]).warnings
    assert warning.startswith("lora r=16 and full tuning have the same learning rate, 1e-05:")
    assert contrasts.compare("reward", [full, dora], ["given"]).warnings == ["given"]


def test_the_paper_has_ratios_for_reward_and_rl_alone() -> None:
    assert contrasts.paper("reward")["memory"] == {
        "Harmless": 0.431,
        "SHP": 0.48,
        "TL;DR": 0.5,
        "UI": 0.56,
        "VQA": 0.74,
    }
    assert contrasts.paper("rl")["speed"]["BOLT"] == 1.05
    assert contrasts.paper("sft") == contrasts.paper("eval") == {}


def test_differences_are_told_once_with_the_runs_that_have_each_value() -> None:
    def record(**values: Any) -> RunRecord:
        return RunRecord(
            settings={"seed": 0, "lora_r": 8, "max_length": 128, **values},
            versions={"torch": "2.13"},
            trl_settings={"seed": 0, "warmup_steps": values.get("warm", 0)},
            device={"name": "CPU", "threads": 1},
            data={"train": {"fingerprint": "a", "kept": values.get("kept", 3), "tokens": {"p50": 2}}},
        )

    same = {"a": record(), "b": record(lora_r=16, seed=1)}
    assert contrasts.differences(same, {"lora_r", "seed"}) == []
    runs = same | {"c": record(max_length=64, kept=2)}
    assert contrasts.differences(runs, {"lora_r", "seed", "kept"}) == [
        "The runs were trained on different rows: 3 rows in a, b; 2 rows in c",
        "The runs differ in max_length: 128 in a, b; 64 in c",
    ]
    runs["c"] = record(kept=2)
    runs["c"].versions = {"torch": "2.14"}
    assert contrasts.differences(runs, {"lora_r", "seed", "max_length"}) == [
        "The runs were trained on different rows: 3 rows in a, b; 2 rows in c",
        "The runs differ in version.torch: 2.13 in a, b; 2.14 in c",
        "The runs differ in kept: not set in a, b; 2 in c",
    ]
    (told,) = contrasts.differences({"a": RunRecord(settings={"x": "y" * 99}), "b": RunRecord()}, ())
    assert told == f"The runs differ in x: {'y' * 59}… in a; not set in b"

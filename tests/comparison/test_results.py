"""What runs tell of cost and quality: read, summed up over runs, held against each other, kept as JSON."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from perlcli.comparison import results
from perlcli.comparison.results import Arm, Comparison, Report, RunFigures, Spread
from perlcli.errors import PerlError
from perlcli.run.files import METRICS, RECORD
from perlcli.run.metrics import STEP, STEP_CPU
from perlcli.run.record import RunRecord


def write_run(folder: Path, steps: int = 5, **values: Any) -> Path:
    """A run's folder with a record and metrics: step n takes n seconds and 10 n tokens."""
    folder.mkdir()
    record = RunRecord(**{"command": "reward", "status": "finished", "seed": 3, "steps": steps, **values})
    (folder / RECORD).write_text(json.dumps(dataclasses.asdict(record)))
    rows = [
        {"step": n, STEP: float(n), STEP_CPU: n / 2, "num_tokens": 10 * sum(range(n + 1))} for n in range(1, steps + 1)
    ]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def share(value: float, rows: int = 100, spread: float = 0.1) -> dict[str, Any]:
    return {"accuracy": value, "accuracy_low": value - spread, "accuracy_high": value + spread, "rows": rows}


def test_a_run_tells_its_steps_after_the_warm_up(tmp_path: Path) -> None:
    values = {"memory": {"training_mb": 7.0, "reserved_mb": 8.0}, "files": {"weights": 1, "optimizer": 2}}
    found = results.of_run(write_run(tmp_path / "run", metrics={"accuracy": 0.5, "seconds_anchor": 2.0}, **values))
    assert (found.step_seconds, found.step_cpu_seconds, found.step_tokens) == ([3, 4, 5], [1.5, 2, 2.5], [30, 40, 50])
    assert (found.seed, found.steps, found.status, found.folder) == (3, 5, "finished", str(tmp_path / "run"))
    assert (found.memory_mb, found.reserved_mb, found.weights_bytes, found.optimizer_bytes) == (7, 8, 1, 2)
    assert found.phases == {"anchor": 2.0}
    assert found.command == f"perl reward --config {tmp_path}/run/settings.yaml"


@pytest.mark.parametrize(("steps", "kept"), [(0, []), (1, [1]), (2, [2]), (3, [3])])
def test_of_a_short_run_the_last_step_counts(steps: int, kept: list[int], tmp_path: Path) -> None:
    assert results.of_run(write_run(tmp_path / "run", steps)).step_seconds == kept


def test_the_name_and_command_of_a_run_can_be_given(tmp_path: Path) -> None:
    found = results.of_run(write_run(tmp_path / "run"), "perl reward -o x", shown="x", repeat=2)
    assert (found.folder, found.command, found.repeat) == ("x", "perl reward -o x", 2)


def test_a_run_without_metrics_or_with_half_a_line_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 6}\n[1]\n{"step": 7, "seconds/st')
    assert results.of_run(folder).step_seconds == [3, 4, 5]
    (folder / METRICS).unlink()
    assert results.of_run(folder).step_seconds == []
    with pytest.raises(PerlError, match="not the folder of a run"):
        results.of_run(tmp_path)


@pytest.mark.parametrize(
    ("status", "failure", "words"),
    [
        ("finished", None, "finished"),
        ("failed", "OutOfMemoryError: CUDA", "out of memory"),
        ("failed", "RuntimeError: CUDA out of memory.", "out of memory"),
        ("failed", "loss is no number", "failed"),
        ("interrupted", None, "interrupted"),
    ],
)
def test_how_a_run_ended(status: Any, failure: str | None, words: str) -> None:
    assert results.outcome(RunRecord(status=status, failure=failure)) == words


def test_an_arm_sums_up_its_runs(arm_of: Any) -> None:
    arm = results.summarise(arm_of(seeds=(0, 1), metrics=share(0.7)), "reward")
    arm.runs[1].memory_mb, arm.runs[1].metrics = 700.0, share(0.8)
    arm = results.summarise(arm, "reward")
    assert arm.memory_mb == Spread(600, 500, 700, 2)
    assert arm.steps_per_second == Spread(0.75, 0.5, 1.0, 4)
    assert arm.tokens_per_second == Spread(37.5, 25, 50, 4)
    assert arm.quality == {"accuracy": Spread(0.75, 0.7, 0.8, 2)}
    assert (arm.trainable_parameters, arm.total_parameters) == (100, 10_000)
    assert arm.reserved_mb is None


def test_one_run_has_its_own_interval_and_repeats_are_not_seeds(arm_of: Any) -> None:
    arm = results.summarise(arm_of(metrics=share(0.7)), "reward")
    assert arm.quality["accuracy"] == Spread(0.7, pytest.approx(0.6), pytest.approx(0.8), 100)
    again = dataclasses.replace(arm.runs[0], repeat=2, metrics=share(0.1))
    assert (
        results.summarise(dataclasses.replace(arm, runs=[*arm.runs, again]), "reward").quality["accuracy"].value == 0.7
    )


@pytest.mark.parametrize(
    ("values", "failure"),
    [
        ({"status": "out of memory", "memory_mb": 79_200.0}, "out of memory at 79.2 GB"),
        ({"status": "out of memory", "memory_mb": None}, "out of memory"),
        ({"status": "failed", "failure": "the disk is full"}, "failed: the disk is full"),
        ({"status": "interrupted"}, "interrupted"),
    ],
)
def test_an_arm_without_a_finished_run_says_why(values: dict[str, Any], failure: str, arm_of: Any) -> None:
    arm = results.summarise(arm_of(**values), "reward")
    assert (arm.failure, arm.memory_mb) == (failure, None)


def test_an_arm_that_was_not_run_says_so_and_one_that_lacks_runs_remarks_it(arm_of: Any) -> None:
    assert results.summarise(Arm("lora", "m", "lora", "float32"), "reward").failure == "not run yet"
    arm = arm_of(seeds=(0, 1, 2))
    arm.runs[1].status = "out of memory"
    assert results.summarise(arm, "reward").remarks == ["1 of 3 runs have no figures: out of memory at 0.5 GB"]
    assert arm.failure is None


@pytest.mark.parametrize(
    ("ratios", "speed", "told"),
    [
        ({"speed": 2.35, "cpu_speed": 1.6}, 1.6, "by the clock 2.35x"),
        ({"speed": 1.0, "cpu_speed": 1.2}, 1.2, "by the clock 1.00x"),
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
    assert results.speed_of(arm) == speed
    assert [told in words for words in results.beside(arm)] == [True] * bool(told)
    arm.reserved_mb = Spread(1, 1, 1)  # a GPU: processors only wait for it
    assert results.speed_of(arm) == ratios.get("speed") and results.beside(arm) == []


def test_figures_over_runs() -> None:
    assert results.over_runs([None, 1.0, 3.0]) == Spread(2, 1, 3, 2)
    assert results.over_runs([None]) is None


def test_ratios_are_to_the_baseline_of_the_same_model(arm_of: Any) -> None:
    full = arm_of("full", 2.0, memory_mb=1000.0, trainable_parameters=10_000, weights_bytes=40_000)
    other = arm_of("full", 8.0, of_arm={"model": "org/large"})
    found = results.compare("reward", [arm_of(), other, full, arm_of(of_arm={"model": "org/large"})])
    assert [(arm.model, arm.name) for arm in found.arms] == [
        ("org/base", "full"), ("org/base", "lora r=16"), ("org/large", "full"), ("org/large", "lora r=16"),
    ]  # fmt: skip
    ratios = found.arms[1].ratios
    assert (ratios["memory"], ratios["speed"], ratios["cpu_speed"], ratios["tokens_per_second"]) == (0.5, 2, 2, 2)
    assert (ratios["trainable"], ratios["weights"], ratios["optimizer"]) == (0.01, 0.1, 1)
    assert found.arms[3].ratios["speed"] == 8
    assert found.arms[0].ratios == {}
    assert "reserved" not in ratios


def test_speed_is_held_against_the_same_steps_of_the_same_seed(arm_of: Any) -> None:
    full, lora = arm_of("full", seeds=(0, 1)), arm_of(seeds=(1, 2))
    full.runs[1].step_seconds, lora.runs[0].step_seconds = [4.0, 90.0, 6.0, 1.0], [2.0, 3.0, 3.0]
    assert results.ratios(lora, full)["speed"] == 2  # of 2, 30 and 2
    lora.runs[0].seed = 9
    assert "speed" not in results.ratios(lora, full)


def test_a_baseline_that_failed_gives_no_ratios(arm_of: Any) -> None:
    found = results.compare("reward", [arm_of("full", status="out of memory"), arm_of()])
    assert found.arms[1].ratios == {}
    assert found.arms[1].memory_mb


def test_a_difference_within_the_noise_of_its_rows_may_be_chance(arm_of: Any) -> None:
    def compared(ours: float, rows: int) -> Arm:
        arms = [arm_of("full", metrics=share(0.78, rows)), arm_of(metrics=share(ours, rows))]
        return results.compare("reward", arms).arms[1]

    near = compared(0.80, 500)
    noise = 1.96 * math.sqrt((0.78 * 0.22 + 0.8 * 0.2) / 500) * 100
    assert near.remarks == [f"accuracy: +2.0 points, within the ±{noise:.1f} that 500 rows leave to chance"]
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
    arm = results.compare("reward", [full, lora]).arms[1]
    assert arm.may_be_chance is chance
    assert arm.remarks == (
        ["accuracy: the ranges of both arms overlap, so the difference may be chance"] if chance else []
    )


def test_one_seed_without_an_interval_may_be_chance_and_no_common_figure_says_nothing(arm_of: Any) -> None:
    full = arm_of("full", metrics={"eval_loss": 1.0})
    assert results.compare("sft", [full, arm_of(metrics={"eval_loss": 2.0})]).arms[1].remarks == [
        "eval loss: one seed, so the difference may be chance"
    ]
    assert results.compare("sft", [full, arm_of(metrics={"train_loss": 2.0})]).arms[1].remarks == []


def test_one_learning_rate_for_full_tuning_and_adapters_is_warned_of(arm_of: Any) -> None:
    full, lora, dora = arm_of("full"), arm_of(of_arm={"learning_rate": 1e-5}), arm_of("dora")
    (warning,) = results.compare("reward", [full, lora, dora]).warnings
    assert warning.startswith("The learning rate of lora r=16 is that of full tuning, 1e-05:")
    assert results.compare("reward", [full, dora], ["given"]).warnings == ["given"]


def test_the_paper_has_ratios_for_reward_and_rl_alone() -> None:
    assert results.paper("reward")["memory"] == {"Harmless": 0.431, "SHP": 0.48, "TL;DR": 0.5, "UI": 0.56, "VQA": 0.74}
    assert results.paper("rl")["speed"]["BOLT"] == 1.05
    assert results.paper("sft") == results.paper("eval") == {}


def test_differences_are_told_once_with_the_runs_that_have_each_value() -> None:
    def record(**values: Any) -> RunRecord:
        return RunRecord(
            settings={"seed": 0, "lora_r": 8, "max_length": 128, **values}, versions={"torch": "2.13"},
            trl_settings={"seed": 0, "warmup_steps": values.get("warm", 0)}, device={"name": "CPU", "threads": 1},
            data={"train": {"fingerprint": "a", "kept": values.get("kept", 3), "tokens": {"p50": 2}}},
        )  # fmt: skip

    same = {"a": record(), "b": record(lora_r=16, seed=1)}
    assert results.differences(same, {"lora_r", "seed"}) == []
    runs = same | {"c": record(max_length=64, kept=2)}
    assert results.differences(runs, {"lora_r", "seed", "kept"}) == [
        "The runs differ in max_length: 128 in a, b; 64 in c"
    ]
    runs["c"] = record(kept=2)
    runs["c"].versions = {"torch": "2.14"}
    assert results.differences(runs, {"lora_r", "seed", "max_length"}) == [
        "The runs differ in train data.kept: 3 in a, b; 2 in c",
        "The runs differ in version.torch: 2.13 in a, b; 2.14 in c",
        "The runs differ in kept: not set in a, b; 2 in c",
    ]
    (told,) = results.differences({"a": RunRecord(settings={"x": "y" * 99}), "b": RunRecord()}, ())
    assert told == f"The runs differ in x: {'y' * 59}… in a; not set in b"


def test_a_report_is_read_as_it_was_written(tmp_path: Path, arm_of: Any) -> None:
    arms = [
        arm_of("full", metrics=share(0.5)),
        arm_of(metrics=share(0.6), phases={"anchor": 1.0}),
        arm_of("x", seeds=()),
    ]
    report = Report(title="<t>", comparisons=[results.compare("reward", arms, ["w"])], device={"threads": 2})
    path = tmp_path / "report.json"
    path.write_text(results.write(report), encoding="utf-8")
    assert results.read(path) == report


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Can't read"),
        ("[]", "has schema version None"),
        ('{"schema_version": 99}', "has schema version 99"),
        ('{"schema_version": 1, "surprise": 1}', "is not a report of perlcli"),
        ('{"schema_version": 1, "comparisons": [1]}', "is not a report of perlcli"),
        ('{"schema_version": 1, "comparisons": null}', "is not a report of perlcli"),
        ('{"schema_version": 1, "comparisons": [{"stage": 5}]}', "5 where str is expected"),
        ('{"schema_version": 1, "elapsed_seconds": "long"}', "'long' where float is expected"),
    ],
)
def test_what_is_no_report_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(PerlError, match=problem) as caught:
        results.read(path)
    assert str(path) in caught.value.problem


def test_a_missing_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(PerlError, match="Can't read"):
        results.read(tmp_path / "report.json")


def test_the_schema_documents_every_field() -> None:
    tables = results.schema_tables()
    for kind in (Report, Comparison, Arm, RunFigures):
        assert f"**{kind.__name__}.**" in tables
        assert all(
            item.metadata["help"].endswith(".") and f"| `{item.name}` |" in tables for item in dataclasses.fields(kind)
        )


def test_steps_of_other_types_are_left_out(tmp_path: Path) -> None:
    step = {STEP: 1.0, STEP_CPU: 1.0, "num_tokens": 5}
    odd = [{STEP: "x"}, {STEP_CPU: float("inf")}, {"num_tokens": []}]
    rows = [step, *({**step, **change} for change in odd), {**step, "num_tokens": 9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["tokens"] for row in results._steps(tmp_path / "metrics.jsonl")] == [5, 4]

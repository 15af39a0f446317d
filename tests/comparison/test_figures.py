"""The figures of a run, read from its folder, and of an arm over its runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from perlcli.comparison import figures
from perlcli.comparison.results import ArmResult, Spread
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
    found = figures.of_run(write_run(tmp_path / "run", metrics={"accuracy": 0.5, "seconds_anchor": 2.0}, **values))
    assert (found.step_seconds, found.step_cpu_seconds, found.step_tokens) == ([3, 4, 5], [1.5, 2, 2.5], [30, 40, 50])
    assert (found.seed, found.steps, found.status, found.folder) == (3, 5, "finished", str(tmp_path / "run"))
    assert (found.memory_mb, found.reserved_mb, found.weights_bytes, found.optimizer_bytes) == (7, 8, 1, 2)
    assert found.phases == {"anchor": 2.0}
    assert found.command == f"perl reward --config {tmp_path}/run/settings.yaml"


@pytest.mark.parametrize(("steps", "kept"), [(0, []), (1, [1]), (2, [2]), (3, [3])])
def test_of_a_short_run_the_last_step_counts(steps: int, kept: list[int], tmp_path: Path) -> None:
    assert figures.of_run(write_run(tmp_path / "run", steps)).step_seconds == kept


def test_the_name_and_command_of_a_run_can_be_given(tmp_path: Path) -> None:
    found = figures.of_run(write_run(tmp_path / "run"), "perl reward -o x", shown="x", repeat=2)
    assert (found.folder, found.command, found.repeat) == ("x", "perl reward -o x", 2)


def test_a_run_without_metrics_or_with_half_a_line_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 6}\n[1]\n{"step": 7, "seconds/st')
    assert figures.of_run(folder).step_seconds == [3, 4, 5]
    (folder / METRICS).unlink()
    assert figures.of_run(folder).step_seconds == []
    with pytest.raises(PerlError, match="not the folder of a run"):
        figures.of_run(tmp_path)


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
    assert figures.outcome(RunRecord(status=status, failure=failure)) == words


def test_an_arm_sums_up_its_runs(arm_of: Any) -> None:
    arm = figures.summarise(arm_of(seeds=(0, 1), metrics=share(0.7)), "reward")
    arm.runs[1].memory_mb, arm.runs[1].metrics = 700.0, share(0.8)
    arm = figures.summarise(arm, "reward")
    assert arm.memory_mb == Spread(600, 500, 700, 2)
    assert arm.steps_per_second == Spread(0.75, 0.5, 1.0, 4)
    assert arm.tokens_per_second == Spread(37.5, 25, 50, 4)
    assert arm.quality == {"accuracy": Spread(0.75, 0.7, 0.8, 2)}
    assert (arm.trainable_parameters, arm.total_parameters) == (100, 10_000)
    assert arm.reserved_mb is None


def test_one_run_has_its_own_interval_and_repeats_are_not_seeds(arm_of: Any) -> None:
    arm = figures.summarise(arm_of(metrics=share(0.7)), "reward")
    assert arm.quality["accuracy"] == Spread(0.7, pytest.approx(0.6), pytest.approx(0.8), 100)
    again = dataclasses.replace(arm.runs[0], repeat=2, metrics=share(0.1))
    assert (
        figures.summarise(dataclasses.replace(arm, runs=[*arm.runs, again]), "reward").quality["accuracy"].value == 0.7
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
    arm = figures.summarise(arm_of(**values), "reward")
    assert (arm.failure, arm.memory_mb) == (failure, None)


def test_an_arm_that_was_not_run_says_so_and_one_that_lacks_runs_remarks_it(arm_of: Any) -> None:
    assert figures.summarise(ArmResult("lora", "m", "lora", "float32"), "reward").failure == "not run yet"
    arm = arm_of(seeds=(0, 1, 2))
    arm.runs[1].status = "out of memory"
    assert figures.summarise(arm, "reward").remarks == ["1 of 3 runs have no figures: out of memory at 0.5 GB"]
    assert arm.failure is None


def test_figures_over_runs() -> None:
    assert figures.over_runs([None, 1.0, 3.0]) == Spread(2, 1, 3, 2)
    assert figures.over_runs([None]) is None


def test_steps_of_other_types_are_left_out(tmp_path: Path) -> None:
    step = {STEP: 1.0, STEP_CPU: 1.0, "num_tokens": 5}
    odd = [{STEP: "x"}, {STEP_CPU: float("inf")}, {"num_tokens": []}]
    rows = [step, *({**step, **change} for change in odd), {**step, "num_tokens": 9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["tokens"] for row in figures._steps(tmp_path / "metrics.jsonl")] == [5, 4]

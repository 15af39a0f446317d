"""A report as JSON and back, and its documented schema."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from perlcli.comparison import contrasts, results
from perlcli.comparison.results import ArmResult, Comparison, Report, RunFigures
from perlcli.errors import PerlError


def test_a_report_is_read_as_it_was_written(tmp_path: Path, arm_of: Any) -> None:
    arms = [
        arm_of("full", metrics={"accuracy": 0.5}),
        arm_of(metrics={"accuracy": 0.6}, phases={"anchor": 1.0}),
        arm_of("x", seeds=()),
    ]
    report = Report(title="<t>", comparisons=[contrasts.compare("reward", arms, ["w"])], device={"threads": 2})
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
        ('{"schema_version": 1, "comparisons": [{"stage": 5}]}', "expected str, got 5"),
        ('{"schema_version": 1, "elapsed_seconds": "long"}', "expected float, got 'long'"),
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
    for kind in (Report, Comparison, ArmResult, RunFigures):
        assert f"**{kind.__name__}.**" in tables
        assert all(
            item.metadata["help"].endswith(".") and f"| `{item.name}` |" in tables for item in dataclasses.fields(kind)
        )


def test_a_report_of_the_first_schema_is_read_and_written_in_this_one(tmp_path: Path) -> None:
    run = {"folder": "a", "command": "perl sft", "status": "finished"}
    arm = {"name": "lora", "model": "m", "kind": "lora", "precision": "float32", "runs": [run]}
    old = {"schema_version": 1, "comparisons": [{"stage": "sft", "arms": [arm]}]}
    (tmp_path / "report.json").write_text(json.dumps(old))
    found = results.read(tmp_path / "report.json")
    assert found.comparisons[0].arms[0].runs[0].setup == {} and found.pipeline == []
    assert json.loads(results.write(found))["schema_version"] == results.SCHEMA_VERSION

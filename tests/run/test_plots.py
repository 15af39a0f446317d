"""Pictures: every stage's curves, scores and shares become a PNG file, however short or flat the run was."""

import json
from pathlib import Path
from typing import Any

import pytest

from perlcli.run import plots
from perlcli.run.metrics import panels
from perlcli.run.plots import bars, curves, histogram

pytestmark = pytest.mark.draws

DRAWN = ("sft", "reward", "rl")


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 2000


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, to look inside."""
    figures: list[Any] = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, target: (figures.append(figure), save(figure, target)))
    return figures


@pytest.mark.parametrize(("stage", "steps"), [*((stage, 1) for stage in DRAWN), ("rl", 30)])
def test_a_stage_draws_a_panel_for_each_of_its_metrics(
    stage: str, steps: int, tmp_path: Path, drawn: list[Any]
) -> None:
    rows = [{"step": step, **{metric.key: step / 10 for metric in panels(stage)}} for step in range(1, steps + 1)]
    curves(stage, write_metrics(tmp_path, rows), tmp_path / "plots" / "training.png")
    assert is_png(tmp_path / "plots" / "training.png")
    shown = [axis for axis in drawn[0].axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [metric.panel for metric in panels(stage)]
    assert [len(axis.lines[0].get_xdata()) for axis in shown] == [steps] * len(panels(stage))


@pytest.mark.slow
def test_shares_are_told_in_per_cent_and_the_rest_as_they_are(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"step": 1, **{metric.key: 0.5 for stage in DRAWN for metric in panels(stage)}}]
    for stage in DRAWN:
        curves(stage, write_metrics(tmp_path, rows), tmp_path / "x.png")
    labels = {axis.get_title(): axis.yaxis.get_major_formatter()(0.5, 0) for figure in drawn for axis in figure.axes}
    shares = {title for title, label in labels.items() if label == "50%"}
    assert shares == {"token accuracy", "accuracy on the batch", "gold success"}


def test_a_metric_that_a_run_has_not_is_left_out(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"step": 1, "reward": 0.5, "kl": None}, {"step": 2, "reward": float("nan"), "other": 3}]
    curves("rl", write_metrics(tmp_path, rows), tmp_path / "x.png")
    assert [axis.get_title() for axis in drawn[0].axes] == ["reward"]


@pytest.mark.parametrize("rows", [[], [{"step": 1, "other": 2.0}]])
def test_a_run_without_metrics_draws_nothing(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    curves("sft", write_metrics(tmp_path, rows), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "groups",
    [
        {"chosen": [1.0, 2.0, 2.5], "rejected": [0.0, 1.0]},
        {"thumbs up": [3.0] * 5, "thumbs down": [3.0] * 2},
        {"policy": [0.0]},
        {"policy": [1e9, -1e9], "anchor": [1e-9], "other": [0.0]},
    ],
    ids=["two groups", "constant", "one value", "wide"],
)
def test_scores_become_a_histogram_with_every_row_in_it(
    groups: dict[str, list[float]], tmp_path: Path, drawn: list[Any]
) -> None:
    histogram(groups, "Scores", "score", tmp_path / "scores.png")
    assert is_png(tmp_path / "scores.png")
    (axis,) = drawn[0].axes
    assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == ("Scores", "score", "rows")
    assert sum(bar.get_height() for bar in axis.patches) == sum(map(len, groups.values()))
    assert [entry.get_text() for entry in axis.get_legend().get_texts()] == [
        f"{name} ({len(values)})" for name, values in groups.items()
    ]


@pytest.mark.parametrize("values", [(0.06, 0.46, 0.96), (0.0, 1.0)])
def test_shares_become_bars_with_their_figures(values: tuple[float, ...], tmp_path: Path, drawn: list[Any]) -> None:
    bars(("base", "SFT", "RL")[: len(values)], values, "Success", tmp_path / "success.png")
    assert is_png(tmp_path / "success.png")
    (axis,) = drawn[0].axes
    assert [bar.get_height() for bar in axis.patches] == list(values)
    assert [label.get_text() for label in axis.texts] == [f"{value:.1%}" for value in values]


def test_kinds_of_runs_are_compared_over_their_steps(tmp_path: Path, drawn: list[Any]) -> None:
    files = []
    for number, steps in enumerate((4, 2)):
        (tmp_path / str(number)).mkdir()
        rows = [{"step": 5 * step, "reward": number + step, "kl": None} for step in range(1, steps + 1)]
        files.append(write_metrics(tmp_path / str(number), rows))
    plots.compared({"a": files, "b": [tmp_path / "none.jsonl"]}, panels("rl"), tmp_path / "x.png")
    assert is_png(tmp_path / "x.png")
    (axis,) = drawn[0].axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] == [
        ([5, 10, 15, 20], [1, 2, 3, 4]), ([5, 10], [2, 3]), ([5, 10], [1.5, 2.5]),
    ]  # fmt: skip
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a"]
    plots.compared({"b": [tmp_path / "none.jsonl"]}, panels("rl"), tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()


def test_the_running_mean_is_over_a_tenth_of_the_run() -> None:
    assert plots.smooth([4.0]) == [4.0]
    assert plots.smooth([0.0, 1.0, 2.0]) == [0.0, 1.0, 2.0]
    assert plots.smooth([float(step) for step in range(20)])[:4] == [0.0, 0.5, 1.5, 2.5]

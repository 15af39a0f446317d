"""The progress line: plain and rare where there is no terminal, live where there is one."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from perlcli.run import progress
from perlcli.run.metrics import METRICS
from perlcli.run.progress import PLAIN_SECONDS, Progress, figures


class Clock:
    """A clock that stands until it is moved."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Make standard error a terminal; called in the test itself, because pytest puts its own back after the set-up."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


@pytest.mark.parametrize(
    ("stage", "logs", "expected"),
    [
        ("sft", {"loss": 0.4123, "mean_token_accuracy": 0.81}, "loss 0.412 · token accuracy 81.0%"),
        ("reward", {"loss": 0.5, "accuracy": 1.0, "grad_norm": 2.0}, "loss 0.500 · accuracy 100.0%"),
        (
            "rl",
            {"reward": -1.0, "kl": 0.01234, "completions/mean_length": 20, "completions/clipped_ratio": 0.25},
            "reward -1.000 · KL/token 0.0123 · length 20.0 · truncated 25.0%",
        ),
        ("rl", {"reward": 0.0, "kl": None}, "reward 0.000"),
        ("eval", {"loss": 1.0}, ""),
        ("sft", {}, ""),
    ],
)
def test_each_stage_shows_what_matters_to_it(stage: str, logs: dict[str, float], expected: str) -> None:
    assert figures(stage, logs) == expected


def test_a_line_tells_step_figures_elapsed_and_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sft", 10) as line:
        clock.now += 4
        line.update(2, {"loss": 0.5})
    assert capsys.readouterr().err == "sft 2/10 · loss 0.500 · 4 s, 32 s left\n"


def test_without_a_terminal_there_is_a_line_each_some_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("rl", 100) as line:
        for done in range(1, 101):
            line.update(done, {})
            clock.now += PLAIN_SECONDS / 4
    printed = capsys.readouterr()
    assert [int(re.findall(r"\d+", row)[0]) for row in printed.err.splitlines()] == [*range(1, 100, 4), 100]
    assert printed.out == ""


def test_the_first_and_the_last_update_are_shown_however_short_the_run(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("sft", 3) as line:
        for done in (1, 2, 3):
            line.update(done, {})
    assert [row.split()[1] for row in capsys.readouterr().err.splitlines()] == ["1/3", "3/3"]


def test_a_resumed_run_estimates_by_its_own_steps(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sft", 100) as line:
        clock.now += 5
        line.update(91, {})
    assert capsys.readouterr().err == "sft 91/100 · 5 s, 45 s left\n"


def test_an_evaluation_of_seconds_shows_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("eval", 64) as line:
        for done in (32, 64):
            clock.now += PLAIN_SECONDS / 3
            line.update(done, {})
    assert capsys.readouterr().err == ""


def test_a_longer_evaluation_shows_some_lines_and_its_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("eval", 96) as line:
        for done in (32, 64, 96):
            clock.now += PLAIN_SECONDS * (1 if done < 96 else 0.1)
            line.update(done, {})
    assert capsys.readouterr().err.splitlines() == [
        "eval 32/96 · 10 s, 20 s left",
        "eval 64/96 · 20 s, 10 s left",
        "eval 96/96 · 21 s, 0 s left",
    ]


@pytest.mark.parametrize("stage", METRICS)
def test_without_a_terminal_there_are_no_control_characters(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(stage, 2) as line:
        for done in (1, 2):
            line.update(done, {metric.key: 0.5 for metric in METRICS[stage] if metric.live})
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", capsys.readouterr().err)


def test_on_a_terminal_the_line_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    with Progress("reward", 4) as line:
        line.update(3, {"loss": 0.25})
    assert "\x1b[" in stream.getvalue()
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", stream.getvalue())
    assert "3/4" in plain
    assert "loss 0.250" in plain
    assert "reward 3/4" not in plain  # the plain line is for elsewhere


def test_a_terminal_shows_the_time_left_also_when_a_step_takes_minutes(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    stream = terminal(monkeypatch)
    with Progress("rl", 40) as line:
        assert line.left() is None
        for done in (1, 2, 3):
            clock.now += 300
            line.update(done, {})
    assert "185 min left" not in stream.getvalue() and "3 h 5 min left" in stream.getvalue()
    clock.now += 60
    assert line.left() == 37 * 300 - 60
    clock.now += 10**6
    assert line.left() == 0


def test_the_time_left_follows_the_last_steps(clock: Clock) -> None:
    line = Progress("sft", 100)
    for done in range(1, 31):
        clock.now += 60 if done <= 10 else 1
        line.update(done, {})
    assert line.left() == 70


def test_a_failure_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    with pytest.raises(ValueError, match="inside"), Progress("sft", 4):
        raise ValueError("inside")
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is shown again

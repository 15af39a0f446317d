"""`perl runs`: a table of all runs below a folder; running and killed ones differ, damaged records are reported."""

import dataclasses
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from perlcli.commands import runs
from perlcli.commands.runs import Row
from perlcli.run import liveness
from perlcli.run.files import METRICS, RECORD, write_json
from perlcli.run.record import SCHEMA_VERSION, RunRecord

Make = Callable[..., Path]
NOW = datetime(2026, 1, 2, 6, 0, 0, tzinfo=UTC).timestamp()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a run's folder below `runs`, by default of a finished reward model, with a step a line of metrics."""

    def run(name: str, hour: int = 3, rows: int = 0, **values: Any) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        record = RunRecord(**{
            "command": "reward", "status": "finished", "started": f"2026-01-02T{hour:02}:00:00+00:00", "steps": 40,
            "settings": {"max_steps": 40, "num_train_epochs": None}, "model": {"base": "org/base-1B"},
            "metrics": {"accuracy": 0.8, "auc": 0.9}, "process": liveness.mark(), **values,
        })  # fmt: skip
        write_json(folder / RECORD, dataclasses.asdict(record))
        if rows:
            lines = [
                json.dumps({"step": n, "loss": 1 / n, "accuracy": n / 100, "epoch": n / 50}) for n in range(1, rows + 1)
            ]
            (folder / METRICS).write_text("\n".join(lines) + "\n")
        return folder

    return run


@pytest.fixture
def top(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def listed(top: Path) -> list[tuple[str, int]]:
    return [(line.name, line.depth) for line in runs.arranged(runs.read(top, {}), top)]


def row(folder: Path) -> Row:
    return runs.row_of(folder, 0)


BEGUN: dict[str, Any] = {"status": "running", "steps": 0, "metrics": {}}
DEAD = {"pid": 2**22 + 1, "started": "x", "host": liveness.host()}  # above the most that Linux gives


def test_the_table_has_a_line_for_each_run_newest_last(make: Make, top: Path, perl: Any) -> None:
    make("late", hour=5)
    make("deep/er/early", hour=1, command="sft", metrics={"eval_loss": 1.25, "train_loss": 2.0})
    make("eval-late", hour=6, command="eval", steps=0, metrics={"gold": 0.5, "mean_reward": 3.0}, settings={})
    shown = runs.text(runs.read(top, {}), top, NOW, None).splitlines()
    assert [line.split("  ")[0] for line in shown[2:]] == ["deep/er/early", "late", "eval-late"]
    assert " ".join(shown[0].split()) == "run stage status model steps key figure age size"
    assert " ".join(shown[2].split()[1:12]).startswith("sft finished base-1B 40/40 eval loss 1.25 5 h")
    assert " ".join(shown[3].split()).startswith("late reward finished base-1B 40/40 accuracy 80.0% 60 min")
    assert " ".join(shown[4].split()).startswith("eval-late eval finished base-1B - gold 50.0% 0 s")
    assert perl("runs").output.count("\n") == len(shown)  # `runs` below this folder is the default


def test_runs_within_a_run_are_shown_beneath_it(make: Make, top: Path) -> None:
    make("other", hour=4)
    make("quickstart", hour=3, command="quickstart", metrics={"rl_gold": 0.9})
    make("quickstart/rl", hour=5)
    make("quickstart/sft", hour=4)
    make("all", hour=1, command="compare-full", metrics={})
    make("all/sft/lora-s0", hour=2)
    expected = [("all", 0), ("sft/lora-s0", 1), ("quickstart", 0), ("sft", 1), ("rl", 1), ("other", 0)]
    assert listed(top) == expected
    assert listed(top / "quickstart") == [("quickstart", 0), ("sft", 1), ("rl", 1)]
    assert listed(top / "other") == [("other", 0)]
    assert "  sft" in runs.text(runs.read(top, {}), top, NOW, None)
    whole = row(make("whole", command="compare-full", **BEGUN))  # its steps are those of each run within
    assert runs.steps_of(whole) == "-"
    assert row(top / "quickstart").metric == ("rl_gold", 0.9) and row(top / "all").metric is None


def test_checkpoints_hidden_folders_and_circles_are_left_out(make: Make, top: Path) -> None:
    make("a")
    for name in ("a/checkpoints/checkpoint-4", "a/checkpoint-4", ".hidden/b", "/".join("123456789")):
        make(name)
    (top / "a" / "circle").symlink_to(top)
    (top / "0-latest").symlink_to(top / "a")
    assert listed(top) == [("a", 0)]
    elsewhere = make("../elsewhere/c", hour=9)
    (top / "linked").symlink_to(elsewhere)
    assert listed(top) == [("a", 0), ("linked", 0)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_is_not_ours_to_read_is_left_out(make: Make, top: Path) -> None:
    make("a")
    make("locked/b")
    (top / "locked").chmod(0)
    try:
        assert listed(top) == [("a", 0)]
    finally:
        (top / "locked").chmod(0o755)


@pytest.mark.parametrize(
    ("process", "status"),
    [({}, "running"), (DEAD, "killed"), ({"started": "x"}, "killed"), ({"host": "other"}, "running?")],
)
def test_whether_a_running_record_is_killed_depends_on_its_process(
    make: Make, process: dict[str, Any], status: str
) -> None:  # a dead one, one whose number was given to another, and one of another machine
    found = row(make("a", rows=7, process=liveness.mark() | process, **BEGUN))
    assert (found.status, found.steps, found.total, found.metric) == (status, 7, 40, ("accuracy", 0.07))


def saved(folder: Path) -> Path:
    """The folder with a complete checkpoint, and an incomplete one behind it."""
    for step in (2, 4):
        (folder / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-2" / "manifest.json").write_text("{}")
    return folder


def test_a_killed_run_has_the_command_that_continues_it(make: Make, top: Path) -> None:
    saved(make("a b", process=DEAD, **BEGUN))
    make("merge", command="merge", process=DEAD, **BEGUN)
    make("far", process={"host": "other"}, **BEGUN)
    saved(make("bad", hour=6, status="failed", failure="no\nroom \x1b[2Jleft"))
    shown = runs.text(runs.read(top, {}), top, NOW, None)
    assert (
        f"killed: its process is gone; to continue: perl reward --config '{top}/a b/settings.yaml' --resume\n" in shown
    )
    assert f"{top}/merge: killed: its process is gone\n" in shown
    assert "running?: on another machine, so it may be running or not; last written 0 s ago\n" in shown
    resume = f"; to continue: perl reward --config {top}/bad/settings.yaml --resume"
    assert shown.endswith(f"failed: no room [2Jleft{resume}")


def test_a_run_that_ended_before_a_checkpoint_promises_no_resume(make: Make, top: Path) -> None:
    make("early", hour=5, process=DEAD, **BEGUN)
    make("failed", hour=6, status="failed", failure="no room")
    make("compared", hour=7, command="compare-full", process=DEAD, **BEGUN)
    (top / "early" / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # killed while it was written
    shown = runs.text(runs.read(top, {}), top, NOW, None)
    assert f"{top}/early: killed: its process is gone; nothing saved yet\n" in shown
    assert f"{top}/failed: failed: no room; nothing saved yet\n" in shown
    assert shown.endswith(f"gone; to continue: perl compare-full --config {top}/compared/settings.yaml --resume")


def test_notes_are_limited_to_the_newest_and_the_rest_counted(make: Make, top: Path) -> None:
    for number in range(runs.NOTES + 2):
        saved(make(f"r{number}", hour=number, process=DEAD, **BEGUN))
    shown = runs.text(runs.read(top, {}), top, NOW, None).splitlines()
    assert "… and 2 more: see --json" in shown
    assert sum("to continue: " in line for line in shown) == runs.NOTES


def test_the_steps_of_epochs_are_computed_from_the_last_line(make: Make) -> None:
    settings = {"max_steps": None, "num_train_epochs": 3.0}
    found = row(make("a", rows=20, settings=settings, **BEGUN))
    assert (found.steps, found.total) == (20, 150)
    assert row(make("b", settings=settings, **BEGUN)).total is None
    assert runs.steps_of(row(make("c", settings=settings, status="interrupted", steps=3))) == "3/?"


def test_only_the_end_of_the_metrics_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / METRICS
    rows = [json.dumps({"step": n, "loss": float(n)}) for n in range(5000)]
    path.write_text("\n".join([*rows, '{"eval_loss": 3}', "[1]", '{"step": 5000, "lo']))
    taken: list[str] = []
    load = json.loads
    monkeypatch.setattr(runs.json, "loads", lambda text: taken.append(text) or load(text))
    assert runs.last_row(path) == {"step": 4999, "loss": 4999.0}
    assert len(taken) == 4
    monkeypatch.setattr(runs, "TAIL_BYTES", 3)
    assert runs.last_row(path) == {}
    path.write_bytes(b"\xff\xfe\n")
    assert runs.last_row(path) == {} == runs.last_row(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "status", "note"),
    [
        ('{"schema_version": 99}', "schema 99", "has schema version 99"),
        ('{"schema_version": 5, "comm', "unreadable", "Can't read"),
        ("", "unreadable", "Can't read"),
        ("\xff", "unreadable", "Can't read"),
        ("[]", "unreadable", "has schema version None"),
        (f'{{"schema_version": {SCHEMA_VERSION}}}', "unreadable", "is damaged: unknown or missing fields"),
    ],
)
def test_a_record_that_cannot_be_read_has_a_row_that_says_so(
    content: str, status: str, note: str, make: Make, top: Path, perl: Any
) -> None:
    make("good")
    (make("bad") / RECORD).write_text(content, encoding="latin-1")
    found = row(top / "bad")
    assert found.status == status and note in found.note
    assert f": {status}: " in perl("runs").output
    assert [item["status"] for item in json.loads(perl("runs", "--json").output)] == ["finished", status]


@pytest.mark.parametrize(
    "values",
    [{"started": 5}, {"started": "soon"}, {"settings": []}, {"model": 3}, {"process": None, "status": "running"},
     {"steps": "many", "status": "failed"}, {"status": ["x"]}, {"command": {}}, {"metrics": [1]}],
)  # fmt: skip
def test_values_of_wrong_types_do_not_crash(values: dict[str, Any], make: Make, top: Path, perl: Any) -> None:
    make("bad", **values)
    perl("runs")
    perl("runs", "--json")


def test_json_has_everything(make: Make, top: Path, perl: Any) -> None:
    make("a", metrics={"accuracy": float("nan")})
    (found,) = json.loads(perl("runs", top, "--json").output)
    size = (top / "a" / RECORD).stat().st_size
    age = found.pop("age_seconds")
    assert age > 0
    assert found == {
        "folder": str(top / "a"), "name": "a", "depth": 0, "stage": "reward", "status": "finished", "note": None,
        "model": "base-1B", "steps": 40, "total_steps": 40, "metric": "accuracy", "value": None,
        "started": datetime(2026, 1, 2, 3, tzinfo=UTC).timestamp(), "bytes": size,
    }  # fmt: skip


def test_the_size_counts_each_file_of_the_folder_once(make: Make) -> None:
    folder = make("a")
    before = runs.size_of(folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "weights").write_bytes(b"x" * 5000)
    (folder / "again").hardlink_to(folder / "checkpoints" / "weights")
    (folder / "link").symlink_to("/usr")
    assert before + 5000 <= runs.size_of(folder) < before + 5100


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "0 s"), (40.9, "40 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (172800, "2 d")],
)
def test_ages(seconds: float, words: str) -> None:
    assert runs.age(seconds) == words


@pytest.mark.parametrize("base", ["coffee base (embedded)", "org/small", "/home/alice/models/small/", "small", None])
def test_a_model_is_named_without_its_folder_or_organisation(base: str | None) -> None:
    record = RunRecord(model={} if base is None else {"base": base})
    assert runs.model_of(record) == ("coffee" if base is None or base.startswith("coffee") else "small")


def test_the_table_fits_a_terminal(make: Make, top: Path) -> None:
    make("a-name-that-is-rather-long/with-parts-that-are-longer", model={"base": "org/Some-Model-Of-A-Long-Name-7B"})
    rows = runs.read(top, {})
    wide = runs.text(rows, top, NOW, None)
    assert "…" not in wide and "with-parts-that-are-longer" in wide
    for width in (80, 100):
        assert max(map(len, runs.text(rows, top, NOW, width).splitlines())) <= width
    assert runs.text(rows, top, NOW, 100).count("…") == 2


def test_a_narrow_terminal_cuts_only_long_names(make: Make, top: Path) -> None:
    make("a-name-that-is-rather-long/with-parts-that-are-longer", model={"base": "org/Some-Model-Of-A-Long-Name-7B"})
    for width in (40, 60, 90):
        (line,) = runs.text(runs.read(top, {}), top, NOW, width).splitlines()[2:]
        assert line.split()[4:7] == ["40/40", "accuracy", "80.0%"] and line.endswith(" B")


def test_a_table_higher_than_the_terminal_shows_its_head_and_its_end() -> None:
    table = "\n".join(["head", "----", *map(str, range(9))])
    assert runs.fitting(table, 5) == "head\n----\n6\n7\n8"
    assert runs.fitting(table, 11) == table


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "is_terminal", lambda: True)


def waiting(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], Any]) -> list[float]:
    """What happens in each pause; after the last one Ctrl-C."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > len(actions):
            raise KeyboardInterrupt
        actions[len(waits) - 1]()

    monkeypatch.setattr(runs.time, "sleep", sleep)
    return waits


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_a_running_run_is_followed_to_its_end(
    make: Make, top: Path, perl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("done", rows=3)
    make("a", rows=5, **BEGUN)
    waits = waiting(monkeypatch, lambda: make("a", rows=9, **BEGUN), lambda: make("a"))
    shown = perl("runs").output
    assert waits == [2.0, 2.0]  # then nothing runs any more
    assert "80.0%" in shown


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_ends_the_table_without_an_error(make: Make, perl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make("a", rows=5, **BEGUN)
    waits = waiting(monkeypatch)
    assert "5/40" in perl("runs").output and len(waits) == 1
    assert "5/40" in perl("runs", "--no-watch").output and len(waits) == 1


@pytest.mark.usefixtures("terminal")
def test_watch_waits_for_runs_that_are_yet_to_come(
    make: Make, top: Path, perl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    top.mkdir()
    waits = waiting(monkeypatch, lambda: make("a"))
    assert "accuracy 80.0%" in perl("runs", "--watch").output
    assert len(waits) == 2


def test_without_a_terminal_the_table_is_printed_once(make: Make, perl: Any) -> None:
    make("a", rows=5, **BEGUN)
    assert perl("runs").output.count("5/40") == 1


def test_what_has_ended_is_not_read_again(make: Make, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("done")
    make("a", **BEGUN)
    before = {found.folder: found for found in runs.read(top, {})}
    read: list[str] = []
    row_of = runs.row_of
    monkeypatch.setattr(runs, "row_of", lambda folder, stamp: read.append(folder.name) or row_of(folder, stamp))
    runs.read(top, before)
    assert read == ["a"]
    os.utime(top / "done" / RECORD, (1, 1))
    runs.read(top, before)
    assert sorted(read) == ["a", "a", "done"]


def test_what_cannot_be_listed_is_refused(tmp_path: Path, top: Path, perl: Any) -> None:
    assert "No such folder: runs\nHint: perl runs DIR" in perl("runs", code=2).output
    (tmp_path / "file").write_text("")
    assert "file is a file" in perl("runs", "file", code=2).output
    top.mkdir()
    assert perl("runs").output == "No runs in runs.\n" and perl("runs", "--json").output == "[]\n"
    assert "--watch needs a terminal" in perl("runs", "--watch", code=2).output


def test_a_record_has_the_mark_of_its_process(sft_run: Path) -> None:
    process = json.loads((sft_run / RECORD).read_text())["process"]
    assert process == liveness.mark()
    assert row(sft_run).status == "finished" and row(sft_run).metric is not None

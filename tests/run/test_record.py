"""A run's record and folder: written whole or not at all, read strictly, and never over somebody's files."""

import dataclasses
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from perlcli import settings
from perlcli.errors import Interrupted, PerlError, RunFailed
from perlcli.run import checkpoints, disk, files, lifecycle, liveness, signals
from perlcli.run.files import write_json
from perlcli.run.lifecycle import recording
from perlcli.run.output_folder import check_output
from perlcli.run.record import RunRecord, field_table, git_commit, read_record

FIELDS = [item.name for item in dataclasses.fields(RunRecord)]


def resolved(folder: Path, command: str = "sft", **given: Any) -> Any:
    """Settings that lead to this output folder."""
    return settings.resolve(settings.build(settings.COMMANDS[command], {"output": str(folder), **given}), {})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """The folder of a run that was stopped, with a file and a folder of its own."""
    folder = tmp_path / "old"
    with pytest.raises(Interrupted), recording(lifecycle.Run(resolved(folder, seed=5))) as run:
        run.append("metrics.jsonl", {"step": 1})
        (folder / "plots").mkdir()
        (folder / "plots" / "training.png").write_bytes(b"png")
        raise KeyboardInterrupt
    return folder


@pytest.fixture
def changed(old_run: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """Changes the content of a good record."""

    def change(action: Callable[[dict[str, Any]], Any]) -> Path:
        content = json.loads((old_run / "record.json").read_text())
        action(content)
        (old_run / "record.json").write_text(json.dumps(content))
        return old_run

    return change


def test_json_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in ({"a": "é"}, [1]):
        write_json(tmp_path / "x.json", content)
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == content
    assert names(tmp_path) == {"x.json"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "record.json", {})
        with disk.aside(tmp_path) as side:
            for name in ("model.safetensors", "value/head.safetensors"):  # as safetensors 0.8 leaves them
                (side / name).parent.mkdir(exist_ok=True)
                (side / name).touch(mode=0o600)
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "adapter_model.safetensors").touch(mode=0o600)
        (tmp_path / "secret").touch(mode=0o600)
        (tmp_path / "checkpoint-1" / "link").symlink_to(tmp_path / "secret")
        checkpoints.seal(tmp_path / "checkpoint-1")
        assert os.umask(umask) == umask  # reading it changed nothing
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("secret", "link")]
    weights = ("model.safetensors", "head.safetensors", "adapter_model.safetensors")
    assert {path.name for path in files} == {"record.json", "manifest.json", *weights}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600  # what a link leads to isn't the run's


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that goes down could leave an empty record: a run that nothing goes on with."""
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (done.append(name), real(*given)))
    write_json(tmp_path / "file.json", {})
    assert done == ["fsync", "replace"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "x.json", {"a": 1})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert names(tmp_path) == {"x.json"}


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    with recording(lifecycle.Run(resolved(tmp_path, seed=7, lora_r=4))) as run:
        run.record.metrics = {"eval_loss": 0.5, "prompts": 3}
        run.note("chosen: ü")
    found = read_record(tmp_path)
    assert dataclasses.asdict(found) == json.loads(json.dumps(dataclasses.asdict(run.record)))
    assert (found.command, found.seed, found.status, found.settings["lora_alpha"]) == ("sft", 7, "finished", 8)
    assert found.notes == ["chosen: ü"]
    assert set(found.versions) >= {"python", "torch", "transformers", "trl", "peft"}


def test_a_run_leaves_its_record_and_settings_only(tmp_path: Path) -> None:
    with recording(lifecycle.Run(resolved(tmp_path / "a" / "b"))):
        pass
    assert names(tmp_path / "a" / "b") == {"record.json", "settings.yaml"}


def test_a_run_that_has_not_begun_has_written_nothing(tmp_path: Path) -> None:
    lifecycle.Run(resolved(tmp_path / "out"))
    assert names(tmp_path) == set()


def test_a_note_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = lifecycle.Run(resolved(tmp_path))
    run.note("kind: pairs")
    assert capsys.readouterr().out == "kind: pairs\n"
    assert run.record.notes == ["kind: pairs"]


def test_a_fresh_record_claims_nothing() -> None:
    fresh = dataclasses.asdict(RunRecord())
    assert fresh.pop("schema_version") == 5
    assert fresh.pop("status") == "running"
    assert not any(fresh.values())


def test_rows_are_appended_a_line_each(tmp_path: Path) -> None:
    run = lifecycle.Run(resolved(tmp_path))
    run.append("samples.jsonl", {"text": "a\nü"})
    run.append("samples.jsonl", {"path": Path("x")})
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "a\nü"}, {"path": "x"}]


def test_the_record_says_running_while_the_run_goes_on(tmp_path: Path) -> None:
    with recording(lifecycle.Run(resolved(tmp_path))):
        assert read_record(tmp_path).status == "running"


@pytest.mark.parametrize(
    ("error", "status", "failure"),
    [
        (RunFailed("The loss is NaN", "try less"), "failed", "The loss is NaN"),
        (ValueError("inside"), "failed", "ValueError: inside"),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (Interrupted("Stopped at step 3, saved"), "interrupted", "Stopped at step 3, saved"),
    ],
)
def test_the_record_keeps_how_a_run_ended(tmp_path: Path, error: BaseException, status: str, failure: str) -> None:
    with pytest.raises(type(error)) as caught, recording(lifecycle.Run(resolved(tmp_path))):
        raise error
    assert caught.value is error
    assert (read_record(tmp_path).status, read_record(tmp_path).failure) == (status, failure)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
)
def test_a_signal_outside_of_training_ends_the_run_with_a_hint(number: int, code: int, tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in signals.STOPS]
    with pytest.raises(Interrupted) as caught, recording(lifecycle.Run(resolved(tmp_path))):
        os.kill(os.getpid(), number)
    problem = "Stopped before the first step was complete, nothing saved yet"
    assert (caught.value.exit_code, caught.value.problem) == (code, problem)
    assert str(caught.value) == f"{problem}: perl sft --config {tmp_path}/settings.yaml --overwrite starts again."
    assert (read_record(tmp_path).status, read_record(tmp_path).failure) == ("interrupted", problem)
    assert [signal.getsignal(each) for each in signals.STOPS] == before


def test_what_a_kill_leaves_of_a_file_is_cleared_away(old_run: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(MemoryError))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # as a kill would have it
        (tmp_path / "new").mkdir()
        write_json(tmp_path / "new" / "record.json", {})
    (left,) = (tmp_path / "new").iterdir()
    assert files.is_half_written(left)
    check_output(resolved(tmp_path / "new"))  # it is as good as empty
    with recording(lifecycle.Run(resolved(tmp_path / "new"))):
        pass
    assert names(tmp_path / "new") == {"record.json", "settings.yaml"}


@pytest.mark.parametrize("cut", ["rmtree", "unlink"])
def test_an_overwrite_that_is_killed_leaves_a_run_to_overwrite(
    cut: str, old_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it had deleted until then, it goes on from no checkpoint of the run before."""
    (old_run / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        place = lifecycle.shutil if cut == "rmtree" else Path
        patch.setattr(place, cut, lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        lifecycle.Run(resolved(old_run, overwrite=True)).begin()
    assert (old_run / "record.json").exists()
    assert (read_record(old_run).status == "running") == (not (old_run / "checkpoints").exists())
    check_output(resolved(old_run, overwrite=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content.update(schema_version=1), "has schema version 1; this perlcli reads version 5"),
        (lambda content: content.pop("schema_version"), "has schema version None"),
        (lambda content: content.pop("status"), "is damaged: unknown or missing fields: status"),
        (lambda content: content.update(more=1), "is damaged: unknown or missing fields: more"),
    ],
    ids=["another version", "no version", "a field too few", "a field too many"],
)
def test_a_record_of_another_schema_is_refused(changed: Any, change: Any, told: str) -> None:
    with pytest.raises(PerlError, match=told):
        read_record(changed(change))


@pytest.mark.parametrize("text", ['{"schema_version": 1', "", "[]", "null", "\xff"])
def test_a_broken_record_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PerlError, match=str(tmp_path / "record.json")):
        read_record(tmp_path)


def test_a_folder_without_a_record_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(PerlError, match=r"is not the folder of a run: it has no record\.json"):
        read_record(tmp_path)


def test_the_documented_schema_has_a_row_for_every_field() -> None:
    header, _, *rows = field_table(RunRecord).splitlines()
    assert header == "| field | type | meaning |"
    assert [row.split("|")[1].strip(" `") for row in rows] == FIELDS
    assert all(cell.strip() for row in rows for cell in row.split("|")[1:-1])


@pytest.mark.parametrize(
    ("base", "is_on_the_hub"),
    [("org/model", True), ("/home/me/model", False), ("coffee base (embedded)", False), ("", False)],
)
def test_a_model_card_replaces_the_blank_one(tmp_path: Path, base: str, is_on_the_hub: bool) -> None:
    with recording(lifecycle.Run(resolved(tmp_path, "reward"))) as run:
        (tmp_path / "README.md").write_text("[More Information Needed]")
        run.record.model = {"base": base}
        run.record.data = {"train": {"source": "pairs.jsonl", "kept": 7}}
        run.record.metrics = {"accuracy": 0.91237, "kind": "pairs", "eval_loss": None}
    _, front, text = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front).get("base_model") == (base if is_on_the_hub else None)
    assert "- training data: pairs.jsonl, 7 rows" in text
    assert "| accuracy | 91.2% |" in text and "[More" not in text


@pytest.mark.parametrize("place", ["new", "new/below", "empty"])
def test_a_new_or_empty_output_is_fine(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    for way in ({}, {"overwrite": True}, {"resume": "latest"}):
        check_output(resolved(tmp_path / place, **way))


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("sft", "--resume to continue, --overwrite to replace it, or another --output"),
        ("eval", "--overwrite to replace it, or another --output"),
        ("merge", "--overwrite to replace it, or another --output"),
        ("quickstart", "--resume to continue, --overwrite to replace it, or another --output"),
    ],
)
def test_an_output_that_is_not_empty_is_refused(old_run: Path, command: str, hint: str) -> None:
    with pytest.raises(PerlError, match="is not empty") as caught:
        check_output(resolved(old_run, command))
    assert caught.value.hint == hint


@pytest.mark.parametrize("way", ["overwrite", "resume"])
def test_an_old_run_can_be_resumed_or_replaced(old_run: Path, way: str) -> None:
    check_output(resolved(old_run, seed=5, **{way: "latest" if way == "resume" else True}))
    assert "plots" in names(old_run)  # a check alone deletes nothing


@pytest.mark.parametrize("way", ["overwrite", "resume"])
def test_a_run_in_progress_is_left_alone(old_run: Path, way: str) -> None:
    """Two runs that write to one folder would destroy each other's checkpoints."""
    content = json.loads((old_run / "record.json").read_text())
    with subprocess.Popen(["sleep", "60"]) as other:
        process = {"pid": other.pid, "started": liveness.start_of(other.pid), "host": liveness.host()}
        (old_run / "record.json").write_text(json.dumps(content | {"status": "running", "process": process}))
        again = resolved(old_run, seed=5, **{way: "latest" if way == "resume" else True})
        with pytest.raises(PerlError, match=f"its run is still in progress \\(process {other.pid}\\)"):
            check_output(again)
        other.kill()
    check_output(again)


@pytest.mark.parametrize(
    ("given", "is_more"),
    [
        ({}, False),
        ({"max_steps": 2}, False),
        ({"max_steps": 3}, False),
        ({"max_steps": 4}, True),
        ({"num_train_epochs": 1.0}, False),
        ({"num_train_epochs": 2.0}, True),
    ],
)
def test_a_finished_run_is_only_resumed_for_more_steps(tmp_path: Path, given: dict[str, Any], is_more: bool) -> None:
    with recording(lifecycle.Run(resolved(tmp_path))) as run:
        run.record.steps = 3
    refused = pytest.raises(PerlError, match=r"is complete \(3 steps\)\nHint: a larger --max-steps")
    with nullcontext() if is_more else refused:
        check_output(resolved(tmp_path, resume="latest", **given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seed": 6}, "seed was 5, now 6"),
        ({"lora_r": 4}, "--lora-r was 16, now 4; --lora-alpha was 32, now 8"),
        ({"data": "rows.jsonl"}, "--data was not set, now rows.jsonl"),
        ({"set": ("warmup_steps=2",)}, "--set was not set, now warmup_steps=2"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(old_run: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(PerlError, match=re.escape(told)):
        check_output(resolved(old_run, resume="latest", **{"seed": 5, **given}))


@pytest.mark.parametrize("given", [{"max_steps": 9}, {"num_train_epochs": 3.0}, {"save_steps": 1}, {"report_to": "x"}])
def test_length_and_saving_may_change_on_resume(old_run: Path, given: dict[str, Any]) -> None:
    check_output(resolved(old_run, resume="latest", seed=5, **given))


def test_a_run_from_before_an_option_existed_can_be_resumed(old_run: Path) -> None:
    record = json.loads((old_run / "record.json").read_text())
    del record["settings"]["optim"]
    (old_run / "record.json").write_text(json.dumps(record))
    check_output(resolved(old_run, resume="latest", seed=5))
    with pytest.raises(PerlError, match="--optim was adamw_torch_fused, now sgd"):
        check_output(resolved(old_run, resume="latest", seed=5, optim="sgd"))


def test_several_runs_keep_their_length(tmp_path: Path) -> None:
    """Those that finished stay as they are, so that the others can't become longer."""
    given = {"output": str(tmp_path / "out"), "max_steps": 3}
    with recording(lifecycle.Run(settings.resolve(settings.build(settings.Quickstart, given), {}))):
        pass
    longer = settings.build(settings.Quickstart, {**given, "max_steps": 4, "resume": "latest"})
    with pytest.raises(PerlError, match=r"had different settings: --max-steps was 3, now 4"):
        check_output(settings.resolve(longer, {}))


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with recording(lifecycle.Run(resolved(Path("~/out")))):
        pass
    assert names(tmp_path / "out") == {"record.json", "settings.yaml"}
    (tmp_path / "out" / "plots").mkdir()
    with pytest.raises(PerlError, match="is not empty"):
        check_output(resolved(Path("~/out")))
    with pytest.raises(PerlError, match="--overwrite would delete ~/out/plots"):
        check_output(resolved(Path("~/out"), overwrite=True, data="~/out/plots"))


@pytest.mark.parametrize("way", ["overwrite", "resume"])
def test_a_folder_that_is_no_run_is_never_taken(tmp_path: Path, way: str) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(PerlError, match="is not empty and not a run of perlcli"):
        check_output(resolved(tmp_path, **{way: "latest" if way == "resume" else True}))
    assert names(tmp_path) == {"thesis.txt"}


@pytest.mark.parametrize("below", ["", "run", "runs/sft"])
def test_an_output_in_the_place_of_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(PerlError, match=r"notes\.txt is a file"):
        check_output(resolved(tmp_path / "notes.txt" / below, overwrite=True))


@pytest.mark.parametrize("name", ["model", "data", "eval_data", "reward"])
@pytest.mark.parametrize("inside", ["", "plots"])
def test_overwriting_what_the_run_reads_is_refused(old_run: Path, name: str, inside: str) -> None:
    command = "rl" if name == "reward" else "sft"
    with pytest.raises(PerlError, match=r"--overwrite would delete .*, which this run reads"):
        check_output(resolved(old_run, command, overwrite=True, **{name: str(old_run / inside)}))
    assert "plots" in names(old_run)


def test_overwriting_one_of_several_models_is_refused(old_run: Path) -> None:
    given = resolved(old_run, "compare-full", overwrite=True, model=f"elsewhere, {old_run}/plots")
    with pytest.raises(PerlError, match=f"--overwrite would delete {old_run}/plots, which this run reads"):
        check_output(given)


def test_reading_through_a_link_into_the_output_is_noticed(old_run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old_run / "plots")
    with pytest.raises(PerlError, match="--overwrite would delete"):
        check_output(resolved(old_run, overwrite=True, data=str(tmp_path / "link")))


def test_what_lies_beside_the_output_is_safe_to_read(old_run: Path, tmp_path: Path) -> None:
    (tmp_path / "old-data").mkdir()
    check_output(resolved(old_run, overwrite=True, data=str(tmp_path / "old-data"), model="hub/old"))


def test_overwrite_empties_the_folder_but_not_what_links_lead_to(old_run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept.txt").write_text("kept")
    (old_run / "link").symlink_to(tmp_path / "elsewhere")
    with recording(lifecycle.Run(resolved(old_run, overwrite=True))):
        pass
    assert names(old_run) == {"record.json", "settings.yaml"}
    assert names(tmp_path / "elsewhere") == {"kept.txt"}


def test_resume_keeps_what_is_there(old_run: Path) -> None:
    with recording(lifecycle.Run(resolved(old_run, resume="latest"))):
        pass
    assert names(old_run) == {"record.json", "settings.yaml", "metrics.jsonl", "plots"}


def test_settings_that_steer_one_call_are_not_kept(tmp_path: Path) -> None:
    lifecycle.write_settings(
        tmp_path / "settings.yaml", settings.flat(resolved(tmp_path, resume="latest", dry_run=True))
    )
    kept = (tmp_path / "settings.yaml").read_text()
    assert kept.startswith("dtype: auto\n")  # in the order of the options
    assert "seed: 0" in kept
    assert not any(word in kept for word in ("resume", "dry_run", "overwrite", "null"))


def test_outside_a_git_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None


def test_in_a_git_checkout_the_commit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    monkeypatch.chdir(tmp_path)
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_commit() is None  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    shown = subprocess.run([*git, "log", "--format=%H"], capture_output=True, text=True, check=True)
    assert git_commit() == shown.stdout.strip()


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": "many"}, "invalid steps: 'many'"),
        ({"settings": []}, "invalid settings: []"),
        ({"data": {"train": []}}, "invalid data: {'train': []}"),
        ({"metrics": {"accuracy": [1]}}, "invalid metrics: accuracy: [1]"),
        ({"settings": {"seed": "x"}}, "invalid settings: seed: 'x'"),
        ({"settings": {"model": "x" * 300}}, "invalid settings: model: 'xxx"),
        ({"model": {"base": {}}}, "invalid model: base: {}"),
        ({"notes": ["\ud800"]}, "invalid numbers or characters"),
        ({"tokens": 10**400}, "invalid numbers or characters"),
    ],
)
def test_a_record_that_no_run_wrote_is_refused(change: dict[str, Any], told: str, old_run: Path) -> None:
    content = json.loads((old_run / "record.json").read_text())
    (old_run / "record.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(PerlError, match=r"record\.json is damaged: ") as caught:
        read_record(old_run)
    assert told in caught.value.problem


def test_a_record_nested_too_deeply_can_not_be_read(old_run: Path) -> None:
    (old_run / "record.json").write_text("[" * 100_000)
    with pytest.raises(PerlError, match=r"Can't read .*record\.json"):
        read_record(old_run)


def test_rows_of_metrics_that_no_run_wrote_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 100_000 + '\n{"a": "\\ud800"}\n{"step": 2}\n')
    assert files.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]

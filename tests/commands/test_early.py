"""Plain mistakes: refused before torch and the other heavy libraries load, with the same words as later."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perlcli import settings
from perlcli.commands import early
from perlcli.errors import PerlError
from perlcli.training import trackers

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "numpy")
ADAPTER = {"base_model_name_or_path": "base", "peft_type": "LORA"}
# Command lines, and how each is refused; `{folder}` has some content, `model` is an empty folder.
MISTAKES = {
    "rl": "--reward is missing: RL learns nothing without a reward",
    "rl --reward ./none": "--reward ./none does not exist",
    "rl --reward none.py:score": "--reward none.py:score: there is no file none.py",
    "rl --reward model": "model can't be read as a model: it has no config.json",
    "rl --reward ok.jsonl": "--reward ok.jsonl is a file",
    "rl --reward a.b:c --num-generations 1": "--num-generations must be at least 2",
    "sft --data none.jsonl": "--data none.jsonl does not exist",
    "sft --data wrong.jsonl": "wrong.jsonl has the columns frage, antwort",
    "sft --data ok.jsonl --eval-data none.jsonl": "--data none.jsonl does not exist",
    "sft --data ok.jsonl --split test": "--split works with folders and Hub datasets",
    "sft --data ok.txt": "ok.txt: unknown file type",
    "reward --data ok.jsonl": "`perl reward` needs chosen and rejected",
    "sft --model ./none --data ok.jsonl": "--model ./none does not exist",
    "sft --model model --data ok.jsonl": "model can't be read as a model: it has no config.json",
    "sft --model bare": "--data is missing for the model bare",
    "sft --model adapter": "--data is missing for the model adapter",
    "sft --output full": "--output full is not empty",
    "sft --resume checkpoint-3": "--resume checkpoint-3: no such checkpoint",
    "sft --output ok.jsonl": "--output ok.jsonl: ok.jsonl is a file",
    "sft --output s3://bucket/run": "--output must be a folder of this machine, not s3://bucket/run",
    "sft --lora-r 0": "--lora-r must be above 0, not 0",
    "sft --lora-r x": "--lora-r must be a whole number, not 'x'",
    "sft --config bad.yaml": "bad.yaml is not valid YAML",
    "sft --recipe none": "No such recipe: none",
    "sft --report-to wanbd": "--report-to must be the names of experiment trackers, not 'wanbd'",
    "eval --model ./none": "--model ./none does not exist",
    "eval --data none.jsonl": "--data none.jsonl does not exist",
    "eval --output full": "--output full is not empty",
    "merge": "ADAPTER is missing",
    "merge ./none": "The adapter ./none does not exist",
    "merge bare": "bare is a model, not an adapter",
    "merge adapter --output full": "--output full is not empty",
    "compare-full": "STAGE is missing",
    "compare-full sft --model bare,./none": "--model ./none does not exist",
    "compare-full sft --data none.jsonl": "--data none.jsonl does not exist",
    "compare-full sft --output full": "--output full is not empty",
    "quickstart --output full": "--output full is not empty",
    "estimate --model ./none": "--model ./none does not exist",
    "data check": "FILE is missing",
    "data check none.jsonl": "--data none.jsonl does not exist",
    "data show ok.jsonl --model ./none": "--model ./none does not exist",
    "data convert none.jsonl": "--data none.jsonl does not exist",
    "report none": "There is no folder none",
    "runs none": "No such folder: none",
}


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "model").mkdir()
    for name, file, content in (("bare", "config.json", {}), ("adapter", "adapter_config.json", ADAPTER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(content))
    (tmp_path / "ok.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "ok.txt").write_text("a")
    (tmp_path / "wrong.jsonl").write_text('{"frage": "a", "antwort": "b"}\n')
    (tmp_path / "bad.yaml").write_text("lora_r: [1\n")


@pytest.mark.slow
def test_plain_mistakes_load_no_heavy_library() -> None:
    """All in one process, which fails at the first import of one."""
    code = (
        "import json, sys\n"
        f"sys.modules |= dict.fromkeys({HEAVY!r})\n"
        "from typer.testing import CliRunner\n"
        "from perlcli.cli.app import app\n"
        "found = {}\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    result = CliRunner().invoke(app, line.split())\n"
        "    found[line] = result.exit_code, result.stderr\n"
        "print(json.dumps(found))"
    )
    words = [sys.executable, "-c", code, json.dumps(list(MISTAKES))]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    wrong = {line: found[line] for line, said in MISTAKES.items() if found[line][0] != 2 or said not in found[line][1]}
    assert wrong == {}


def test_nothing_is_written_or_claimed_by_the_checks(tmp_path: Path) -> None:
    before = sorted(map(str, tmp_path.rglob("*")))
    early.check(settings.build(settings.Sft, {"data": "ok.jsonl", "output": "new/run"}))
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_missing_tracker_gets_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name in ("wandb", "azureml") else object())
    trackers.check("none")
    trackers.check("tensorboard, mlflow")
    with pytest.raises(PerlError) as caught:
        trackers.check("tensorboard,wandb, azure_ml")
    assert caught.value.problem == "--report-to wandb, azure_ml: not installed"
    assert caught.value.hint == "pip install wandb azureml-mlflow"


def test_the_trackers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(trackers.TRACKERS) <= set(INTEGRATION_TO_CALLBACK)


# A quickstart


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    from perlcli.run.record import RunRecord, write_record

    top = tmp_path / "first"
    stages = ("sft", "reward", "rl", "eval")
    for number, name in enumerate(("", *stages)):
        (top / name).mkdir(parents=True)
        write_record(top / name, RunRecord(command=name or "quickstart", started=f"2026-01-01T00:00:0{number}+00:00"))
        if name in ("sft", "reward", "rl"):
            (top / name / "adapter_config.json").write_text(json.dumps(ADAPTER))
    return top


def test_runs_of_a_quickstart_are_found_by_its_name(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = early.with_runs(
        settings.build(settings.Eval, {"model": "first", "reward": ("first", "perlcli.coffee:reward")})
    )
    assert (found.model.model, found.sampling.reward) == ("first/rl", ("first/reward", "perlcli.coffee:reward"))
    assert capsys.readouterr().out.splitlines() == [
        "first is a quickstart: using the policy of its RL run, first/rl.",
        "first is a quickstart: using its reward model, first/reward.",
    ]
    merged = early.with_runs(settings.build(settings.Merge, {"adapter": "first"}))
    assert merged.merge.adapter == "first/rl"
    report = early.with_runs(settings.build(settings.Report, {"run": ("first", "other")}))
    assert report.runs.run == ("first/sft", "first/reward", "first/rl", "first/eval", "other")
    assert "first is a quickstart: reporting its runs sft, reward, rl, eval." in capsys.readouterr().out


def test_a_quickstart_that_has_not_come_so_far_says_how_to_go_on(quickstart: Path) -> None:
    (quickstart / "rl" / "adapter_config.json").unlink()
    with pytest.raises(PerlError) as caught:
        early.with_runs(settings.build(settings.Merge, {"adapter": "first"}))
    assert str(caught.value) == (
        "first is a quickstart that has no rl run yet\nHint: perl quickstart --output first --resume"
    )


def test_other_folders_stay_as_they_are(quickstart: Path) -> None:
    given = settings.build(settings.Eval, {"model": "first/sft", "reward": ("full",)})
    assert early.with_runs(given) is given

"""A resumed run ends like one that was never interrupted: weights, optimiser, metrics and samples, bit for bit."""

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from unbroken import differences, killed_after

from perlcli.run import checkpoints
from perlcli.run.files import read_rows
from perlcli.training import resume

Perl = Callable[..., Any]
STEPS = 6

COMMON = ("--max-steps", STEPS, "--save-steps", 1, "--save-total-limit", STEPS, "--learning-rate", "1e-2")
SIZE = ("--lora-r", 4, "--max-length", 128)
SMALL = ("--per-device-train-batch-size", 4, *SIZE)
SHORT = ("--max-length", 128, "--max-completion-length", 6, "--lora-r", 4)
ACCUMULATED = ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2, *SIZE)
RLOO = ("--per-device-train-batch-size", 4, "--num-generations", 2, *SHORT)
REINFORCE = ("--algorithm", "reinforce", "--per-device-train-batch-size", 4, *SHORT)
DROPOUT = ("--lora-dropout", "0.2")
REUSED = ("--set", "num_iterations=2", "--set", "steps_per_generation=4")
RECOMPUTED = ("--gradient-checkpointing", "true", "--set", "dataloader_num_workers=1")

# 10 rows of data: an epoch is 2 or 3 steps, whose last batch is not full.
CASES: dict[str, tuple[object, ...]] = {
    "sft": ("sft", *SMALL, *DROPOUT),
    "sft accumulated": ("sft", *ACCUMULATED, *DROPOUT),
    "sft 4-bit": ("sft", *SMALL, *DROPOUT, "--load-in-4bit"),
    "sft 8-bit": ("sft", *SMALL, "--load-in-8bit"),
    "sft full": ("sft", "--full", "--per-device-train-batch-size", 4, "--max-length", 128),
    "sft dora": ("sft", *SMALL, "--use-dora"),
    "sft by length": ("sft", *SMALL, *DROPOUT, "--set", "train_sampling_strategy=group_by_length"),
    "sft packed": ("sft", *SMALL, "--set", "packing=true"),
    "sft adafactor": ("sft", *SMALL, "--optim", "adafactor", "--set", "neftune_noise_alpha=5"),
    "sft computed again": ("sft", *SMALL, *DROPOUT, *RECOMPUTED),
    "sft loha": ("sft", "--per-device-train-batch-size", 4, "--max-length", 128, "--peft", "{loha}"),
    "reward pairs": ("reward", *SMALL, *DROPOUT),
    "reward by plan": ("reward", *SMALL, "--set", "lr_scheduler_type=cosine_with_restarts", "--set", "warmup_steps=2"),
    "reward pairs accumulated": ("reward", *ACCUMULATED),
    "reward pairs 4-bit": ("reward", *SMALL, "--load-in-4bit"),
    "reward pairs full": ("reward", "--full", "--per-device-train-batch-size", 4, "--max-length", 128),
    "reward thumbs": ("reward thumbs", *SMALL, *DROPOUT),
    "reward thumbs 8-bit": ("reward thumbs", *SMALL, "--load-in-8bit"),
    "rloo": ("rl", *RLOO),
    "rloo held to the base": ("rl", *RLOO, "--anchor", "base", "--gradient-checkpointing", "true"),
    "rloo unanchored": ("rl", *RLOO, "--beta", 0, "--optim", "sgd"),
    "rloo accumulated": ("rl", *RLOO, "--gradient-accumulation-steps", 2),
    "rloo 4-bit": ("rl", *RLOO, "--load-in-4bit"),
    "rloo 8-bit": ("rl", *RLOO, "--load-in-8bit"),
    "rloo full": ("rl", "--full", "--per-device-train-batch-size", 4, "--num-generations", 2, *SHORT[:4]),
    "rloo two iterations": ("rl", *RLOO, "--set", "num_iterations=2"),
    "rloo three steps a generation": ("rl", *RLOO, "--set", "steps_per_generation=3"),
    "rloo both": ("rl", *RLOO, "--gradient-accumulation-steps", 2, *REUSED),
    "rloo generations in a step": ("rl", *RLOO, "--gradient-accumulation-steps", 3, "--set", "steps_per_generation=2"),
    "reinforce": ("rl", *REINFORCE),
    "reinforce 4-bit": ("rl", *REINFORCE, "--load-in-4bit"),
    "reinforce 8-bit": ("rl", *REINFORCE, "--load-in-8bit"),
    "reinforce both": ("rl", *REINFORCE, "--gradient-accumulation-steps", 2, *REUSED),
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Path]) -> dict[str, Path]:
    """Files of ten rows by kind."""
    top = tmp_path_factory.mktemp("few")
    for name, folder in rows.items():
        lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)[:10]
        (top / f"{name}.jsonl").write_text("".join(lines))
    return {name: top / f"{name}.jsonl" for name in rows}


@pytest.fixture
def words(
    llama: Path, sft_run: Path, reward_run: Path, few: dict[str, Path], tmp_path: Path
) -> Callable[[str], list[object]]:
    """The command line of a case."""
    loha = tmp_path / "loha.json"
    loha.write_text('{"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj", "v_proj"]}')

    def of(case: str) -> list[object]:
        stage, *options = [loha if word == "{loha}" else word for word in CASES[case]]
        model: list[object] = ["--model", llama]
        data = {"sft": "demonstrations", "reward": "pairs", "reward thumbs": "thumbs", "rl": "prompts"}[str(stage)]
        if stage == "rl":
            model = ["--model", llama if "--full" in options else sft_run, "--reward", reward_run]
            options = [word for at, word in enumerate(options) if "--full" in options or not is_lora(options, at)]
        return [str(stage).split()[0], *model, "--data", few[data], *COMMON, *options]

    return of


def is_lora(options: list[object], at: int) -> bool:
    """Whether a word belongs to --lora-r, which an existing adapter has already."""
    return options[at] == "--lora-r" or (at > 0 and options[at - 1] == "--lora-r")


QUICK = {"sft accumulated": 3, "reinforce both": 3}  # the step to resume from


def assert_resumes_exactly(case: str, steps: Iterable[int], perl: Perl, words: Any, folder: Path) -> None:
    """Compare runs that were killed after some steps and resumed with one that was not interrupted."""
    perl(*words(case), "--output", "run")
    shutil.move("run", "unbroken")
    for step in steps:
        killed_after(folder / "unbroken", step, folder / "run")
        told = perl(*words(case), "--output", "run", "--resume").stdout
        assert f"Resuming from step {step} (checkpoint-{step})." in told
        assert differences(folder / "unbroken", folder / "run") == []
        shutil.rmtree("run")


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK)
def test_a_resumed_run_ends_like_an_uninterrupted_one(case: str, perl: Perl, words: Any, tmp_path: Path) -> None:
    assert_resumes_exactly(case, [QUICK[case]], perl, words, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_resumes_exactly(case: str, perl: Perl, words: Any, tmp_path: Path) -> None:
    assert_resumes_exactly(case, range(1, STEPS + 1), perl, words, tmp_path)


@pytest.mark.slow
def test_saving_changes_nothing(perl: Perl, words: Any, tmp_path: Path) -> None:
    perl(*words("rloo both"), "--output", "often")
    perl(*words("rloo both"), "--output", "seldom", "--save-steps", 100)
    assert differences(tmp_path / "often", tmp_path / "seldom") == []


# What makes it a different run


def stopped(perl: Perl, words: Any, case: str, folder: Path) -> list[object]:
    """The command line of a run of two steps that was killed after the first."""
    line = [*words(case), "--max-steps", 2, "--output", folder]
    perl(*line)
    whole = folder.with_name("finished")
    shutil.move(folder, whole)
    killed_after(whole, 1, folder)
    return [*line, "--resume"]


def retouch(folder: Path) -> None:
    """Change one weight of an adapter."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def rescale(folder: Path) -> None:
    """Double the effect of an adapter without changing its weights."""
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"lora_alpha": 2 * values["lora_alpha"]}))


@pytest.mark.slow
def test_a_run_with_other_weights_in_any_role_is_not_resumed(
    perl: Perl, words: Any, tmp_path: Path, sft_run: Path
) -> None:
    roles = {name: tmp_path / name for name in ("policy", "reward", "anchor")}
    line = words("rloo")
    for name, source in zip(roles, (sft_run, line[line.index("--reward") + 1], sft_run), strict=True):
        shutil.copytree(source, roles[name])
    line[line.index("--model") + 1], line[line.index("--reward") + 1] = roles["policy"], roles["reward"]
    line = stopped(perl, lambda case: [*line, "--anchor", roles["anchor"]], "", tmp_path / "run")
    told = {"policy": f"the adapter {roles['policy']}", "reward": f"the reward {roles['reward']}", "anchor": "anchor"}
    changes = {"adapter_model.safetensors": retouch, "adapter_config.json": rescale}
    for (name, folder), (file, change) in product(roles.items(), changes.items()):
        kept = (folder / file).read_bytes()
        change(folder)
        problem = " ".join(perl(*line, code=2).stderr.split())
        of_settings = (
            name == "policy" and change is rescale
        )  # it is trained further, and its rank and alpha are settings
        assert ("--lora-alpha was 8, now 16" if of_settings else f"{told[name]} was ") in problem
        assert f"had different {'settings' if of_settings else 'inputs'}: " in problem
        (folder / file).write_bytes(kept)
    perl(*line)


@pytest.mark.slow
def test_other_weights_below_the_home_are_noticed(
    perl: Perl, words: Any, tmp_path: Path, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the record writes paths there with a ~
    shutil.copytree(sft_run, tmp_path / "policy")
    line = words("rloo")
    line[line.index("--model") + 1] = tmp_path / "policy"
    line = stopped(perl, lambda case: line, "", tmp_path / "run")
    retouch(tmp_path / "policy")
    assert "had different inputs: the adapter ~/policy was " in " ".join(perl(*line, code=2).stderr.split())


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_rejected(perl: Perl, words: Any, tmp_path: Path) -> None:
    line = words("sft")
    perl(*line, "--max-steps", 2, "--output", "old")
    for folder in ("new", "old"):
        shutil.copytree("old/checkpoints/checkpoint-1", "old/checkpoints/checkpoint-1-kept", dirs_exist_ok=True)
        name = f"old/checkpoints/checkpoint-1{'-kept' if folder == 'old' else ''}"
        told = " ".join(perl(*line, "--output", folder, "--resume", name, code=2).stderr.split())
        assert f"--resume {name} is not a checkpoint of the run in {folder}" in told
        assert (f"Hint: --output {tmp_path}/old" in told) == (folder == "new")
    told = perl(*line, "--output", "new", "--resume", "checkpoint-9", code=2).stderr
    assert "--resume checkpoint-9: no such checkpoint" in told


@pytest.mark.slow
def test_a_changed_reward_function_is_reported(
    perl: Perl, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    text = "def reward(completion_ids, **columns):\n    return [float(ids[0]) for ids in completion_ids]\n"
    Path("mended.py").write_text(text)
    line = words("rloo")
    line[line.index("--reward") + 1] = "mended:reward"
    line = stopped(perl, lambda case: line, "", tmp_path / "run")
    Path("mended.py").write_text(text + "# a word more\n")
    assert "The file of the reward function mended:reward has changed: " in perl(*line).stdout


@pytest.mark.slow
@pytest.mark.parametrize("length", ["--max-steps", "--num-train-epochs"])
def test_a_run_may_grow_but_not_shrink(length: str, perl: Perl, words: Any, tmp_path: Path) -> None:
    line = words("sft")
    del line[line.index("--max-steps") : line.index("--max-steps") + 2]
    perl(*line, "--output", "run", length, 2)
    before = sorted(path.name for path in Path("run/checkpoints").iterdir())
    told = perl(*line, "--output", "run", length, 1, "--resume", code=2).stderr
    assert f"{length} was 2, now 1: it can only increase" in " ".join(told.split())
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == before
    told = perl(*line, "--output", "run", length, 3, "--resume").stdout
    assert "the learning rate schedule (linear) follows the new length." in told
    assert json.loads(Path("run/record.json").read_text())["steps"] > 2


@pytest.mark.slow
def test_a_run_by_steps_is_not_resumed_by_epochs_nor_for_fewer_steps(perl: Perl, words: Any, tmp_path: Path) -> None:
    line = words("sft")
    at = line.index("--max-steps")
    by_epochs = line[:at] + line[at + 2 :]
    stopped(perl, words, "sft", tmp_path / "steps")
    told = perl(*by_epochs, "--output", "steps", "--resume", code=2).stderr
    assert "the run in steps had --max-steps 2, and now it is missing" in " ".join(told.split())
    perl(*by_epochs, "--num-train-epochs", 2, "--output", "whole")
    killed_after(tmp_path / "whole", 1, tmp_path / "epochs")
    told = perl(*by_epochs, "--num-train-epochs", 2, "--output", "epochs", "--max-steps", 5, "--resume", code=2).stderr
    assert "--resume: --max-steps 5 is less than the 6 steps that the run's epochs take" in " ".join(told.split())


@pytest.mark.slow
def test_a_checkpoint_is_never_ahead_of_the_metrics(
    perl: Perl, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the machine crashes, what isn't on the disk is lost."""
    synced: list[str] = []
    monkeypatch.setattr("perlcli.run.disk.sync", lambda path: synced.append(path.name))
    monkeypatch.setattr("perlcli.run.checkpoints.sync", lambda path: synced.append(path.name))
    perl(*words("rloo"), "--max-steps", 1, "--output", "run")
    assert synced.index("metrics.jsonl") < synced.index("manifest.json") > synced.index("samples.jsonl")


@pytest.mark.slow
def test_a_fraction_of_an_epoch_may_grow(perl: Perl, words: Any) -> None:
    line = words("sft")
    at = line.index("--max-steps")
    line = [*line[:at], *line[at + 2 :], "--output", "run"]
    perl(*line, "--num-train-epochs", 1.3)
    assert "The run was planned for 4 steps and now has 6" in perl(*line, "--num-train-epochs", 2, "--resume").stdout


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_run_that_grew_equals_one_that_was_long_from_the_start(
    schedule: str, perl: Perl, words: Any, tmp_path: Path
) -> None:
    line = [*words("sft"), "--set", f"lr_scheduler_type={schedule}"]
    perl(*line, "--output", "long")
    perl(*line, "--output", "run", "--max-steps", 4)
    perl(*line, "--output", "run", "--resume")
    assert differences(tmp_path / "long", tmp_path / "run") == [] or schedule == "linear"
    rates = [[row["learning_rate"] for row in read_rows(tmp_path / run / "metrics.jsonl")] for run in ("long", "run")]
    assert rates[0][4:] == rates[1][4:]


@pytest.mark.slow
def test_a_checkpoint_without_our_file_is_not_used(perl: Perl, words: Any, tmp_path: Path) -> None:
    line = stopped(perl, words, "sft", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    (checkpoint / resume.FILE).unlink()
    checkpoints.seal(checkpoint)
    told = perl(*line, checkpoint, code=2).stderr
    assert "it was written by another version of perlcli" in " ".join(told.split())
    told = perl(*line).stdout
    assert "checkpoint-1 was written by another version of perlcli. Deleting it." in told
    assert "No complete checkpoint found; starting from the beginning." in told


def edit_record(folder: Path, part: str, **values: object) -> None:
    record = json.loads((folder / "record.json").read_text())
    record[part] |= values
    (folder / "record.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_another_precision_is_rejected_and_other_versions_are_reported(perl: Perl, words: Any, tmp_path: Path) -> None:
    line = stopped(perl, words, "sft", tmp_path / "run")
    edit_record(tmp_path / "run", "device", precision="bfloat16")
    told = perl(*line, code=2).stderr
    assert "had different inputs: the base's precision was bfloat16, now float32" in " ".join(told.split())
    edit_record(tmp_path / "run", "device", precision="float32", threads=7)
    edit_record(tmp_path / "run", "versions", torch="1.0")
    told = perl(*line).stdout
    assert "The steps so far ran with torch 1.0, now " in told and "; threads 7, now 1: results may" in told


@pytest.mark.slow
def test_nothing_is_reported_on_an_unchanged_machine(perl: Perl, words: Any, tmp_path: Path) -> None:
    assert "The steps before" not in perl(*stopped(perl, words, "sft", tmp_path / "run")).stdout


@pytest.mark.slow
def test_save_steps_can_change_when_a_run_resumes(perl: Perl, words: Any, tmp_path: Path) -> None:
    line = stopped(perl, words, "sft", tmp_path / "run")
    perl(*line, "--max-steps", 6, "--save-steps", 3)
    found = [checkpoints.step_of(path) for path in checkpoints.found(tmp_path / "run" / "checkpoints")]
    assert found == [6, 3, 1]


@pytest.mark.slow
def test_a_checkpoint_can_be_named_without_its_folder(perl: Perl, words: Any, tmp_path: Path) -> None:
    line = stopped(perl, words, "sft", tmp_path / "run")
    told = perl(*line, tmp_path / "run", code=2).stderr
    assert "that is the folder of a run, not a checkpoint" in told and f"Hint: --output {tmp_path}/run --resume" in told
    assert "Resuming from step 1 (checkpoint-1)." in perl(*line, "checkpoint-1").stdout


@pytest.mark.slow
def test_a_run_of_another_command_is_not_resumed(perl: Perl, words: Any, tmp_path: Path) -> None:
    stopped(perl, words, "sft", tmp_path / "run")
    told = perl(*words("reward pairs"), "--output", tmp_path / "run", "--resume", code=2).stderr
    assert f"{tmp_path}/run is a run of perl sft, not of perl reward" in " ".join(told.split())


@pytest.mark.slow
def test_a_moved_run_is_resumed_where_it_is_now(
    perl: Perl, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(perl, words, "sft", Path("run"))
    shutil.move("run", tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    told = perl("sft", "--config", "../moved/settings.yaml", "--resume").stdout
    assert "Resuming from step 1" in told and "Saved in ../moved" in told
    assert json.loads((tmp_path / "moved" / "record.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_the_record_of_a_resumed_run_covers_all_of_it(perl: Perl, words: Any, tmp_path: Path) -> None:
    line = [*words("sft"), "--max-steps", 2, "--output", tmp_path / "run"]
    perl(*line)
    path = tmp_path / "run" / "record.json"
    record = json.loads(path.read_text())
    record |= {"status": "running", "started": "2026-01-02T03:04:05+00:00", "elapsed_seconds": 1000.0}
    record |= {"peak_memory_mb": 9e6, "memory": record["memory"] | {"training_mb": 8e6}}
    path.write_text(json.dumps(record))
    told = perl(*line, "--resume").stdout
    assert "That was the last step; nothing is left to train." in told
    found = json.loads(path.read_text())
    assert (found["started"], found["peak_memory_mb"]) == (record["started"], 9e6)
    assert found["elapsed_seconds"] > 1000 and found["memory"]["training_mb"] == 8e6

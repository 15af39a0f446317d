"""--auto-batch: which splits are tried, what a trial without enough memory changes, and that a trial leaves nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trl import SFTTrainer
from unbroken import differences

from perlcli import settings
from perlcli.commands import rl, sft, trial
from perlcli.training import auto_batch, dry_run
from perlcli.training.trial import SETTINGS, Trial

Perl = Callable[..., Any]
STEPS = ("--max-steps", "2", "--max-length", "128", "--lora-r", "4", "--learning-rate", "1e-2")
BATCH = ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def words(llama: Path, rows: dict[str, Path]) -> tuple[object, ...]:
    return (
        "sft",
        "--model",
        llama,
        "--data",
        rows["demonstrations"] / "train.jsonl",
        *STEPS,
        *BATCH,
        "--output",
        "run",
    )


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Lets trials of at most so many rows fit; gives the rows of each trial as they come."""

    def up_to(most: int) -> list[int]:
        tried: list[int] = []

        def run(given: Any, *, steps: int, longest: bool) -> Trial:
            tried.append(given.train.per_device_train_batch_size)
            return Trial(fits=tried[-1] <= most)

        monkeypatch.setattr(auto_batch.trial, "run", run)
        return tried

    return up_to


def given(kind: type[Any], **values: object) -> Any:
    return settings.resolve(settings.build(kind, {"output": "run", **values}), {})


def test_splits_keep_the_effective_batch_and_the_largest_batch_comes_first() -> None:
    values = given(settings.Sft, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    found = auto_batch.splits(values, sft.trainer_args)
    assert found == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]


def test_splits_of_rl_keep_the_generations() -> None:
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
    values |= {"reward": ("perlcli.coffee:reward",)}
    assert auto_batch.splits(given(settings.Rl, **values), rl.trainer_args) == [(8, 1), (4, 2), (2, 4), (1, 8)]
    own = given(settings.Rl, **values, set=("steps_per_generation=4",))
    assert auto_batch.splits(own, rl.trainer_args) == [(4, 2)]


@pytest.mark.slow
def test_the_batch_is_halved_until_a_trial_fits_and_the_run_keeps_it(perl: Perl, words: Any, fitting: Any) -> None:
    tried = fitting(3)
    said = perl(*words, "--auto-batch").stdout
    assert tried == [8, 4, 2]
    assert "--auto-batch: 4 x 2 runs out of memory." in said.splitlines()
    assert "--auto-batch: 2 x 4 fits (rows per pass x passes per step)." in said.splitlines()
    record = json.loads(Path("run/record.json").read_text())
    written = yaml.safe_load(Path("run/settings.yaml").read_text())
    for values in (record["settings"], record["trl_settings"], written):
        assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == (2, 4)
    assert "auto_batch" not in written
    for total, more in ((3, (*words, "--auto-batch")), (4, ("sft", "--config", "run/settings.yaml"))):
        assert "The steps so far took" not in perl(*more, "--resume", "--max-steps", total).stdout
    assert tried == [8, 4, 2]


@pytest.mark.slow
def test_a_run_that_fits_in_no_split_ends_before_it_begins(perl: Perl, words: Any, fitting: Any) -> None:
    tried = fitting(0)
    said = perl(*words, "--auto-batch", code=1).stderr
    assert said.startswith("Error: --auto-batch: not even 1 x 8 fits into memory (")
    assert tried == [8, 4, 2, 1] and not Path("run").exists()


@pytest.mark.slow
def test_what_is_predicted_not_to_fit_is_not_tried(
    perl: Perl, words: Any, fitting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fitting(8)
    monkeypatch.setattr(auto_batch, "free_bytes", lambda: 0.0)
    said = perl(*words, "--auto-batch").stdout
    assert tried == [1] and "--auto-batch: 8 x 1 would take " in said


@pytest.mark.parametrize("option", ["auto_batch", "time"])
def test_a_trial_can_not_read_standard_input(option: str) -> None:
    values = given(settings.Sft, **{option: True, "data": "-", "dry_run": True})
    with pytest.raises(Exception, match="reads --data a second time, which standard input can't be"):
        settings.check(values)


def test_time_is_of_a_dry_run() -> None:
    with pytest.raises(Exception, match="--time only applies with --dry-run"):
        settings.check(given(settings.Sft, time=True))


def task(folder: Path, words: Any, **values: object) -> dict[str, Any]:
    """What a trial of `perl sft` measures, in this process."""
    options = {"model": str(words[2]), "data": str(words[4]), "max_steps": 2, "output": "trial", **values}
    (folder / SETTINGS).write_text(yaml.safe_dump(options))
    return trial.measured(folder, {"stage": "sft", "longest": True})


def test_a_trial_takes_its_steps_on_the_longest_rows(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = SFTTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"].shape[1])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    found = task(tmp_path, words, per_device_train_batch_size=2)
    assert found["fits"] and len(found["seconds"]) == 1 and found["loading_seconds"] > 0
    assert len(set(seen)) == 1 and len(seen) == 2
    assert not list(Path("trial").rglob("checkpoint-*"))


def test_memory_that_runs_out_in_a_trial_is_its_result(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(*FULL.args)

    monkeypatch.setattr(SFTTrainer, "training_step", step)
    assert task(tmp_path, words) == {"fits": False, "seconds": [], "loading_seconds": 0.0}


def test_an_error_of_the_user_s_in_a_trial_is_handed_on(words: Any, tmp_path: Path) -> None:
    assert task(tmp_path, words, chat_template="nowhere.jinja")["problem"].startswith("Can't read --chat-template")


@pytest.mark.slow
def test_a_trial_leaves_nothing_behind(perl: Perl, words: Any, tmp_path: Path) -> None:
    """The run has the weights, optimiser and random states of one that was started with the found batch."""
    said = perl(*words, "--auto-batch", "--lora-dropout", "0.1").stdout
    assert "--auto-batch: 8 x 1 fits" in said
    found = ("--per-device-train-batch-size", "8", "--gradient-accumulation-steps", "1")
    perl(*words[:-1], "other", *found, "--lora-dropout", "0.1")
    assert differences(tmp_path / "run", tmp_path / "other") == []


# --dry-run


@pytest.mark.slow
@pytest.mark.parametrize("epochs", ["1", "2.5"])
def test_a_dry_run_foretells_the_steps(epochs: str, perl: Perl, words: Any) -> None:
    words = [word for word in words if word not in ("--max-steps",)]
    words.remove("2")
    words = [*words[:5], *words[5:], "--num-train-epochs", epochs, "--per-device-train-batch-size", "3"]
    said = perl(*words, "--dry-run").stdout
    assert not Path("run").exists()
    perl(*words)
    record = json.loads(Path("run/record.json").read_text())
    assert f"training: {epochs} epoch(s), {record['steps']} steps, of 6 rows (3 x 2), learning rate 0.01" in said
    assert "data: 32 rows, " in said and "memory: " in said and " free: fits" in said


@pytest.mark.slow
def test_a_dry_run_of_rl_foretells_the_steps_and_guesses_the_time(perl: Perl, tmp_path: Path) -> None:
    words = ("rl", "--data", "coffee", "--reward", "perlcli.coffee:reward", "--output", "run", "--num-generations", "2")
    said = perl(*words, "--num-train-epochs", "1", "--dry-run", "--time").stdout
    assert "training: 1 epoch(s), " in said
    assert "s per step (2 steps timed): " in said and said.endswith("Dry run: nothing was written.\n")
    assert not list(tmp_path.iterdir())


def test_steps_of_rl_count_whole_generations() -> None:
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
    values |= {"reward": ("perlcli.coffee:reward",), "num_train_epochs": 2.0}
    config = rl.trainer_args(given(settings.Rl, **values))
    assert dry_run.steps_of(config, 7) == 2 * 3  # of two prompts each
    twice = rl.trainer_args(given(settings.Rl, **values, set=("num_iterations=2", "steps_per_generation=4")))
    assert dry_run.steps_of(twice, 9) == 2 * 2 * 2 * 2  # of four prompts, which serve four steps

"""Stops that leave the last good state (NaN, Ctrl-C, an error), and resuming from there."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SHORT
from safetensors.torch import load_file
from torch import nn
from trl import RLOOTrainer, SFTTrainer
from unbroken import differences, killed_after

from perlcli.errors import RunFailed
from perlcli.model import roles
from perlcli.run import signals
from perlcli.training import loop
from perlcli.training.loop import Meter

Perl = Callable[..., Any]
Hook = Callable[[Any, torch.Tensor], torch.Tensor]


@pytest.fixture
def sft(perl: Perl, llama: Path, rows: dict[str, Path]) -> Perl:
    """Runs `perl sft` of four steps, with dropout so that the random state counts."""

    def run(output: Path, *words: object, code: int = 0) -> Any:
        common = ("--model", llama, "--data", rows["demonstrations"] / "train.jsonl", "--output", output)
        steps = ["--max-steps", "4", "--per-device-train-batch-size", "4", "--learning-rate", "1e-2"]
        return perl("sft", *common, *steps, "--lora-r", "4", "--lora-dropout", "0.1", *words, code=code)

    return run


@pytest.fixture
def rl(perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]) -> Perl:
    """Runs `perl rl` of three steps."""

    def run(output: Path, *words: object, code: int = 0) -> Any:
        common = ("--model", sft_run, "--reward", reward_run, "--data", rows["prompts"], "--output", output)
        steps = ["--max-steps", "3", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1"]
        short = ["--learning-rate", "1e-2", "--max-completion-length", "8"]
        return perl("rl", *common, *steps, *short, *words, code=code)

    return run


@pytest.fixture
def after_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, int, Hook], None]:
    """Makes a trainer call a hook once, with model and loss after the backward pass of a step, before the update."""

    def plant(trainer: type, step: int, hook: Hook) -> None:
        original, waiting = trainer.training_step, [hook]

        def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = original(self, model, *args, **kwargs)
            return waiting.pop()(model, loss) if waiting and self.state.global_step + 1 == step else loss

        monkeypatch.setattr(trainer, "training_step", training_step)

    return plant


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def spoil_gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = math.nan
    return loss


def send(number: int) -> Hook:
    def hook(model: Any, loss: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), number)
        return loss

    return hook


# NaN


def test_nan_gradient_stops_before_the_weights_change(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    after_pass(SFTTrainer, 3, spoil_gradient)
    result = sft(tmp_path / "run", "--save-steps", "1", code=1)
    assert result.stderr.splitlines()[-2:] == [
        "Error: The gradient is NaN or infinite at step 3; the weights from before that step are saved",
        "Hint: try a lower --learning-rate, or --dtype float32 / bfloat16",
    ]
    assert_equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoints" / "checkpoint-2")
    found = record(tmp_path / "run")
    assert (found["status"], found["steps"]) == ("failed", 2)
    assert found["failure"].startswith("The gradient is NaN or infinite at step 3")
    assert found["peak_memory_mb"] > 0
    assert steps(tmp_path / "run") == [1, 2]


def test_nan_loss_stops_the_run(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    after_pass(SFTTrainer, 2, lambda model, loss: loss * math.nan)
    result = sft(tmp_path / "run", code=1)
    assert "Error: The loss is NaN or infinite at step 2" in result.stderr
    assert record(tmp_path / "run")["status"] == "failed"


def test_learning_rate_that_blows_up_leaves_finite_weights(sft: Perl, tmp_path: Path) -> None:
    wild = ("--learning-rate", "9e15", "--optim", "sgd", "--set", "max_grad_norm=0", "--lora-alpha", "1000000")
    sft(tmp_path / "run", *wild, "--save-steps", "1", code=1)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert_equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoints" / "checkpoint-1")


def test_model_without_a_gradient_is_reported() -> None:
    with pytest.raises(
        RunFailed, match=r"^No parameter received a gradient: nothing can be learned\nHint: .*--lora-tar"
    ):
        Meter(None).on_pre_optimizer_step(None, None, None, model=nn.Linear(2, 2))


# Ctrl-C


@pytest.mark.slow
def test_interrupted_run_is_saved_says_how_to_resume_and_resumes_exactly(
    sft: Perl, perl: Perl, after_pass: Any, tmp_path: Path
) -> None:
    sft(tmp_path / "whole")
    after_pass(SFTTrainer, 2, send(signal.SIGINT))
    result = sft(tmp_path / "run", code=130)
    command = f"perl sft --config {tmp_path}/run/settings.yaml --resume"
    assert result.stderr.splitlines()[-1:] == [f"Stopped at step 2, saved: {command} continues."]
    found = record(tmp_path / "run")
    assert (found["status"], found["steps"], found["failure"]) == ("interrupted", 2, "Stopped at step 2, saved")
    assert_equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoints" / "checkpoint-2")

    result = perl(*command.split()[1:])
    assert "Resuming from step 2 (checkpoint-2)." in result.stdout
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    found, whole = record(tmp_path / "run"), record(tmp_path / "whole")
    assert (found["status"], found["failure"], found["steps"]) == ("finished", None, 4)
    assert (found["tokens"], found["metrics"]) == (whole["tokens"], whole["metrics"])


@pytest.mark.slow
def test_an_interrupt_says_how_long_the_step_takes(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    after_pass(SFTTrainer, 1, send(signal.SIGINT))
    assert "Interrupted: finishing the first step, then saving; interrupt again" in sft(tmp_path / "a", code=130).stdout
    after_pass(SFTTrainer, 3, send(signal.SIGINT))
    told = "Interrupted: finishing the step, about 1 s left, then saving; interrupt again to stop now."
    assert told in sft(tmp_path / "b", code=130).stdout.splitlines()


BUSY = """
import hashlib

def reward(completions, **columns):
    if len(completions) == 4:  # not in the probe before the first step, which has 16
        hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)  # one call of many seconds
    return [float(len(str(text))) for text in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize("signals_sent", [1, 2])
def test_ctrl_c_is_answered_within_a_second_while_a_step_computes(signals_sent: int, tmp_path: Path) -> None:
    Path("busy.py").write_text(BUSY if signals_sent > 1 else BUSY.replace("60_", "20_"))
    words = ("rl", "--reward", "busy.py:reward", "--output", "run", "--max-steps", "3")
    size = ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1")
    command = [sys.executable, "-u", "-m", "perlcli", *words, *size]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = iter(run.stdout.readline, "")
    assert any(line.startswith("base copies resident") for line in lines)
    time.sleep(2)  # into the first step
    start = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert next(lines).startswith("Interrupted: finishing the first step, then saving")
    assert time.monotonic() - start < 1
    if signals_sent > 1:
        run.send_signal(signal.SIGINT)
    said = run.communicate()[1].splitlines()[-1]
    assert run.returncode == 130 and "Error" not in said
    if signals_sent > 1:
        assert time.monotonic() - start < signals.GRACE_SECONDS + 2
        assert said.startswith("Stopped before the first step was complete, nothing saved yet: perl rl --config run/")
    else:
        assert said == "Stopped at step 1, saved: perl rl --config run/settings.yaml --resume continues."
    assert record(Path("run"))["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize(("minutes", "kept"), [("10", [4]), ("1", [2, 4]), ("0", [4])])
def test_checkpoints_are_saved_by_time(
    minutes: str, kept: list[int], sft: Perl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the first step that is complete so many minutes after the last checkpoint."""
    clock = [0.0]
    original = SFTTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        clock[0] += 45.0
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    others = {"perf_counter": time.perf_counter, "process_time": time.process_time}
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0], **others))
    sft(tmp_path / "run", "--save-minutes", minutes, "--save-total-limit", "9")
    found = sorted(int(path.name[11:]) for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert found == kept


@pytest.mark.slow
def test_a_checkpoint_by_time_resumes_exactly(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    def fail(model: Any, loss: torch.Tensor) -> torch.Tensor:
        raise ValueError("a bad row")

    sft(tmp_path / "whole")
    after_pass(SFTTrainer, 3, fail)
    assert "Saved checkpoint" not in sft(tmp_path / "run", "--save-minutes", "1e-9", code=1).stdout  # it has one
    assert "Resuming from step 2" in sft(tmp_path / "run", "--resume").stdout
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


def test_sigterm_is_handled_too(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    after_pass(SFTTrainer, 1, send(signal.SIGTERM))
    sft(tmp_path / "run", code=143)
    assert record(tmp_path / "run")["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-1").is_dir()


def test_second_interrupt_stops_immediately_and_saves(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    def twice(model: Any, loss: torch.Tensor) -> torch.Tensor:
        send(signal.SIGINT)(model, loss)
        return send(signal.SIGINT)(model, loss)

    after_pass(SFTTrainer, 3, twice)
    sft(tmp_path / "run", "--save-steps", "1", code=130)
    assert record(tmp_path / "run")["status"] == "interrupted"
    assert_equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoints" / "checkpoint-2")


@pytest.mark.slow
def test_signal_handlers_are_restored_after_a_run(sft: Perl, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    sft(tmp_path / "run", "--max-steps", "1")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.slow
def test_interrupted_rl_resumes_exactly(rl: Perl, perl: Perl, after_pass: Any, tmp_path: Path) -> None:
    """Policy, anchor, reward and the random state that samples completions are all restored."""
    rl(tmp_path / "whole")
    after_pass(RLOOTrainer, 1, send(signal.SIGINT))
    rl(tmp_path / "run", code=130)
    perl("rl", "--config", tmp_path / "run" / "settings.yaml", "--resume")
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")
    assert_equal_weights(tmp_path / "run" / "anchor", tmp_path / "whole" / "anchor")
    found, wanted = (
        {key: value for key, value in record(tmp_path / name)["metrics"].items() if not key.startswith("seconds_")}
        for name in ("run", "whole")
    )
    assert found == wanted
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("run", "whole")]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_takes_no_further_step(rl: Perl, perl: Perl, tmp_path: Path) -> None:
    """Its last checkpoint is of the last step, after which transformers would take one more."""
    rl(tmp_path / "unbroken", "--save-steps", "1")
    killed_after(tmp_path / "unbroken", 3, tmp_path / "run")
    said = rl(tmp_path / "run", "--save-steps", "1", "--resume").stdout
    assert "Resuming from step 3 (checkpoint-3)." in said
    assert differences(tmp_path / "unbroken", tmp_path / "run") == []


@pytest.mark.slow
def test_interrupt_inside_a_reward_function_waits_for_the_end_of_the_step(
    rl: Perl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("impatient.py").write_text(
        "import os, signal\n"
        "calls = []\n"
        "def reward(completion_ids, **columns):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 1:\n"  # the first call is the probe's
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(ids[0]) for ids in completion_ids]\n"
    )
    result = rl(tmp_path / "run", "--reward", "impatient:reward", code=130)
    assert "finishing the first step, then saving;" in result.stdout
    assert (record(tmp_path / "run")["status"], record(tmp_path / "run")["steps"]) == ("interrupted", 1)


@pytest.mark.slow
def test_reward_function_that_fails_during_training_leaves_the_last_good_adapter(
    rl: Perl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("moody.py").write_text(
        "calls = []\n"
        "def reward(completion_ids, **columns):\n"
        "    calls.append(1)\n"
        "    assert len(calls) < 4, 'no more'\n"  # the first call is the probe's
        "    return [float(ids[0]) for ids in completion_ids]\n"
    )
    result = rl(tmp_path / "run", "--reward", "moody:reward", "--save-steps", "1", code=2)
    assert "Error: The reward function moody:reward failed: AssertionError: no more" in result.stderr
    assert (record(tmp_path / "run")["status"], record(tmp_path / "run")["steps"]) == ("failed", 2)
    assert_equal_weights(tmp_path / "run", tmp_path / "run" / "checkpoints" / "checkpoint-2")


# Resuming


@pytest.mark.slow
def test_resumed_run_drops_the_metrics_after_its_checkpoint(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    sft(tmp_path / "whole")
    after_pass(SFTTrainer, 4, spoil_gradient)
    sft(tmp_path / "run", "--save-steps", "2", "--save-total-limit", "4", code=1)
    assert steps(tmp_path / "run") == [1, 2, 3]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-3")
    told = sft(tmp_path / "run", "--save-steps", "2", "--resume").stdout
    assert "Resuming from step 2" in told
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_resume_without_a_checkpoint_starts_over(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    sft(tmp_path / "whole")
    after_pass(SFTTrainer, 1, spoil_gradient)
    sft(tmp_path / "run", code=1)
    assert not list((tmp_path / "run").glob("checkpoints/checkpoint-*"))
    assert "No checkpoint found; starting from the beginning." in sft(tmp_path / "run", "--resume").stdout
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_resuming_a_finished_run_needs_more_steps(sft: Perl, tmp_path: Path) -> None:
    sft(tmp_path / "whole", "--set", "lr_scheduler_type=constant")
    sft(tmp_path / "run", "--set", "lr_scheduler_type=constant", "--max-steps", "2")
    before = (tmp_path / "run" / "record.json").read_text()
    result = sft(tmp_path / "run", "--set", "lr_scheduler_type=constant", "--max-steps", "2", "--resume", code=2)
    assert f"The run in {tmp_path}/run is complete (2 steps)\nHint: a larger --max-steps" in result.stderr
    assert (tmp_path / "run" / "record.json").read_text() == before
    sft(tmp_path / "run", "--set", "lr_scheduler_type=constant", "--resume")
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_skipped(perl: Perl, llama: Path, rows: dict[str, Path]) -> None:
    words = ("sft", "-m", llama, "-d", rows["demonstrations"], "-o", "run", *SHORT, "--save-steps", "1")
    perl(*words)
    (Path("run") / "checkpoints" / "checkpoint-2" / "trainer_state.json").unlink()
    record = json.loads((Path("run") / "record.json").read_text())
    (Path("run") / "record.json").write_text(json.dumps({**record, "status": "running"}))
    told = perl(*words, "--resume").stdout
    assert "checkpoint-2 is damaged: trainer_state.json is missing. Deleting it." in told
    assert "Resuming from step 1" in told


# --resume


def stopped_at(sft: Perl, after_pass: Any, folder: Path, step: int, *words: str) -> None:
    """A run that was stopped by Ctrl-C at a step."""
    after_pass(SFTTrainer, step, send(signal.SIGINT))
    sft(folder, "--save-steps", "1", *words, code=130)


@pytest.mark.slow
def test_a_run_resumes_from_the_named_checkpoint(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    sft(tmp_path / "whole", "--max-steps", "4")
    stopped_at(sft, after_pass, tmp_path / "run", 3, "--max-steps", "4", "--save-total-limit", "3")
    named = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    told = sft(tmp_path / "run", "--max-steps", "4", "--save-total-limit", "3", "--resume", named).stdout
    assert "Resuming from step 1 (checkpoint-1)." in told
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.slow
def test_save_total_limit_is_kept(sft: Perl, tmp_path: Path) -> None:
    sft(tmp_path / "run", "--save-steps", "1", "--save-total-limit", "1", "--max-steps", "3")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("run/checkpoints/checkpoint-9", "no such checkpoint"),
        ("other/checkpoints/checkpoint-1", "is not a checkpoint of the run in"),
        ("run/checkpoints/checkpoint-1", "it is damaged: optimizer.pt is missing"),
    ],
)
def test_a_named_checkpoint_must_be_one_of_the_run(
    sft: Perl, after_pass: Any, tmp_path: Path, name: str, told: str
) -> None:
    stopped_at(sft, after_pass, tmp_path / "run", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (tmp_path / "run/checkpoints/checkpoint-1/optimizer.pt").unlink()
    assert told in " ".join(sft(tmp_path / "run", "--resume", tmp_path / name, code=2).stderr.split())


@pytest.mark.slow
def test_a_run_with_other_data_is_not_resumed(
    sft: Perl, after_pass: Any, tmp_path: Path, rows: dict[str, Path]
) -> None:
    stopped_at(sft, after_pass, tmp_path / "run", 2)
    known = record(tmp_path / "run")
    known["data"]["train"]["fingerprint"] = "of other rows"
    (tmp_path / "run" / "record.json").write_text(json.dumps(known))
    told = sft(tmp_path / "run", "--resume", code=2).stderr
    assert "had different inputs: training data was of other rows, now " in told
    assert record(tmp_path / "run") == known  # nothing was touched


@pytest.mark.slow
def test_a_run_on_another_base_is_not_resumed(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    stopped_at(sft, after_pass, tmp_path / "run", 2)
    known = record(tmp_path / "run")
    known["model"]["fingerprint"] = "of other weights"
    (tmp_path / "run" / "record.json").write_text(json.dumps(known))
    assert "the base was of other weights, now " in sft(tmp_path / "run", "--resume", code=2).stderr


def test_a_scheduler_s_warning_signal_saves_and_stops(sft: Perl, after_pass: Any, tmp_path: Path) -> None:
    after_pass(SFTTrainer, 2, send(signal.SIGUSR1))
    result = sft(tmp_path / "run", code=128 + signal.SIGUSR1)
    assert "Stopped at step 2, saved" in result.stderr
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()


# What adapters keep


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes documents it; upstream.py silences it for users
@pytest.mark.parametrize(("command", "data"), [("sft", "demonstrations"), ("reward", "pairs")])
@pytest.mark.parametrize(
    "how",
    [
        ("--dtype", "bfloat16"),
        pytest.param(("--load-in-4bit",), marks=pytest.mark.slow),
        pytest.param(("--load-in-8bit",), marks=pytest.mark.slow),
        pytest.param(("--dtype", "bfloat16", "--use-dora"), marks=pytest.mark.slow),
    ],
)
def test_adapters_that_keep_their_inputs_dtype_learn_the_same_to_the_bit(
    how: tuple[str, ...], command: str, data: str, perl: Perl, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    llama, rows = map(request.getfixturevalue, ("llama", "rows"))
    common = (command, "-m", llama, "-d", rows[data], *SHORT, *how)
    original, seen = roles.casting, []

    def always(model: Any, *, on: bool) -> Any:
        seen.append(on)
        return original(model, on=True)

    perl(*common, "-o", "spared")
    monkeypatch.setattr(roles, "casting", always)
    perl(*common, "-o", "cast")
    assert set(seen) == {False}
    one, other = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("spared", "cast"))
    assert all(torch.equal(one[tensor], other[tensor]) for tensor in other)
    assert record(Path("spared"))["metrics"] == record(Path("cast"))["metrics"]

"""Whatever ends a run leaves a checkpoint of its last complete step, from which it resumes to the same end."""

import copy
import errno
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from transformers import Trainer
from unbroken import differences, end

from perlcli.run import checkpoints
from perlcli.training.algorithms import Reinforce
from perlcli.training.sft_trainer import TokenMeanTrainer

Perl = Callable[..., Any]
Words = tuple[object, ...]
STEPS = ("--max-steps", "4", "--max-length", "128", "--lora-r", "4", "--learning-rate", "1e-2")
REUSE = ("--gradient-accumulation-steps", "2", "--set", "num_iterations=2", "--set", "steps_per_generation=4")
RL = ("rl", *STEPS, "--max-completion-length", "8", "--per-device-train-batch-size", "4", *REUSE)
KINDS: dict[str, Words] = {
    "sft": ("sft", *STEPS, "--per-device-train-batch-size", "8", "--lora-dropout", "0.1"),
    "rloo": (*RL, "--num-generations", "2"),
    "reinforce": (*RL, "--algorithm", "reinforce"),
}
GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ENDS: dict[str, tuple[BaseException, int]] = {
    "raises": (ValueError("a bad row"), 1),
    "exits": (SystemExit(3), 3),
    "out of memory": (GPU_FULL, 1),
}


@pytest.fixture
def run(perl: Perl, llama: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Perl:
    """Runs a kind of run, of four steps with epochs of two or four, into a folder."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    Path("letters.py").write_text(
        "def reward(completion_ids, **columns):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n"
    )

    def start(kind: str, folder: Path, *more: object, code: int = 0, reward: str = "letters:reward") -> Any:
        data = ("--data", rows["demonstrations" if kind == "sft" else "prompts"] / "train.jsonl")
        scores = () if kind == "sft" else ("--reward", reward)
        return perl(*KINDS[kind], "--model", llama, *data, *scores, "--output", folder, *more, code=code)

    return start


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException) -> None:
    """Makes a method fail in its nth call, after its work."""
    original, calls = getattr(owner, name), []

    def action(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            raise copy.copy(error)  # an error of the module would keep the run's models, by its traceback
        return result

    monkeypatch.setattr(owner, name, action)


def found(folder: Path) -> list[str]:
    return [path.name for path in checkpoints.found(folder / "checkpoints") if checkpoints.fault(path) is None]


def fails_and_resumes(
    run: Perl, kind: str, folder: Path, place: tuple[Any, str, int], end: tuple[BaseException, int], step: int
) -> Any:
    """Ends a run in a call of a method, checks the checkpoint that it leaves and what it says, and resumes it."""
    run(kind, folder / "unbroken")
    error, code = end
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, *place, error)
        ended = run(kind, folder / "run", code=code)
    assert found(folder / "run") == [f"checkpoint-{step}"]
    command = f"perl {kind if kind == 'sft' else 'rl'} --config {folder}/run/settings.yaml --resume"
    note = f"Saved checkpoint-{step}, the last complete step: {command} continues from there."
    assert note in ended.stdout.splitlines()
    assert json.loads((folder / "run" / "record.json").read_text())["status"] == "failed"
    assert f"Resuming from step {step} (checkpoint-{step})." in run(kind, folder / "run", "--resume").stdout
    assert differences(folder / "unbroken", folder / "run") == []
    return ended


@pytest.mark.slow
def test_memory_that_runs_out_leaves_the_last_step(run: Perl, tmp_path: Path) -> None:
    place = (TokenMeanTrainer, "compute_loss", 3)
    ended = fails_and_resumes(run, "sft", tmp_path, place, ENDS["out of memory"], 2)
    assert "out of memory in a training step" in ended.stderr


@pytest.mark.slow
def test_a_step_within_a_generation_is_left_with_the_rest_of_it(run: Perl, tmp_path: Path) -> None:
    """With two iterations a generation serves four steps: the third is taken by what the first sampled."""
    place = (Trainer, "training_step", 6)
    ended = fails_and_resumes(run, "rloo", tmp_path, place, ENDS["raises"], 2)
    assert "Error: ValueError: a bad row" in ended.stderr


FAILS = {  # how a reward function fails for a completion, how that is reported, and the exit code
    "raises": ("raise ConnectionError('no answer')", "The reward function {} failed: ConnectionError: no answer", 2),
    "exits": ("sys.exit(3)", "The reward function {} failed: SystemExit: 3", 2),
    "nan": ("rewards[index] = math.nan", "The reward {} is nan", 1),
}
MOODY = """
import math, sys
batches = []
def reward(completions, completion_ids, **columns):
    if len(completions) > 1:
        batches.append(1)
    rewards = [float(sum(ids) % 7) for ids in completion_ids]
    for index, ids in enumerate(completion_ids):
        if len(batches) > 3 and sum(ids) % 3 == 0:
            {}
    return rewards
"""


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("raises", "rloo"),
        ("nan", "reinforce"),
        *(pytest.param(*words, marks=pytest.mark.slow) for words in (("exits", "rloo"), ("raises", "reinforce"))),
    ],
)
def test_a_reward_that_fails_leaves_the_last_step_and_can_be_skipped(
    way: str, kind: str, run: Perl, tmp_path: Path
) -> None:
    """The run goes on from there by another decision; what it skips is counted and kept."""
    ends, problem, code = FAILS[way]
    module = f"moody_{way}_{kind}"
    Path(f"{module}.py").write_text(MOODY.format(ends))
    words = ("--max-steps", "6", "--set", "num_iterations=1", "--set", "steps_per_generation=2")
    ended = run(kind, tmp_path / "run", *words, code=code, reward=f"{module}:reward")
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    named = problem.format(f"{module}:reward")
    assert re.fullmatch(rf"Error: {named}: the completion ['\"].*['\"] of the prompt ['\"].+['\"]", line)
    assert "Hint: fix the reward, or --on-reward-error skip leaves such completions out" in ended.stderr
    (name,) = found(tmp_path / "run")
    assert f"Saved {name}, the last complete step: " in ended.stdout
    skips = (*words, "--resume", "--on-reward-error", "skip")
    assert (
        "--on-reward-error was stop, now skip." in run(kind, tmp_path / "run", *skips, reward=f"{module}:reward").stdout
    )
    errors = [json.loads(line) for line in (tmp_path / "run" / "reward-errors.jsonl").read_text().splitlines()]
    assert errors and all(row["reward"] is None and row["step"] > int(name[-1]) for row in errors)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["guards"]["unscored"] == len(errors)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("unscored", 0) * 8 for row in rows) == len(errors)
    assert all(math.isfinite(row["grad_norm"]) for row in rows)


def test_weights_that_were_changing_are_not_saved(run: Perl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, AdamW, "step", 2, ValueError("half way"))
    ended = run("sft", tmp_path / "run", code=1)
    assert found(tmp_path / "run") == []
    told = "No checkpoint of step 1 could be saved: the run ended while the optimiser changed the weights"
    assert told in ended.stdout.splitlines()


def test_a_checkpoint_that_can_not_be_saved_does_not_hide_the_error(
    run: Perl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, Trainer, "training_step", 2, ValueError("a bad row"))
    failing(monkeypatch, Trainer, "_save_rng_state", 1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    ended = run("sft", tmp_path / "run", code=1)
    assert "No checkpoint of step 1 could be saved: [Errno 28] No space left on device" in ended.stdout.splitlines()
    assert "Error: ValueError: a bad row" in ended.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


PLACES = {  # where a run ends: its kind, the call in which it does, and its last complete step
    "sft between steps": ("sft", (Trainer, "training_step", 2), 1),
    "sft with its gradients": ("sft", (Trainer, "_clip_grad_norm", 3), 2),
    "sft while saving": ("sft", (Trainer, "_save_rng_state", 1), 4),
    "rloo within a step": ("rloo", (Trainer, "training_step", 3), 1),
    "rloo within a generation": ("rloo", (Trainer, "training_step", 6), 2),
    "reinforce within a step": ("reinforce", (Trainer, "training_step", 4), 1),
    "reinforce before its optimiser": ("reinforce", (Reinforce, "learn_values", 3), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("place", PLACES)
def test_any_end_leaves_the_last_step(place: str, end: str, run: Perl, tmp_path: Path) -> None:
    kind, call, step = PLACES[place]
    fails_and_resumes(run, kind, tmp_path, call, ENDS[end], step)


# Another split of the same batch

SPLIT: dict[str, Words] = {
    "sft": ("sft", *STEPS),
    "rloo": ("rl", *STEPS, "--max-completion-length", "8", "--num-generations", "2", "--set", "num_iterations=2"),
}
SIZES = ("--per-device-train-batch-size", "--gradient-accumulation-steps")


@pytest.mark.parametrize("kind", ["sft", pytest.param("rloo", marks=pytest.mark.slow)])
def test_a_run_resumes_with_another_split_of_its_batch(
    kind: str, run: Perl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as after it ran out of memory: the same rows in the same order, but for rounding the same end."""
    monkeypatch.setitem(KINDS, kind, SPLIT[kind])
    before, after = (SIZES[0], "8", SIZES[1], "1"), (SIZES[0], "4", SIZES[1], "2")
    run(kind, tmp_path / "unbroken", *before)
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, Trainer, "training_step", 2, GPU_FULL)
        run(kind, tmp_path / "run", *before, code=1)
    after += ("--gradient-checkpointing", "true", *(("--no-shared-prompts",) if kind == "rloo" else ()))
    told = run(kind, tmp_path / "run", *after, "--resume").stdout.splitlines()
    rounds = "results may differ from here on by rounding."
    assert f"The steps so far took 8 x 1 rows, and from here on 4 x 2: {rounds}" in told
    assert f"--gradient-checkpointing was false, now true: {rounds}" in told
    assert (f"--shared-prompts was on, now off: {rounds}" in told) is (kind == "rloo")
    one, other = (end(tmp_path / name) for name in ("unbroken", "run"))
    assert [row["num_tokens"] for row in one["metrics.jsonl"]] == [row["num_tokens"] for row in other["metrics.jsonl"]]
    for name, value in one.items():
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer"):
            torch.testing.assert_close(other[name], value, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_generation_of_so_many_passes_keeps_its_split(run: Perl, tmp_path: Path, monkeypatch: Any) -> None:
    """With other passes it would be another number of rows that are sampled at a time."""
    failing(monkeypatch, Trainer, "training_step", 3, ValueError("a bad row"))
    run("rloo", tmp_path / "run", code=1)
    refused = run("rloo", tmp_path / "run", SIZES[0], "2", SIZES[1], "4", "--resume", code=2)
    assert "had different settings: --per-device-train-batch-size was 4, now 2" in refused.stderr


# Tokens of steps that share a generation


@pytest.mark.parametrize(
    "sharing",
    [
        ("num_iterations=2", "steps_per_generation=4"),
        pytest.param(("num_iterations=2", "steps_per_generation=1"), marks=pytest.mark.slow),
        pytest.param(("num_iterations=1", "steps_per_generation=8"), marks=pytest.mark.slow),
    ],
)
def test_every_step_has_the_tokens_so_far(sharing: tuple[str, ...], run: Perl, tmp_path: Path) -> None:
    """Also a step that only learns from what an earlier one sampled, where TRL logs no count."""
    words = [word for item in sharing for word in ("--set", item)]
    per_step = int(sharing[0][-1]) * int(sharing[1][-1]) / 2  # steps of two passes that a generation serves
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "rloo", ("rl", *STEPS, *RL[9:15], "--num-generations", "2", *words))
        run("rloo", tmp_path / "run")
    tokens = [json.loads(line)["num_tokens"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert tokens == sorted(tokens) and tokens[0] > 0
    assert len(set(tokens)) == max(1, math.ceil(4 / max(per_step, 1)))
    assert json.loads((tmp_path / "run" / "record.json").read_text())["tokens"] == tokens[-1]

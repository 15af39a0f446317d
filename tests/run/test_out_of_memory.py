"""Memory that runs out is one error: whose memory, while doing what, how much, and options that the command has."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TWO_STEPS

from perlcli import settings
from perlcli.errors import Interrupted, PerlError, RunFailed
from perlcli.run import out_of_memory
from perlcli.run.record import RunRecord, read_record

FIGURES = ": 117 MB asked for, 83.9 MB of 25.4 GB free"
BATCH = "a smaller --per-device-train-batch-size with more --gradient-accumulation-steps"
LOAD = "Hint: try --load-in-4bit"
ROLES = ("--max-length", "128", "--max-completion-length", "4", "--num-generations", "2")


@pytest.fixture
def fail(llama: Path, sft_run: Path, reward_run: Path, rows: dict[str, Path], perl: Any, no_room: Any) -> Any:
    """Runs a command with a GPU whose memory runs out in one place; gives its error and its record."""
    pair = (sft_run, "--reward", reward_run, "--data", rows["prompts"])
    words: dict[str, tuple[object, ...]] = {
        "sft": ("--model", llama, "--data", rows["demonstrations"], *TWO_STEPS),
        "reward": ("--model", llama, "--data", rows["pairs"], *TWO_STEPS),
        "rl": ("--model", *pair, *TWO_STEPS, *ROLES),
        "eval": ("--model", *pair, "--max-samples", "4"),
        "merge": (sft_run,),
    }

    def run(command: str, place: str) -> tuple[str, RunRecord]:
        name, *more = command.split()
        no_room(place)
        error = perl(name, *words[name], *more, "--output", "run", code=1).stderr
        return error[error.index("Error: ") :], read_record(Path("run"))

    return run


@pytest.mark.parametrize(
    ("command", "place", "where", "hint"),
    [
        ("sft", "loading", "while loading the base in {precision}", LOAD),
        (
            "sft --load-in-4bit",
            "loading",
            "while loading the base in {precision}",
            "CUDA_VISIBLE_DEVICES chooses another GPU",
        ),
        ("sft --load-in-4bit", "quantising", "while loading the base in {precision}", "perl estimate predicts"),
        ("sft --full", "loading", "while loading the base in {precision}", "Hint: try an adapter instead of --full"),
        ("sft", "learning", "in a training step", f"{BATCH}, "),
        ("sft", "evaluating", "in evaluation", BATCH),
        ("sft", "saving", "while saving", LOAD),
        ("reward", "loading", "while loading the base in {precision}", LOAD),
        ("reward", "learning", "in a training step", "a smaller --max-length or --load-in-4bit"),
        ("rl", "attaching", "while adding an adapter", LOAD),
        ("rl", "sampling", "while sampling", "a smaller --max-completion-length or --load-in-4bit"),
        ("rl", "learning", "in a training step", BATCH),
        ("eval", "loading", "while loading the base in {precision}", LOAD),
        ("eval", "attaching", "while adding an adapter", LOAD),
        ("eval", "sampling", "while sampling", "try a smaller --per-device-eval-batch-size, "),
        ("merge", "loading", "while loading the base in {precision}", "CUDA_VISIBLE_DEVICES= perl merge …"),
        ("merge", "attaching", "while adding an adapter", "CUDA_VISIBLE_DEVICES= perl merge …"),
    ],
)
def test_a_gpu_without_room_is_one_error_of_the_run(command: str, place: str, where: str, hint: str, fail: Any) -> None:
    error, record = fail(command, place)
    where = where.format(precision=record.device["precision"])
    problem = f"The GPU's memory is too small (out of memory {where}){FIGURES}"
    assert error.startswith(f"Error: {problem}\nHint: ") and hint in error
    assert (record.status, record.failure) == ("failed", problem)
    assert (record.device["precision"] == "4-bit") == ("4bit" in command)
    named = {word.strip(",").removeprefix("--") for word in error.split() if word.startswith("--")}
    assert named <= {settings.dashed(name) for name in settings.names(settings.ALL_COMMANDS[record.command])}


def test_a_gpu_without_room_for_samples_is_a_note(llama: Path, rows: dict[str, Path], perl: Any, no_room: Any) -> None:
    no_room("sampling")
    perl("sft", "--model", llama, "--data", rows["demonstrations"], *TWO_STEPS, "--output", "run")
    record = read_record(Path("run"))
    assert (record.status, record.steps) == ("finished", 2)
    problem = f"The GPU's memory is too small (out of memory while sampling){FIGURES}"
    assert f"The samples could not be made: {problem}." in record.notes


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to "
                   "allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)")  # fmt: skip


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (CPU, "This machine's memory is too small (out of memory): 8.00 TB asked for"),
        (MemoryError(), "This machine's memory is too small (out of memory)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "This machine's memory is too small (out of memory)"),
        (RuntimeError("CUDA error: out of memory"), "The GPU's memory is too small (out of memory)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "The GPU's memory is too small (out of memory)"),
        (RuntimeError("size mismatch"), None),
        (ValueError("out of memory of fun"), None),
        (OSError(errno.ENOENT, "No such file"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_memory_of_the_gpu_or_of_the_machine(error: BaseException, problem: str | None) -> None:
    found = out_of_memory.failure(error)
    assert (found.problem if found else None) == problem


def replaced(first: Exception, second: Exception, *, is_explicit: bool) -> Exception:
    try:
        try:
            raise first
        except type(first) as error:
            if is_explicit:
                raise second from error
            raise second  # noqa: B904
    except type(second) as error:
        return error


def test_an_error_that_replaced_it_does_not_hide_it() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory")
    for is_explicit in (True, False):
        found = out_of_memory.failure(replaced(full, PerlError("can't be loaded"), is_explicit=is_explicit))
        assert found is not None and found.exit_code == RunFailed.exit_code
        assert out_of_memory.failure(replaced(full, found, is_explicit=is_explicit)) is None  # is one already
    assert out_of_memory.failure(replaced(full, Interrupted("Stopped"), is_explicit=True)) is None
    assert out_of_memory.failure(replaced(ValueError("x"), PerlError("y"), is_explicit=True)) is None


def test_other_processes_on_the_gpu_are_named_first() -> None:
    text = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80.00 GiB of which 1.00 GiB is free. "
    shared = torch.OutOfMemoryError(f"CUDA out of memory. {text}Including non-PyTorch memory, this process has "
                                    "9.00 GiB memory in use.")  # fmt: skip
    found = out_of_memory.failure(shared, RunRecord(command="merge"))
    assert found is not None and found.hint.startswith("other processes use 75.2 GB of this GPU: stop them")


def test_main_memory_names_what_the_command_has() -> None:
    values = {
        "per_device_train_batch_size": 1,
        "max_length": 512,
        "load_in_4bit": True,
        "gradient_checkpointing": "auto",
    }
    for command, given, hint in (
        ("sft", values, "try --gradient-checkpointing true or a smaller --max-length"),
        ("rl", {"load_in_4bit": False, "load_in_8bit": True}, "try --load-in-4bit instead of --load-in-8bit"),
        ("merge", {"dtype": "float32"}, "try --dtype bfloat16"),
        ("merge", {"dtype": "bfloat16"}, "stop other programs; perl doctor shows how much is free"),
    ):
        found = out_of_memory.failure(MemoryError(), RunRecord(command=command, settings=given))
        assert found is not None and found.hint == hint

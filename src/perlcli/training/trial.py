"""Trials of a run in a process of their own: a few steps that are measured and leave nothing behind. Whatever the trial
changes (random states, memory, the allocator), and also its death for lack of memory, stays in that process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from perlcli import device, settings
from perlcli.doctor.checks import memory_sizes
from perlcli.errors import PerlError, RunFailed

MODULE = ("-P", "-m", "perlcli.commands.trial")  # -P: modules in the working folder don't shadow ours
PARENT = "PERLCLI_PARENT"  # as `comparison.processes` has it: the trial ends when this process does
SETTINGS, TASK, RESULT, LOG = "settings.yaml", "task.json", "result.json", "log"
TIMED_STEPS = 2  # after one that warms up
RESERVE = 0.05  # of the main memory: a trial that leaves less is ended, before the machine swaps
LOOK_SECONDS = 0.1  # between two looks at the memory
Given = TypeVar("Given", bound=settings.Training)


@dataclass(frozen=True)
class Trial:
    """What a trial measured; `fits` is whether it had enough memory."""

    fits: bool = True
    seconds: tuple[float, ...] = ()  # of each step, without the first
    loading_seconds: float = 0.0


def run(given: settings.Training, *, steps: int, longest: bool = False) -> Trial:
    """Take a step and then so many more with these resolved settings: on the run's first rows, or on the `longest`
    ones. Raises PerlError if the run itself would fail."""
    with tempfile.TemporaryDirectory(prefix="perlcli-trial-") as name:
        folder = Path(name)
        _write(folder, given, steps=steps, longest=longest)
        code = _watched(folder)
        result = folder / RESULT
        if result.exists():
            return _read(json.loads(result.read_text(encoding="utf-8")))
        if code in (-9, None):  # by the system or by us
            return Trial(fits=False)
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunFailed(f"The trial failed: {lines[-1] if lines else f'exit code {code}'}")


def reserve_bytes() -> float:
    """The main memory that a trial has to leave free."""
    return RESERVE * memory_sizes()[1]


def with_length(given: Given, length: int) -> Given:
    """The settings for rows of at most so many tokens."""
    return replace(given, data=replace(given.data, max_length=length))


def _write(folder: Path, given: settings.Training, *, steps: int, longest: bool) -> None:
    import yaml

    own = {"output": str(folder / "run"), "overwrite": False, "resume": None, "auto_batch": False, "time": False}
    own |= {"report_to": "none", "max_steps": 1 + steps}
    if isinstance(given, settings.Rl) and given.rollouts.rollouts == "vllm":  # a server may not see this folder
        own |= {"rollouts": "transformers", "vllm_server_base_url": (), "importance_cap": None}
    values = {**settings.flat(given), **own}
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    (folder / SETTINGS).write_text(yaml.safe_dump(kept, allow_unicode=True), encoding="utf-8")
    task = {"stage": settings.command_of(given), "longest": longest}
    (folder / TASK).write_text(json.dumps(task), encoding="utf-8")


def _watched(folder: Path) -> int | None:
    """The exit code of the process; None if it was ended because it left too little main memory."""
    command, variables = [sys.executable, *MODULE, str(folder)], {**os.environ, PARENT: str(os.getpid())}
    is_watched, reserve = device.kind() == "cpu", reserve_bytes()
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables, start_new_session=True
        )
        try:
            while (code := process.poll()) is None:
                if is_watched and memory_sizes()[0] < reserve:
                    return None
                time.sleep(LOOK_SECONDS)
            return code
        finally:
            process.kill()  # does nothing if it has ended
            process.wait()


def _read(result: Mapping[str, Any]) -> Trial:
    """The trial that a process wrote. Raises PerlError with the error that it found."""
    if "problem" in result:
        raise PerlError(result["problem"], result["hint"])
    return Trial(result["fits"], tuple(result["seconds"]), result["loading_seconds"])

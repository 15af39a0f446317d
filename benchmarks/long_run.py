"""Whether a long run grows: memory, open files and threads over 2,000 steps of `perl rl`, read from outside.

    python benchmarks/long_run.py --steps 2000

Trains a reward model on the embedded base for a minute, then runs `perl rl` against it in a separate process and reads
that process's memory and open files from /proc until it ends. Fails if the last quarter of the steps needs more than
the first. Needs Linux, no network and no GPU. README.md in this folder says more.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import measured
from one_base import GIVE_BACK

from perlcli.commands import runs as runs_module
from perlcli.run import checkpoints
from perlcli.run import files as record

HERE = Path(__file__).resolve().parent
EVERY = 0.25  # seconds between two readings
PARTS = 4
REWARD = ("reward", "--max-steps", "60")
RL = (
    "rl", "--per-device-train-batch-size", "8", "--num-generations", "4", "--max-completion-length", "16",
    "--learning-rate", "2e-4", "--save-steps", "50",  # low enough that lengths still vary at the end
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What the process held after a number of steps."""

    step: int
    resident_mb: float
    private_mb: float  # the part that no file backs
    files: int
    threads: int


@dataclass(frozen=True)
class Part:
    """What the process held over a part of the steps: medians over its readings, and the highest values."""

    steps: str
    looks: int
    resident_mb: float
    private_mb: float
    highest_mb: float
    files: float
    most_files: int
    threads: float


def look(pid: int, metrics: Path) -> Look | None:
    """What a process holds now; None if it has ended."""
    place = Path("/proc") / str(pid)
    try:
        lines = (place / "status").read_text(encoding="ascii").splitlines()
        files = len(list((place / "fd").iterdir()))
    except OSError:
        return None
    values = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    if "VmRSS" not in values:  # a zombie
        return None
    resident, private = (int(values[name][0]) / 1024 for name in ("VmRSS", "RssAnon"))
    step = int(runs_module.last_row(metrics).get("step", 0))
    return Look(step, round(resident, 2), round(private, 2), files, int(values["Threads"][0]))


def watch(words: Sequence[str], folder: Path) -> list[Look]:
    """Runs `perl rl` in a separate process; returns what it held from its first step to its last."""
    command = [sys.executable, "-m", "perlcli", *words, "--output", str(folder)]
    # Freed memory goes back at once; otherwise glibc keeps a varying part of it, some 50 MB.
    process = subprocess.Popen(command, env={**os.environ, **GIVE_BACK})
    looks = []
    while process.poll() is None:
        seen = look(process.pid, folder / record.METRICS)
        if seen is not None and seen.step > 0:
            looks.append(seen)
        time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(f"perl rl failed with exit code {process.returncode}")
    return looks


def part(looks: Sequence[Look], first: int, last: int) -> Part:
    """The readings between two steps, summarised."""
    within = [one for one in looks if first <= one.step <= last]
    if not within:
        raise SystemExit(f"No reading between steps {first} and {last}\nHint: use more --steps")
    resident = [one.resident_mb for one in within]
    return Part(
        f"{first:,} to {last:,}", len(within), round(median(resident), 1),
        round(median(one.private_mb for one in within), 1), round(max(resident), 1),
        median(one.files for one in within), max(one.files for one in within),
        median(one.threads for one in within),
    )  # fmt: skip


def parts(looks: Sequence[Look], steps: int) -> list[Part]:
    """The run's quarters."""
    edges = [steps * number // PARTS for number in range(PARTS + 1)]
    # A reading has the last finished step. After the last step of all, the run also saves, evaluates and draws.
    return [part(looks, low + 1, high - (high == steps)) for low, high in pairwise(edges)]


def faults(found: Sequence[Part], limit_mb: float) -> list[str]:
    """Where the last quarter needs more than the first, one line each."""
    first, last = found[0], found[-1]
    pairs = (
        ("memory", first.resident_mb + limit_mb, last.resident_mb),
        ("open files", first.files, last.files), ("threads", first.threads, last.threads),
    )  # fmt: skip
    return [f"{name}: {now:g}, but at most {most:g} is allowed" for name, most, now in pairs if now > most]


def written(folder: Path) -> dict[str, Any]:
    """The sizes of a run's logs and of the trainer's state in its oldest checkpoint."""
    states = [(place / checkpoints.STATE).stat().st_size for place in checkpoints.found(folder / record.CHECKPOINTS)]
    rows = (folder / record.METRICS).read_bytes().splitlines()
    samples = (folder / record.SAMPLES).read_bytes()
    return {
        "metrics_bytes_a_step": round(sum(map(len, rows)) / len(rows)), "metrics_rows": len(rows),
        "samples_bytes": len(samples), "samples_rows": len(samples.splitlines()),
        "trainer_state_bytes": states[0], "record_bytes": (folder / record.RECORD).stat().st_size,
    }  # fmt: skip


def described() -> dict[str, Any]:
    """What the figures were measured on."""
    runs = [shlex.join(["perl", *REWARD]), shlex.join(["perl", *RL, "--reward", "REWARD"])]
    return measured.described("benchmarks/long_run.py", runs=runs)


def shown(found: Sequence[Part]) -> str:
    """The quarters as a Markdown table."""
    heads = ["steps", "memory MB", "private MB", "highest MB", "open files", "at most", "threads"]
    cells = [
        [one.steps, f"{one.resident_mb:.1f}", f"{one.private_mb:.1f}", f"{one.highest_mb:.1f}", f"{one.files:g}",
         f"{one.most_files}", f"{one.threads:g}"]
        for one in found
    ]  # fmt: skip
    return measured.markdown(heads, cells)


def write(path: Path, about: dict[str, Any], found: Sequence[Part], files: dict[str, Any]) -> None:
    """Saves the figures as JSON and as Markdown."""
    content = {"about": about, "parts": [asdict(one) for one in found], "written": files}
    kept = "\n".join(f"- {name.replace('_', ' ')}: {count:,}" for name, count in files.items())
    text = f"{about['seconds']:g} seconds\n\n{shown(found)}\n\nWritten by the end of the run:\n\n{kept}"
    measured.write(path, content, text)


def main() -> None:
    """Runs and watches, shows and saves the figures; exits with 1 if the run grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--limit-mb", type=float, default=4.0, help="memory growth that is allowed, in MB")
    parser.add_argument("--output", help="output path without extension (default: results/cpu-long-run in this folder)")
    given = parser.parse_args()
    about = described()  # before the run: the code may change meanwhile
    with tempfile.TemporaryDirectory() as place:
        reward, folder = Path(place) / "reward", Path(place) / "rl"
        subprocess.run([sys.executable, "-m", "perlcli", *REWARD, "--output", str(reward)], check=True)
        begin = time.monotonic()
        looks = watch([*RL, "--reward", str(reward), "--max-steps", str(given.steps)], folder)
        about["seconds"], files = round(time.monotonic() - begin, 1), written(folder)
    found = parts(looks, given.steps)
    path = Path(given.output) if given.output else HERE / "results" / "cpu-long-run"
    write(path, about, found, files)
    print(f"\n{shown(found)}\n\nWrote {path}.md and {path.name}.json")
    if grown := faults(found, given.limit_mb):
        raise SystemExit("The run grew: " + "; ".join(grown))


if __name__ == "__main__":
    main()

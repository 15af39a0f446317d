"""Whether a long run stays as it began: memory, open files and threads of 2,000 steps of `perl rl`, seen from outside.

    python benchmarks/long_run.py --steps 2000

Trains a reward model on the embedded base for a minute, then runs `perl rl` against it in a process of its own, whose
memory and open files it reads from /proc until it ends. Fails where the last quarter of the steps holds more than the
first. Needs Linux, no network and no GPU. README.md beside this file says more.
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
EVERY = 0.25  # seconds between two looks
PARTS = 4
REWARD = ("reward", "--max-steps", "60")
RL = (
    "rl", "--per-device-train-batch-size", "8", "--num-generations", "4", "--max-completion-length", "16",
    "--learning-rate", "2e-4", "--save-steps", "50",  # slow enough that lengths still vary at the end
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What the process held when the run had done so many steps."""

    step: int
    resident_mb: float
    private_mb: float  # of it, memory that no file backs
    files: int
    threads: int


@dataclass(frozen=True)
class Part:
    """What the process held over a part of the steps: medians of its looks, and the highest of handles."""

    steps: str
    looks: int
    resident_mb: float
    private_mb: float
    highest_mb: float
    files: float
    most_files: int
    threads: float


def look(pid: int, metrics: Path) -> Look | None:
    """What a process holds now; None where it has ended."""
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
    """Run `perl rl` in a process of its own, and what it held from its first step to its last."""
    command = [sys.executable, "-m", "perlcli", *words, "--output", str(folder)]
    # What is freed goes back at once: else glibc keeps some 50 MB of it, now more and now less.
    process = subprocess.Popen(command, env={**os.environ, **GIVE_BACK})
    looks = []
    while process.poll() is None:
        seen = look(process.pid, folder / record.METRICS)
        if seen is not None and seen.step > 0:
            looks.append(seen)
        time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(f"perl rl ended with {process.returncode}")
    return looks


def part(looks: Sequence[Look], first: int, last: int) -> Part:
    """The looks while the run was between two steps, as one."""
    within = [one for one in looks if first <= one.step <= last]
    if not within:
        raise SystemExit(f"No look at steps {first} to {last}: more --steps, please")
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
    # A look says which step was done last: after the run's own last one it saves, measures and draws
    return [part(looks, low + 1, high - (high == steps)) for low, high in pairwise(edges)]


def faults(found: Sequence[Part], limit_mb: float) -> list[str]:
    """In what the last quarter holds more than the first."""
    first, last = found[0], found[-1]
    pairs = (
        ("memory", first.resident_mb + limit_mb, last.resident_mb),
        ("open files", first.files, last.files), ("threads", first.threads, last.threads),
    )  # fmt: skip
    return [f"{name}: {now:g}, where {most:g} is the most" for name, most, now in pairs if now > most]


def written(folder: Path) -> dict[str, Any]:
    """How large a run's logs are, and the trainer's state in the first and last checkpoint that are left."""
    states = [(place / checkpoints.STATE).stat().st_size for place in checkpoints.found(folder / record.CHECKPOINTS)]
    rows = (folder / record.METRICS).read_bytes().splitlines()
    samples = (folder / record.SAMPLES).read_bytes()
    return {
        "metrics_bytes_a_step": round(sum(map(len, rows)) / len(rows)), "metrics_rows": len(rows),
        "samples_bytes": len(samples), "samples_rows": len(samples.splitlines()),
        "trainer_state_bytes": states[0], "record_bytes": (folder / record.RECORD).stat().st_size,
    }  # fmt: skip


def described() -> dict[str, Any]:
    """What the figures are measured on."""
    runs = [shlex.join(["perl", *REWARD]), shlex.join(["perl", *RL, "--reward", "REWARD"])]
    return measured.described("benchmarks/long_run.py", runs=runs)


def shown(found: Sequence[Part]) -> str:
    """The quarters as a Markdown table."""
    heads = ["steps", "memory MB", "of it private", "highest", "open files", "at most", "threads"]
    cells = [
        [one.steps, f"{one.resident_mb:.1f}", f"{one.private_mb:.1f}", f"{one.highest_mb:.1f}", f"{one.files:g}",
         f"{one.most_files}", f"{one.threads:g}"]
        for one in found
    ]  # fmt: skip
    return measured.markdown(heads, cells)


def write(path: Path, about: dict[str, Any], found: Sequence[Part], files: dict[str, Any]) -> None:
    """Keep the figures as JSON, and to read as Markdown."""
    content = {"about": about, "parts": [asdict(one) for one in found], "written": files}
    kept = "\n".join(f"- {name.replace('_', ' ')}: {count:,}" for name, count in files.items())
    text = f"{about['seconds']:g} seconds\n\n{shown(found)}\n\nAt its end the run had written:\n\n{kept}"
    measured.write(path, content, text)


def main() -> None:
    """Run, watch, show and keep the figures; exit 1 where the run grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--limit-mb", type=float, default=4.0, help="growth of memory that is still called flat")
    parser.add_argument("--output", help="where to write, without ending; default: results/cpu-long-run here")
    given = parser.parse_args()
    about = described()  # before the run: the code may change while it is at work
    with tempfile.TemporaryDirectory() as place:
        reward, folder = Path(place) / "reward", Path(place) / "rl"
        subprocess.run([sys.executable, "-m", "perlcli", *REWARD, "--output", str(reward)], check=True)
        begin = time.monotonic()
        looks = watch([*RL, "--reward", str(reward), "--max-steps", str(given.steps)], folder)
        about["seconds"], files = round(time.monotonic() - begin, 1), written(folder)
    found = parts(looks, given.steps)
    path = Path(given.output) if given.output else HERE / "results" / "cpu-long-run"
    write(path, about, found, files)
    print(f"\n{shown(found)}\n\nWritten: {path}.md and {path.name}.json")
    if grown := faults(found, given.limit_mb):
        raise SystemExit("The run grew: " + "; ".join(grown))


if __name__ == "__main__":
    main()

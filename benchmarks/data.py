"""Time and memory of `perl data check` on many preference rows; every row is checked and rendered.

    python benchmarks/data.py --rows 10000 100000 --model FOLDER

Makes the rows (seeded conversations of about 200 tokens), runs the command in a separate process for each count, and
saves its time and peak memory as JSON and Markdown. README.md in this folder says more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measured

HERE = Path(__file__).resolve().parent
TEXT = "the a coffee order with milk and large small please can you tell me about this how to make it work"


def message(role: str, length: int, chance: random.Random) -> dict[str, str]:
    """A message of `length` words."""
    words = TEXT.split()
    return {"role": role, "content": " ".join(chance.choices(words, k=length)).capitalize() + "."}


def pair(chance: random.Random) -> dict[str, Any]:
    """A preference row: a conversation of three turns and two answers."""
    prompt = [message(role, chance.randint(5, 60), chance) for role in ("user", "assistant", "user")]
    answers = ([message("assistant", chance.randint(5, 80), chance)] for _ in range(2))
    return {"prompt": prompt, "chosen": next(answers), "rejected": next(answers)}


@dataclass(frozen=True)
class Figures:
    """Time and memory of one `perl data check`."""

    rows: int
    file_mb: float
    seconds: float
    cpu_seconds: float
    peak_mb: float


def measure(path: Path, rows: int, model: list[str]) -> Figures:
    """Runs `perl data check` in a separate process, and shows its output."""
    words = [sys.executable, "-m", "perlcli", "data", "check", str(path), "--max-length", "1024", *model]
    begin = time.monotonic()
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)  # the peak of this process only
    seconds = time.monotonic() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"perl data check failed with exit code {process.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    busy = usage.ru_utime + usage.ru_stime
    return Figures(rows, path.stat().st_size / 1e6, round(seconds, 1), round(busy, 1), round(peak / 1e6, 1))


def described(model: str | None) -> dict[str, Any]:
    """What the figures were measured on."""
    return measured.described("benchmarks/data.py", model=Path(model).name if model else "the embedded coffee base")


def shown(found: list[Figures]) -> str:
    """The figures as a Markdown table."""
    heads = ["rows", "file MB", "seconds", "CPU seconds", "peak memory MB"]
    cells = [
        [f"{one.rows:,}", f"{one.file_mb:,.0f}", f"{one.seconds:.1f}", f"{one.cpu_seconds:.1f}", f"{one.peak_mb:,.0f}"]
        for one in found
    ]
    return measured.markdown(heads, cells)


def write(path: Path, about: dict[str, Any], found: list[Figures]) -> None:
    """Saves the figures as JSON and as Markdown."""
    content = {"about": about, "runs": [asdict(one) for one in found]}
    measured.write(path, content, f"Tokenizer: {about['model']}\n\n{shown(found)}")


def main() -> None:
    """Makes the rows, measures each count, and shows and saves the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--model", help="model whose tokenizer is used (default: the embedded coffee base)")
    parser.add_argument(
        "--output", help="output path without extension (default: results/cpu-data-MODEL in this folder)"
    )
    given = parser.parse_args()
    about, found = described(given.model), []
    with tempfile.TemporaryDirectory() as folder:
        for count in given.rows:
            chance, path = random.Random(count), Path(folder) / f"{count}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(pair(chance)) + "\n" for _ in range(count))
            found.append(measure(path, count, ["--model", given.model] if given.model else []))
            path.unlink()
    name = Path(given.model).name if given.model else "coffee"
    path = Path(given.output) if given.output else HERE / "results" / f"cpu-data-{name}"
    write(path, about, found)
    print(f"\n{shown(found)}\n\nWrote {path}.md and {path.name}.json")


if __name__ == "__main__":
    main()

"""How long `perl data check` takes over many preference rows, and how much memory: every row is checked and rendered.

    python benchmarks/data.py --rows 25000 100000

Makes the rows itself (conversations of some 200 tokens, seeded), runs the command in a process of its own for each
count, and prints the time and the peak of its memory. `perl data check` reads the file for each of sft, reward and rl,
and encodes a text that they share once.
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
from pathlib import Path
from typing import Any

from perlcli.report import table

TEXT = "the a coffee order with milk and large small please can you tell me about this how to make it work"


def message(role: str, length: int, chance: random.Random) -> dict[str, str]:
    """A message of some words."""
    words = TEXT.split()
    return {"role": role, "content": " ".join(chance.choices(words, k=length)).capitalize() + "."}


def pair(chance: random.Random) -> dict[str, Any]:
    """A preference row: a conversation of three turns and two answers."""
    prompt = [message(role, chance.randint(5, 60), chance) for role in ("user", "assistant", "user")]
    answers = ([message("assistant", chance.randint(5, 80), chance)] for _ in range(2))
    return {"prompt": prompt, "chosen": next(answers), "rejected": next(answers)}


def measure(path: Path, model: list[str]) -> tuple[float, float, float, str]:
    """Seconds by the clock and of CPU, and peak megabytes, of one `perl data check`, and what it printed."""
    words = [sys.executable, "-m", "perlcli", "data", "check", str(path), *model]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(words, stdout=said)
        _, status, usage = os.wait4(process.pid, 0)  # the peak of this process alone
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise SystemExit(f"perl data check ended with {process.returncode}")
    peak = usage.ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    return time.monotonic() - begin, usage.ru_utime + usage.ru_stime, peak, text


def main() -> None:
    """Make the rows, measure each count, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--model", help="model whose tokenizer counts (default: the embedded coffee base)")
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for count in given.rows:
            chance, path = random.Random(count), Path(folder) / f"{count}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(pair(chance)) + "\n" for _ in range(count))
            seconds, busy, peak, text = measure(path, ["--model", given.model] if given.model else [])
            print(text)
            size = path.stat().st_size / 1e6
            lines.append((f"{count:,}", f"{size:,.0f}", f"{seconds:.1f}", f"{busy:.1f}", f"{peak:,.0f}"))
            path.unlink()
    print(table(("rows", "file, MB", "seconds", "CPU seconds", "peak memory, MB"), lines))


if __name__ == "__main__":
    main()

"""RLOO compared with REINFORCE on the embedded task, over seeds: the table and the picture of docs/rl.md.

    python benchmarks/algorithms.py --runs runs/algorithms

Runs what is missing under --runs (per seed: sft, reward, rl with each algorithm, and an evaluation of each on 400
held-out orders), then writes docs/algorithms.png and prints the table. About 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

from perlcli.run import plots
from perlcli.run.metrics import Metric
from perlcli.text import plain_table
from perlcli.training.algorithms import PHASES, TIME

ALGORITHMS = ("rloo", "reinforce")
PANELS = (
    Metric(key="gold", panel="correct orders", is_share=True),
    Metric(key="kl", panel="KL to the anchor, per token"),
)


def perl(*words: object) -> None:
    """Runs one perlcli command in a separate process."""
    subprocess.run([sys.executable, "-m", "perlcli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a run if it finished, else None."""
    path = folder / "record.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record if record.get("status") == "finished" else None


def make(folder: Path, *words: object) -> dict[str, Any]:
    """The record of a run, which is run first if it hasn't finished yet."""
    if finished(folder) is None:
        perl(*words, "--output", folder, *(["--overwrite"] if folder.exists() else []))
    record = finished(folder)
    assert record is not None
    return record


def curve(folder: Path, key: str) -> list[float]:
    """A metric at every step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[key] for row in map(json.loads, lines) if row.get(key) is not None]


def main() -> None:
    """Runs what is missing, draws the picture, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture", type=Path, default=Path("docs/algorithms.png"))
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    rows: list[Any] = []
    runs: dict[str, list[Path]] = {name: [] for name in ALGORITHMS}
    for seed in given.seeds:
        place = given.runs / str(seed)
        make(place / "sft", "sft", "--seed", seed)
        make(place / "reward", "reward", "--seed", seed)
        judge = ("--reward", place / "reward", "--seed", seed)
        for name in ALGORITHMS:
            folder = place / name
            trained = make(folder, "rl", "--model", place / "sft", "--algorithm", name, *judge)
            found = make(place / f"eval-{name}", "eval", "--model", folder, *judge)["metrics"]
            runs[name].append(folder)
            step = sum(median(curve(folder, TIME + part)) for part in PHASES)
            rows.append((name, seed, found, trained, step))
    files = {name: [folder / "metrics.jsonl" for folder in folders] for name, folders in runs.items()}
    plots.compared(files, PANELS, given.picture)
    for name in ALGORITHMS:
        mine = [row for row in rows if row[0] == name]
        shares = [row[2]["gold"] for row in mine]
        print(f"{name}: {fmean(shares):.1%} correct (from {min(shares):.1%} to {max(shares):.1%})")
    header = (
        "algorithm",
        "seed",
        "SFT",
        "correct orders",
        "95 % interval",
        "mean reward",
        "KL per sequence",
        "s per step",
    )
    cells = [
        (
            name, str(seed), f"{m['anchor_gold']:.1%}", f"{m['gold']:.1%}",
            f"{m['gold_low']:.1%} to {m['gold_high']:.1%}",
            f"{m['mean_reward']:.2f}", f"{m['kl_k3_per_sequence']:.2f}", f"{step:.2f}",
        )
        for name, seed, m, _, step in rows
    ]  # fmt: skip
    print(plain_table(header, cells))


if __name__ == "__main__":
    main()

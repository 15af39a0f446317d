"""`perl rl` with completions by vLLM compared with the model in memory: seconds per step, and bytes sent per step.

    python benchmarks/vllm_rollouts.py --model FOLDER --vllm .vllm

`vllm_cpu.py` makes the environment. What TRL would send is the whole policy, since it merges the adapter into it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import measured
from vllm_cpu import serving

HERE = Path(__file__).resolve().parent
PHASES = ("sampling", "scoring", "anchor", "learning", "step")
REWARD = "def reward(completions, **_):\n    return [len(set(str(each))) / 20 for each in completions]\n"
WARM_UP = 1


def perl(*words: object) -> str:
    """What a perl command prints, in a process of its own. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "perlcli", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run(work: Path, given: argparse.Namespace, name: str, *words: object) -> dict[str, Any]:
    """The median seconds of each phase of a step, the MB sent, and how far the sampler was from training."""
    sizes = {
        "model": given.model, "data": work / "prompts.jsonl", "reward": f"{work / 'reward.py'}:reward",
        "output": work / name, "max-steps": given.steps, "per-device-train-batch-size": given.batch,
        "gradient-accumulation-steps": 1, "num-generations": given.generations, "eval-fraction": 0,
        "max-completion-length": given.tokens, "min-completion-length": given.tokens, "max-length": 512,
        "rollouts": name,
    }  # fmt: skip
    perl("rl", "--no-chat", *(word for key, value in sizes.items() for word in (f"--{key}", value)), *words)
    rows = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((work / name / "record.json").read_text())
    found = {phase: median(row[f"seconds/{phase}"] for row in rows[WARM_UP:]) for phase in PHASES}
    sent = record["guards"].get("sent")
    found["mb_sent"] = sent["bytes"] / sent["generations"] / 1e6 if sent else 0.0
    found["differs"] = max(row.get("sampler/diff_mean", 0.0) for row in rows)
    return found | {"mb_base": record["memory"]["mb"]["base"]}


def main() -> None:
    """Measures and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=Path, help="folder of a model")
    add("--vllm", type=Path, default=Path(".vllm"), help="environment with vllm")
    add("--steps", type=int, default=4)
    add("--batch", type=int, default=32, help="completions per step")
    add("--generations", type=int, default=4)
    add("--tokens", type=int, default=64, help="tokens per completion")
    add("--output", type=Path, default=HERE / "results" / "cpu-vllm-rollouts", help="path without extension")
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="vllm-rollouts-") as place:
        work = Path(place)
        (work / "reward.py").write_text(REWARD, encoding="utf-8")
        prompts = [{"prompt": f"Tell me in a few words about the number {n} and its neighbours."} for n in range(256)]
        (work / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
        for name in ("transformers", "merged"):
            found[name] = run(work, given, name)
            print(name, found[name], flush=True)
        command = perl("serve", given.model.resolve(), "--dtype", "bfloat16", "--max-model-len", 512).splitlines()[0]
        with serving(given.vllm / "bin" / "python", command, work / "server.txt") as url:
            found["vllm"] = run(work, given, "vllm", "--vllm-server-base-url", url)
            print("vllm", found["vllm"], flush=True)
    heads = ["--rollouts", "sampling s", "scoring s", "anchor s", "learning s", "step s", "MB sent", "differs"]
    rows = [
        [name, *(f"{one[phase]:.2f}" for phase in PHASES), f"{one['mb_sent']:.2f}", f"{one['differs']:.2g}"]
        for name, one in found.items()
    ]
    about = measured.described("benchmarks/vllm_rollouts.py", threads=os.environ.get("OMP_NUM_THREADS", "default"))
    base = found["transformers"]["mb_base"]
    more = f"The policy with its base, which TRL would send, has {base / 2:,.0f} MB in 16 bits."
    body = f"{measured.markdown(heads, rows)}\n\n{more}"
    measured.write(given.output, {"about": about, "runs": found}, body)


if __name__ == "__main__":
    main()

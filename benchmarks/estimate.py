"""Predictions of `perl estimate` compared with the peak memory of runs, on CUDA or, as resident memory, on a CPU.

    python benchmarks/estimate.py --model FOLDER --stages reward,sft,rl --arms full,lora
    python benchmarks/estimate.py --config llama-3.2-1b --arms full,lora,lora-8bit,lora-4bit --length 1024

Every arm of every stage runs `perl` in a fresh process on rows of one length; its record has the peak. README.md in
this folder says more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measured
import shapes
from command_lines import flag
from one_base import GIVE_BACK, MB

from perlcli import device, settings
from perlcli.arms import FULL, KINDS, Arm
from perlcli.memory import optimisers, plans
from perlcli.run import record

HERE = Path(__file__).resolve().parent
STAGES = {"sft": shapes.CHATS, "reward": shapes.PAIRS, "rl": shapes.PROMPTS}


@dataclass(frozen=True)
class Figures:
    """A run's peak in MB, predicted and measured; None if it did not finish. On a GPU that of loading is apart."""

    stage: str
    arm: str
    predicted_mb: float
    measured_mb: float | None
    predicted_loading_mb: float
    loading_mb: float | None
    reserved_mb: float | None  # on a GPU, by torch's allocator
    failure: str = ""

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        return self.predicted_mb / self.measured_mb if self.measured_mb else None


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="folder of a model with its tokenizer")
    what.add_argument("--config", choices=shapes.CONFIGS, help="random weights in the shape of this model")
    add("--stages", default="sft,reward,rl", help="which to run: " + ", ".join(STAGES))
    add("--arms", default="full,lora", help="which to run: " + ", ".join(KINDS))
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of what isn't quantised")
    add("--batch", type=int, default=4, help="rows, pairs or completions per step")
    add("--length", type=int, default=128, help="tokens per row")
    add("--completion", type=int, default=32, help="tokens per completion that RL samples")
    add("--rank", type=int, default=16, help="LoRA rank")
    add("--steps", type=int, default=3, help="optimiser steps")
    add("--algorithm", choices=["rloo", "reinforce"], default="rloo", help="algorithm of RL")
    add("--checkpointing", choices=["on", "off"], help="gradient checkpointing (default: on for a GPU)")
    add("--optim", default=optimisers.DEFAULT, help="optimiser, by its name in transformers")
    add(
        "--output",
        type=Path,
        help="output path without extension (default: results/DEVICE-estimate-MODEL in this folder)",
    )
    add("--work", type=Path, help="folder for the model and the runs (default: a temporary one)")
    found = parser.parse_args(words)
    for name, known in (("stages", STAGES), ("arms", KINDS)):
        wanted = getattr(found, name).split(",")
        if unknown := [word for word in wanted if word not in known]:
            parser.error(f"--{name} must be one or more of {', '.join(known)}, not {', '.join(unknown)}")
        setattr(found, name, wanted)
    return found


def measure(given: argparse.Namespace, work: Path) -> Iterator[Figures]:
    """Predicts and runs every arm of every stage."""
    model = given.model or work / "model"
    if given.config:
        shapes.make_model(given.config, model, "bfloat16", device.kind())
    rows = work / "rows"
    shapes.make_rows(model, rows, given.length, given.completion, given.steps * given.batch)
    model_memory = plans.Model(str(model))
    for stage in given.stages:
        for arm in given.arms:
            if stage == "rl" and arm == "full" and given.algorithm == "reinforce":
                continue  # its value model is an adapter
            predicted = model_memory.row(asked(given, stage, Arm(arm, None if arm == FULL else given.rank)))
            yield run(given, stage, arm, [model, rows, work], predicted)


def asked(given: argparse.Namespace, stage: str, arm: Arm) -> Any:
    """The run's settings."""
    values: dict[str, Any] = {
        **arm.options, "dtype": given.dtype, "per_device_train_batch_size": given.batch,
        "gradient_accumulation_steps": 1, "max_length": given.length, "optim": given.optim,
    }  # fmt: skip
    values["gradient_checkpointing"] = flag(checkpoints(given))
    if stage == "rl":
        values |= {"max_completion_length": given.completion, "algorithm": given.algorithm, "reward": ("reward",)}
    return settings.resolve(settings.build(settings.COMMANDS[stage], values), {})


def run(given: argparse.Namespace, stage: str, arm: str, places: list[Path], predicted: plans.Row) -> Figures:
    """Runs an arm of a stage in a fresh process, and reads its record. Raises SystemExit if it left none."""
    model, rows, work = places
    folder = work / f"{stage}-{arm}"
    words = [*perl_words(given, stage, arm), "--model", str(model), "--data", str(rows / STAGES[stage])]
    if stage == "rl":
        words += ["--reward", str(reward_for(given, arm, places))]
    error = perl([*words, "--output", str(folder)])
    if not (folder / "record.json").exists():
        raise SystemExit(f"perl {stage} ({arm}) failed:\n{error}")
    found = record.read_record(folder)
    figures = Figures(
        stage, arm, predicted.training / MB, found.memory.get("training_mb") if found.status == "finished" else None,
        predicted.prediction.loading / MB, found.memory.get("loading_mb"), found.memory.get("reserved_mb"),
        found.failure or "",
    )  # fmt: skip
    for path in folder.glob("*.safetensors"):
        path.unlink()
    print(" | ".join(cells(figures)), flush=True)
    return figures


def checkpoints(given: argparse.Namespace) -> bool:
    """Whether runs use gradient checkpointing."""
    return bool(given.checkpointing == "on" if given.checkpointing else device.kind() == "cuda")


def perl_words(given: argparse.Namespace, stage: str, arm: str) -> list[str]:
    """The options that every run of a stage has under an arm."""
    flags = [f"--{settings.dashed(name)}" for name in Arm(arm).options]
    words = [stage, *flags, "--max-steps", str(given.steps), "--per-device-train-batch-size", str(given.batch)]
    words += ["--gradient-accumulation-steps", "1", "--max-length", str(given.length), "--dtype", given.dtype]
    words += ["--lora-r", str(given.rank)] if arm != "full" else []
    words += ["--gradient-checkpointing", flag(checkpoints(given)), "--optim", given.optim]
    words += ["--no-chat"]  # a template's tokens would come on top of the rows' length
    if stage == "rl":
        words += ["--max-completion-length", str(given.completion), "--algorithm", given.algorithm]
        words += ["--num-generations", "1" if given.algorithm == "reinforce" else str(given.batch)]
        words += ["--min-completion-length", str(given.completion)]
    return words


def reward_for(given: argparse.Namespace, arm: str, places: list[Path]) -> Path:
    """A reward model for RL, trained for two steps: an adapter on the same base, or for full tuning a full model."""
    model, rows, work = places
    folder = work / f"reward-for-rl-{arm}"
    if not folder.exists():
        options = ["--model", str(model), "--data", str(rows / shapes.PAIRS), "--output", str(folder)]
        one = argparse.Namespace(**{**vars(given), "steps": 2})
        if error := perl([*perl_words(one, "reward", "lora" if arm == "full" else arm), *options]):
            raise SystemExit(f"perl reward (for RL) failed:\n{error}")
    if arm != "full":
        return folder
    full = work / "full-reward-for-rl"
    if not full.exists() and (error := perl(["merge", str(folder), "--output", str(full)])):
        raise SystemExit(f"perl merge failed:\n{error}")
    return full


def perl(words: list[str]) -> str:
    """Runs a command in a separate process; returns its last output if it failed, else an empty text."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (GIVE_BACK if device.kind() == "cpu" else {})
    command = [sys.executable, "-m", "perlcli", *words]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return (found.stdout + found.stderr)[-4000:] if found.returncode else ""


def cells(figures: Figures) -> list[str]:
    """A row of the table."""
    measured_mb = [figures.failure.split(":")[0], ""]
    if figures.measured_mb is not None:
        measured_mb = [f"{figures.measured_mb:,.0f}", f"{figures.ratio:.2f}"]
    row = [figures.stage, figures.arm, f"{figures.predicted_mb:,.0f}", *measured_mb]
    if device.kind() == "cpu":
        return row
    loading = "" if figures.loading_mb is None else f"{figures.loading_mb:,.0f}"
    return [*row, f"{figures.predicted_loading_mb:,.0f}", loading]


def table(found: list[Figures]) -> str:
    """The figures as Markdown; on a CPU loading is part of what is measured in training."""
    heads = ["stage", "arm", "predicted MB", "measured MB", "predicted / measured"]
    heads += ["loading: predicted MB", "loading: measured MB"] if device.kind() == "cuda" else []
    return measured.markdown(heads, [cells(figures) for figures in found])


def described(given: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on, and how."""
    names = ("dtype", "batch", "length", "completion", "rank", "steps", "algorithm", "checkpointing", "optim")
    return measured.described(
        "benchmarks/estimate.py",
        device.kind(),
        model=given.config or given.model.name,
        settings={name: getattr(given, name) for name in names},
    )


def write(path: Path, about: dict[str, Any], found: list[Figures]) -> None:
    """Saves the figures as JSON and as Markdown."""
    runs = [asdict(figures) | {"ratio": figures.ratio} for figures in found]
    measured.write(path, {"about": about, "runs": runs}, table(found))


def main() -> None:
    """Predicts, measures, shows and saves."""
    given = parse()
    with tempfile.TemporaryDirectory(prefix="estimate-") as folder:
        work = (given.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        found = list(measure(given, work))
        about = described(given)
    short = measured.short_name(device.kind(), about["device"])
    path = given.output or HERE / "results" / f"{short}-estimate-{about['model']}"
    write(path, about, found)
    print(f"\n{table(found)}\n\nWrote {path}.md and {path.name}.json")


if __name__ == "__main__":
    main()

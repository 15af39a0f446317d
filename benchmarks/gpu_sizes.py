"""What fits on a GPU of 8 to 80 GB, as `perl estimate` predicts it; docs/gpu.md shows it.

    python benchmarks/gpu_sizes.py

Writes docs/gpu.json. It takes minutes, and needs neither weights nor a GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perlcli import settings
from perlcli.arms import Arm
from perlcli.text import markdown_table

if TYPE_CHECKING:
    from perlcli.memory.prediction import Plan, Shape  # the tables don't need torch

HERE = Path(__file__).resolve().parent
PATH = HERE.parent / "docs" / "gpu.json"
MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen3-14b", "qwen3-32b")
STAGES: tuple[settings.Use, ...] = ("sft", "reward", "rl")
GPUS = (8, 16, 24, 48, 80)
GIB = 2**30
ARMS = {"16": Arm("lora", 16), "4": Arm("lora-4bit", 16)}  # by the bits of the base
OPTIMISERS = ("adamw_torch_fused", "paged_adamw_8bit")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def plan_of(stage: settings.Use, arm: Arm, **more: Any) -> Plan:
    """A run with the defaults of `perl STAGE` on a GPU, with gradient checkpointing."""
    from perlcli.memory.prediction import Plan

    passes = 4 if stage == "rl" else 1
    targets = () if arm.is_full else ATTENTION
    plan = Plan(stage, arm, targets, dtype="bfloat16", accumulation=passes, checkpointing=True, cuda=True)
    return Plan(**(vars(plan) | more))


def shape_of(name: str) -> Shape:
    """The shape of one of MODELS, stored in bfloat16."""
    import shapes
    from transformers import AutoConfig

    from perlcli.memory import prediction

    values = dict(shapes.CONFIGS[name])
    config = AutoConfig.for_model(values.pop("architecture"), **values, dtype="bfloat16")
    return prediction.shape_of(config, name)


def needed(shape: Shape, plan: Plan) -> float:
    """The GiB that a GPU needs for a run."""
    from perlcli.memory import prediction

    return round(prediction.takes(prediction.predict(shape, plan), plan) / GIB, 1)


def figures(name: str) -> dict[str, Any]:
    """By stage and bits: the GiB that the default batch needs, and the largest batch on each of GPUS. For full tuning
    the GiB by optimiser."""
    from perlcli.memory import prediction

    shape = shape_of(name)
    found: dict[str, Any] = {}
    for stage in STAGES:
        for bits, arm in ARMS.items():
            plan = plan_of(stage, arm)
            batches = [prediction.largest_batch(shape, plan, size * GIB) for size in GPUS]
            found[f"{stage} {bits}"] = {"gib": needed(shape, plan), "batches": batches}
    for optim in OPTIMISERS:
        found[f"full {optim}"] = {"gib": needed(shape, plan_of("sft", Arm("full"), optim=optim))}
    return {"parameters": shape.parameters, "figures": found}


def table(stage: str) -> str:
    """The largest batches of a stage on each GPU as Markdown, from docs/gpu.json."""
    rows = []
    for name, of_model in json.loads(PATH.read_text(encoding="utf-8")).items():
        for bits in ARMS:
            row = of_model["figures"][f"{stage} {bits}"]
            cells = [str(batch) if batch else "-" for batch in row["batches"]]
            rows.append([name, bits, f"{row['gib']:.1f}", *cells])
    return markdown_table(["model", "bits", "GiB for 8 x 1,024", *(f"{size} GB" for size in GPUS)], rows, left=1)


def full_table() -> str:
    """The GiB of full tuning by optimiser as Markdown, from docs/gpu.json."""
    content = json.loads(PATH.read_text(encoding="utf-8")).items()
    rows = [
        [name, *(f"{of_model['figures'][f'full {optim}']['gib']:.1f}" for optim in OPTIMISERS)]
        for name, of_model in content
    ]
    return markdown_table(["model", *(f"`{optim}`, GiB" for optim in OPTIMISERS)], rows, left=1)


def main() -> None:
    """Predicts all models and writes the file."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {}
    for name in MODELS:
        found[name] = figures(name)
        print(name, found[name], flush=True)
    PATH.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

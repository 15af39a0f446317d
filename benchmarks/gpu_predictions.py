"""What `perl estimate` predicts for the jobs of gpu_proof.py, made on a CPU so that it takes no time of the GPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shapes
from command_lines import flag
from gpu_jobs import REWARD, RL, Job
from one_base import MB

LOADING, TRAINING = "loading", "training"


def predict(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """The MB that each run of perlcli is predicted to need: while it loads, while it trains (the highest of the other
    phases), and in each phase. Runs of trl have no prediction."""
    from perlcli.memory import prediction

    models: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for job in jobs:
        given = settings_of(job)
        if given is None:
            continue
        shape = job.values["shape"]
        if shape not in models:
            models[shape] = model_of(shape)
        model = models[shape]
        plan = model.plan(given, model.arm_of(given), on_gpu=True)
        phases: dict[str, float] = {}
        for phase in prediction.predict(model.shape, plan).phases:
            phases[phase.name] = round(max(phase.total / MB, phases.get(phase.name, 0.0)), 1)
        training = max(size for name, size in phases.items() if name != LOADING)
        found[job.name] = {LOADING: phases[LOADING], TRAINING: training, "phases": phases}
    return found


def settings_of(job: Job) -> Any:
    """The settings of the run that this job starts; None unless it is a run of perlcli."""
    from perlcli import settings
    from perlcli.arms import Arm

    values = job.values
    own: dict[str, Any] = {"dtype": "bfloat16", "gradient_accumulation_steps": 1}
    if job.kind == REWARD:
        own |= Arm(values["arm"]).options | {"max_length": values["length"]}
        own["gradient_checkpointing"] = flag(values["checkpointing"])
        own["set"] = (*own.get("set", ()), *values["words"][1::2])
    elif job.kind == RL and values["arm"].startswith("perl"):
        own |= {"load_in_4bit": True} if values["precision"] == "4bit" else {}
        own |= {
            "lora_r": values["rank"], "num_generations": values["generations"],
            "max_completion_length": values["tokens"], "max_length": values["prompt_tokens"] + values["tokens"],
            "reward": ("reward",) * (4 if values["arm"] == "perl-4-rewards" else 1), "gradient_checkpointing": "true",
        }  # fmt: skip
    else:
        return None
    own["per_device_train_batch_size"] = values["batch"]
    return settings.resolve(settings.build(settings.COMMANDS[job.kind], own), {})


def model_of(shape: str) -> Any:
    """The model of this shape as `perl estimate` reads it: only its config is written."""
    from transformers import AutoConfig

    from perlcli.memory import plans

    values = dict(shapes.CONFIGS[shape])
    kind = values.pop("architecture")
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(kind, **values, dtype="bfloat16").save_pretrained(folder)
        return plans.Model(folder)


def read(path: Path | None) -> dict[str, dict[str, Any]]:
    """Predictions from a file; empty without one."""
    return {} if path is None else dict(json.loads(path.read_text(encoding="utf-8"))["jobs"])

"""`perl estimate`: predicts the memory that each way to train needs, from the model's config only."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

from perlcli import settings
from perlcli.memory.plans import STAGES, Asked, Model, Row, parse_arms, parse_gpu, row_of, stock, table
from perlcli.memory.prediction import (
    CUDA_WORKSPACE,
    Arm,
    Shape,
    device_bytes,
)
from perlcli.terminal import say

ASSUMED = (
    "GB of 10^9 bytes, at the moment when most is held. Every row has the full length; AdamW in float32; on a GPU {} "
    "MB for cuBLAS are in the peak, and what must fit is the peak, 5 % and 600 MB for the driver."
)


def run(given: settings.Estimate) -> None:
    """Print what each stage takes under each arm, and what fits. Raises PerlError."""
    values = settings.resolve(given, {})
    values = replace(
        values, train=replace(values.train, gradient_accumulation_steps=given.train.gradient_accumulation_steps)
    )
    if values.estimate.stage not in ("rl", "all"):  # nothing is sampled: no completion needs room
        values = replace(values, rl=replace(values.rl, num_generations=None))
    settings.check(values)
    limit = parse_gpu(values.estimate.gpu) if values.estimate.gpu else device_bytes()
    arms = parse_arms(values.estimate.arms, str(values.estimate.lora_r))
    stages = STAGES if values.estimate.stage == "all" else (values.estimate.stage,)
    model = Model(values.model.model, trust_remote_code=values.model.trust_remote_code)
    plans = {stage: [model.plan(asked_for(values, stage, arm, limit)) for arm in arms] for stage in stages}
    rows = {stage: [row_of(model.shape, plan, limit) for plan in found] for stage, found in plans.items()}
    if "rl" in rows:
        rows["rl"] += [row_of(model.shape, plan, limit) for plan in map(stock, plans["rl"]) if plan.arm.rank]
    say(as_json(model.shape, rows, limit) if values.estimate.json else text(model.shape, rows, limit))


def asked_for(values: settings.Estimate, stage: settings.Use, arm: Arm, limit: int | None) -> Asked:
    """A stage's run under an arm with the options of `perl estimate`, on a GPU where one is named or at hand."""
    train, rl = values.train, values.rl
    return Asked(
        stage,
        kind=arm.name,
        rank=arm.rank,
        target_modules=str(values.estimate.lora_target_modules),
        dtype=values.model.dtype,
        batch=int(train.per_device_train_batch_size or 1),
        accumulation=train.gradient_accumulation_steps,
        max_length=int(train.max_length or 1),
        max_completion_length=int(rl.max_completion_length or 1),
        algorithm=rl.algorithm,
        rewards=rl.rewards,
        checkpointing=train.gradient_checkpointing,
        on_gpu=limit is not None,
    )


def text(shape: Shape, rows: dict[settings.Use, list[Row]], limit: int | None) -> str:
    """A table for each stage, and what was assumed."""
    parts = [f"{shape.name}: {shape.parameters / 1e6:,.1f} M parameters, from its config alone"]
    for stage, found in rows.items():
        plan = found[0].plan
        what = f"perl {stage}: {plan.dtype}, batch {plan.batch} x {plan.length} tokens"
        what += f" ({plan.completion} of them written, {plan.accumulation} passes a step)" if stage == "rl" else ""
        what += f", gradient checkpointing {'on' if plan.checkpointing else 'off'}"
        parts.append(what + "\n\n" + table(found, limit))
    parts.append(ASSUMED.format(round(CUDA_WORKSPACE / 1e6)))
    return "\n\n".join(parts)


def as_json(shape: Shape, rows: dict[settings.Use, list[Row]], limit: int | None) -> str:
    """The same for programs, in bytes."""
    stages = {stage: [as_dict(row) for row in found] for stage, found in rows.items()}
    top = {"model": shape.name, "parameters": shape.parameters, "limit": limit, "stages": stages}
    return json.dumps(top, indent=2)


def as_dict(row: Row) -> dict[str, Any]:
    """A row for programs."""
    found = row.found
    return {
        "arm": row.name, "plan": dataclasses.asdict(row.plan), "weights": found.weights, "adapters": found.adapters,
        "gradients": found.gradients, "optimiser": found.optimiser, "peak": found.peak, "phase": found.highest.name,
        "phases": [{"name": phase.name, "total": phase.total, **phase.parts} for phase in found.phases],
        "fits": row.fits, "largest_batch": row.largest,
    }  # fmt: skip

"""`perl estimate`: predicts the memory that each way to train needs, from the model's config only."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from perlcli import arms, device, settings
from perlcli.arms import Arm
from perlcli.errors import PerlError
from perlcli.memory import plans
from perlcli.memory.plans import Row
from perlcli.memory.prediction import Shape, device_bytes, held_line, workspace
from perlcli.terminal import say

STAGES: tuple[settings.Use, ...] = get_args(settings.Use)
ASSUMED = (
    "GB are 10^9 bytes, at the moment when the most is held. Assumed: every row has the full length; {}. On a GPU the "
    "peak includes {:.0f} MB for cuBLAS{}; an arm fits if its peak, plus 5 % and 600 MB for the driver, does."
)
Rows = Mapping[settings.Use, Sequence[Row]]


def run(given: settings.Estimate) -> None:
    """Print what each stage takes under each arm, and what fits. Raises PerlError."""
    values = resolved(given)
    limit = plans.parse_gpu(values.estimate.gpu) if values.estimate.gpu else device_bytes()
    chosen = arms.every(
        arms.parse_kinds(values.estimate.arms),
        parse_ranks(str(values.estimate.lora_r)),
        arms.parse_module_sets(str(values.estimate.lora_target_modules)),
    )
    stages = STAGES if values.estimate.stage == "all" else (values.estimate.stage,)
    model = plans.Model(values.model.model, trust_remote_code=values.model.trust_remote_code)
    rows: dict[settings.Use, list[Row]] = {}
    for stage in stages:
        planned = [model.plan(run_of(values, stage, arm), arm, on_gpu=limit is not None) for arm in chosen]
        if stage == "rl":  # and with a copy of the base for each role, as in stock TRL
            planned += [replace(plan, one_base=False, group=1) for plan in planned if not plan.arm.is_full]
        rows[stage] = [plans.row_of(model.shape, plan, limit) for plan in planned]
    say(as_json(model.shape, rows, limit) if values.estimate.json else text(model.shape, rows, limit))


def resolved(given: settings.Estimate) -> settings.Estimate:
    """The settings with what is unset filled in, but for what depends on the stage. Raises PerlError."""
    values = settings.resolve(given, {})
    passes = given.train.gradient_accumulation_steps
    values = replace(values, train=replace(values.train, gradient_accumulation_steps=passes))
    if values.estimate.stage not in ("rl", "all"):  # nothing is sampled, so no completion needs room
        values = replace(values, rl=replace(values.rl, num_generations=None))
    settings.check(values)
    return values


def run_of(values: settings.Estimate, stage: settings.Use, arm: Arm) -> settings.Training:
    """The settings of a stage's run under an arm, with the options of `perl estimate`."""
    train, rl = values.train, values.rl
    options: dict[str, object] = {
        "model": values.model.model,
        "dtype": values.model.dtype,
        "lora_target_modules": values.estimate.lora_target_modules,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "max_length": train.max_length,
        "gradient_checkpointing": train.gradient_checkpointing,
        "optim": train.optim,
        **arm.options,
    }
    if stage == "rl":
        options |= {"max_completion_length": rl.max_completion_length, "algorithm": rl.algorithm}
        options |= {"num_generations": rl.num_generations, "shared_prompts": rl.shared_prompts}
        options["reward"] = ("reward",) * rl.rewards
    return settings.resolve(settings.build(settings.COMMANDS[stage], options), {})


def parse_ranks(words: str) -> list[int]:
    """The ranks in a comma-separated list. Raises PerlError for one that is not a whole number above 0."""
    ranks = [word.strip() for word in words.split(",")]
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", rank) for rank in ranks):
        raise PerlError(f"--lora-r must be whole numbers above 0, comma-separated, not {words}", "--lora-r 1,4,16")
    return [int(rank) for rank in ranks]


def text(shape: Shape, rows: Rows, limit: int | None) -> str:
    """A table for each stage, and what was assumed."""
    parts = [f"{shape.name}: {shape.parameters / 1e6:,.1f} M parameters, predicted from its config"]
    for stage, arm_rows in rows.items():
        plan = arm_rows[0].plan
        line = f"perl {stage}: {plan.dtype}, batch {plan.batch} x {plan.length} tokens"
        if stage == "rl":
            line += f" ({plan.completion} of them sampled, {plan.accumulation} passes per step"
            line += f", each prompt computed once for {plan.group} completions)" if plan.group > 1 else ")"
        if limit is None:
            line += f", gradient checkpointing {'on' if plan.checkpointing else 'off'}"
        parts.append(f"{line}\n\n{plans.table(arm_rows, limit)}")
        advised = filter(None, (plans.advice(shape, row, limit) for row in arm_rows))
        parts += ["\n".join(advised)]
    if shape.experts:
        parts.append(of_experts(shape, rows))
    parts.append(assumed(rows))
    return "\n\n".join(filter(None, parts))


def of_experts(shape: Shape, rows: Rows) -> str:
    """What is particular to a mixture of experts."""
    lines = [
        "A mixture of experts: every token goes to as many experts, and transformers multiplies all of them at once."
    ]
    lines += ["So the routing doesn't change the memory: the expected and the worst case are the same."]
    quantised = {(row.plan.arm.bits, row.plan.dtype) for each in rows.values() for row in each if row.plan.arm.bits}
    lines += [held_line(shape, bits, dtype) for bits, dtype in sorted(quantised)]
    return "\n".join(lines)


def assumed(rows: Rows) -> str:
    """What the predictions assume, in a paragraph."""
    optim = next(row.plan.optim for arm_rows in rows.values() for row in arm_rows)
    place = "" if device.kind() == "cuda" else ", as on Hopper and later"
    states = f"the optimiser {optim}, with states in float32 unless it has 8 bits"
    return ASSUMED.format(states, workspace() / 1e6, place)


def as_json(shape: Shape, rows: Rows, limit: int | None) -> str:
    """The same for programs, in bytes."""
    stages = {stage: [as_dict(row) for row in arm_rows] for stage, arm_rows in rows.items()}
    return json.dumps({"model": shape.name, "parameters": shape.parameters, "limit": limit, "stages": stages}, indent=2)


def as_dict(row: Row) -> dict[str, Any]:
    """A row for programs."""
    prediction, arm = row.prediction, row.plan.arm
    shown = {"name": arm.kind, "rank": arm.rank or 0, "bits": arm.bits, "dora": arm.is_dora}
    return {
        "arm": row.name,
        "plan": dataclasses.asdict(row.plan) | {"arm": shown},
        "weights": prediction.weights,
        "adapters": prediction.adapters,
        "gradients": prediction.gradients,
        "optimiser": prediction.optimiser,
        "optimiser_paged": prediction.paged,
        "peak": prediction.peak,
        "loading": prediction.loading,
        "training": prediction.training,
        "phase": prediction.highest.name,
        "phases": [{"name": phase.name, "total": phase.total, **phase.parts} for phase in prediction.phases],
        "fits": row.fits,
        "largest_batch": row.largest,
    }

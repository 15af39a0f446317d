"""`perl estimate`: the memory that each way to train will take, from the model's config alone."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from perlcli import base, device, report, settings
from perlcli.errors import PerlError, nearest
from perlcli.estimate_memory import (
    Arm,
    Plan,
    Prediction,
    Shape,
    cache_bytes,
    device_bytes,
    largest_batch,
    predict,
    shape_of,
    takes,
)

STAGES: tuple[settings.Use, ...] = ("sft", "reward", "rl")
ARMS = {"full": (False, 0), "lora": (False, 0), "lora-8bit": (False, 8), "lora-4bit": (False, 4),
        "dora": (True, 0), "dora-8bit": (True, 8), "dora-4bit": (True, 4)}  # fmt: skip
GB, GIB = 10**9, 2**30
HEADER = ("arm", "weights", "adapters", "optimiser", "gradients", "activations", "KV cache", "peak", "of full")
ASSUMED = (
    "GB of 10^9 bytes, at the moment when most is held. Every row has the full length; AdamW in float32; on a GPU {} "
    "MB for cuBLAS are in the peak, and what must fit is the peak, 5 % and 600 MB for the driver."
)


@dataclass(frozen=True)
class Row:
    """An arm of a stage, predicted."""

    plan: Plan
    name: str
    found: Prediction
    fits: bool | None  # None: no GPU to hold it against
    largest: int | None


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
    stages = parse_stage(values.estimate.stage)
    source = base.locate(values.model.model, trust_remote_code=values.model.trust_remote_code)
    shape = shape_of(source.config, source.base_name, trust_remote_code=values.model.trust_remote_code)
    plans = {stage: [plan_of(values, source, stage, arm, limit) for arm in arms] for stage in stages}
    rows = {stage: [row_of(shape, plan, limit) for plan in found] for stage, found in plans.items()}
    if "rl" in rows:
        rows["rl"] += [row_of(shape, plan, limit) for plan in map(stock, plans["rl"]) if plan.arm.rank]
    print(as_json(shape, rows, limit) if values.estimate.json else text(shape, rows, limit))


def parse_gpu(words: str) -> int:
    """The bytes of `24`, `24GB` or `24GiB`, all GiB as GPUs are sold; raises PerlError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gi?b?)?\s*", words, re.IGNORECASE)
    if not found or not float(found[1]) > 0:
        raise PerlError(f"--gpu {words} is no size of memory", "--gpu 24GB")
    return int(float(found[1]) * GIB)


def parse_stage(word: str) -> tuple[settings.Use, ...]:
    """The stages that are named; raises PerlError for an unknown one."""
    found = [stage for stage in STAGES if word in (stage, "all")]
    if not found:
        raise PerlError(
            f"There is no stage {word}", nearest(word, [*STAGES, "all"]) or "perl estimate sft|reward|rl|all"
        )
    return tuple(found)


def parse_arms(words: str, ranks: str) -> list[Arm]:
    """An arm for each name and rank; raises PerlError for an unknown name or a rank that is none."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        raise PerlError(f"--arms: there is no arm {', '.join(unknown) or 'at all'}", f"arms: {', '.join(ARMS)}")
    numbers = [word.strip() for word in ranks.split(",")]
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise PerlError(f"--lora-r must be whole numbers above 0, comma-separated, not {ranks}", "--lora-r 1,4,16")
    found = []
    for name in names:
        is_dora, bits = ARMS[name]
        found += [Arm("full")] if name == "full" else [Arm(name, int(rank), bits, is_dora) for rank in numbers]
    return found


def plan_of(values: settings.Estimate, source: base.Source, stage: settings.Use, arm: Arm, limit: int | None) -> Plan:
    """What `perl STAGE` would do with these settings under this arm, on a GPU where one is named or at hand."""
    on_gpu, has_anchor = limit is not None, stage == "rl" and source.adapter is not None
    model = settings.ModelSettings(dtype=values.model.dtype, load_in_8bit=arm.bits == 8, load_in_4bit=arm.bits == 4)
    dtype = device.dtype_name(model)
    if on_gpu and values.model.dtype == "auto":
        dtype = "bfloat16"
    asked = values.train.gradient_checkpointing
    targets = base.target_modules(skeleton_of(source, values), str(values.estimate.lora_target_modules))
    return Plan(
        stage, arm, targets if isinstance(targets, str) else tuple(targets), dtype,
        int(values.train.per_device_train_batch_size or 1), int(values.train.max_length or 1),
        int(values.rl.max_completion_length or 1), passes(values, stage), on_gpu if asked is None else asked,
        values.rl.algorithm == "reinforce", values.rl.rewards, has_anchor, True, on_gpu,
    )  # fmt: skip


def passes(values: settings.Estimate, stage: settings.Use) -> int:
    """Passes a step: as given, else as the stage's own default."""
    return int(values.train.gradient_accumulation_steps or (settings.RL_ACCUMULATION if stage == "rl" else 1))


def skeleton_of(source: base.Source, values: settings.Estimate) -> Any:
    """The base's modules; raises PerlError where it has none that can be had without weights."""
    found = base.skeleton(source, trust_remote_code=values.model.trust_remote_code)
    if found is None:
        raise PerlError(f"{source.base_name} can't be built as a causal language model", "name another --model")
    return found


def stock(plan: Plan) -> Plan:
    """The same with a copy of the base for each role, as stock TRL has them."""
    return replace(plan, one_base=False)


def row_of(shape: Shape, plan: Plan, limit: int | None) -> Row:
    """The prediction, and whether and with which batch it fits."""
    found = predict(shape, plan)
    name = plan.arm.name + (f" r{plan.arm.rank}" if plan.arm.rank else "") + ("" if plan.one_base else ", stock copies")
    if limit is None:
        return Row(plan, name, found, None, None)
    return Row(plan, name, found, takes(found, plan) <= limit, largest_batch(shape, plan, limit))


def text(shape: Shape, rows: dict[settings.Use, list[Row]], limit: int | None) -> str:
    """A table for each stage, and what was assumed."""
    parts = [f"{shape.name}: {shape.parameters / 1e6:,.1f} M parameters, from its config alone"]
    for stage, found in rows.items():
        plan = found[0].plan
        what = f"perl {stage}: {plan.dtype}, batch {plan.batch} x {plan.length} tokens"
        what += f" ({plan.completion} of them written, {plan.accumulation} passes a step)" if stage == "rl" else ""
        what += f", gradient checkpointing {'on' if plan.checkpointing else 'off'}"
        header = [*HEADER, *([f"fits {limit / GIB:.3g} GiB", "largest batch"] if limit is not None else [])]
        parts.append(what + "\n\n" + report.table(header, [cells(row, found) for row in found]))
    parts.append(ASSUMED.format(42))
    return "\n\n".join(parts)


def cells(row: Row, rows: list[Row]) -> list[str]:
    """A row of the table."""
    parts = row.found.highest.parts
    full = next((other.found.peak for other in rows if not other.plan.arm.rank), None)
    sizes = [parts.get(name, 0) for name in ("weights", "adapters", "optimiser", "gradients")]
    sizes += [parts.get("activations", 0) + parts.get("logits", 0), cache_bytes(row.found), row.found.peak]
    found = [row.name, *(gigabytes(size) for size in sizes), f"{row.found.peak / full:.2f}" if full else ""]
    if row.fits is None:
        return found
    return [*found, "yes" if row.fits else "no", str(row.largest) if row.largest else "none"]


def gigabytes(size: int) -> str:
    """Bytes as GB, to three figures or so."""
    return f"{size / GB:,.1f}" if size >= 10 * GB else f"{size / GB:.3f}"


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

"""What a run would hold in memory: from options or settings to a plan that can be predicted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from perlcli import device, settings
from perlcli.errors import PerlError
from perlcli.memory.prediction import (
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
from perlcli.model import adapters, sources
from perlcli.model.target_modules import target_modules
from perlcli.text import clip, plain_table

STAGES: tuple[settings.Use, ...] = ("sft", "reward", "rl")
FULL = "full"
ARMS = {FULL: (False, 0), "lora": (False, 0), "lora-8bit": (False, 8), "lora-4bit": (False, 4),
        "dora": (True, 0), "dora-8bit": (True, 8), "dora-4bit": (True, 4)}  # fmt: skip
GB, GIB = 10**9, 2**30
HEADER = ("arm", "weights", "adapters", "optimiser", "gradients", "activations", "KV cache", "peak", "of full")


@dataclass(frozen=True)
class Asked:
    """A run whose memory is asked for, in the words of its options."""

    stage: settings.Use
    kind: str = "lora"  # one of ARMS
    rank: int = 16
    target_modules: str = settings.ATTENTION
    dtype: settings.Dtype = "auto"
    batch: int = 8  # per device: rows, pairs or completions
    accumulation: int | None = None  # None: the stage's own default
    max_length: int = 1024
    max_completion_length: int = 128
    algorithm: settings.Algorithm = "rloo"
    rewards: int = 1
    checkpointing: bool | None = None  # None: on for a GPU, as in training
    on_gpu: bool | None = None  # None: where there is one


@dataclass(frozen=True)
class Row:
    """An arm of a stage, predicted."""

    plan: Plan
    name: str
    found: Prediction
    fits: bool | None  # None: no GPU to hold it against
    largest: int | None

    @property
    def peak(self) -> int:
        """The most bytes that it holds at once."""
        return self.found.peak


class Model:
    """A model whose runs are predicted: its config is read once. Raises PerlError where there is none to predict."""

    def __init__(self, name: str | None, *, trust_remote_code: bool = False) -> None:
        self.source = sources.locate(name, trust_remote_code=trust_remote_code)
        self.shape = shape_of(self.source.config, self.source.base_name, trust_remote_code=trust_remote_code)
        skeleton = sources.skeleton(self.source, trust_remote_code=trust_remote_code)
        if skeleton is None:
            raise PerlError(f"{self.source.base_name} can't be built without its weights", "name another --model")
        self.skeleton = skeleton

    def row(self, asked: Asked, limit: int | None = None) -> Row:
        """The run's prediction, and with a limit in bytes whether it fits, and with which batch."""
        return row_of(self.shape, self.plan(asked), limit)

    def asked(self, given: settings.Training) -> Asked:
        """What a run of `perl sft|reward|rl` on this model asks for; an adapter goes on with its own rank and modules.

        Raises PerlError for an adapter that is no LoRA.
        """
        found, own = asked_of(given), self.source.adapter_config
        if own is None or found.kind == FULL:
            return found
        lora = adapters.as_lora(own)
        if lora is None:
            raise PerlError(f"{self.source.name} is {adapters.words(own)}, and LoRA and DoRA alone are predicted")
        modules = lora.target_modules or []
        names = modules if isinstance(modules, str) else ",".join(sorted(modules))
        kind = found.kind.replace("lora", "dora") if lora.use_dora else found.kind
        return replace(found, kind=kind, rank=lora.r, target_modules=names)

    def plan(self, asked: Asked) -> Plan:
        """What `perl STAGE` would do under these options."""
        if asked.kind not in ARMS:
            raise PerlError(f"There is no arm {asked.kind}", f"arms: {', '.join(ARMS)}")
        is_dora, bits = ARMS[asked.kind]
        arm = Arm(asked.kind) if asked.kind == FULL else Arm(asked.kind, asked.rank, bits, is_dora)
        on_gpu = device_bytes() is not None if asked.on_gpu is None else asked.on_gpu
        passes = asked.accumulation or (settings.RL_ACCUMULATION if asked.stage == "rl" else 1)
        return Plan(
            asked.stage, arm, self.targets(asked) if arm.rank else (), dtype_of(asked.dtype, arm, on_gpu=on_gpu),
            asked.batch, asked.max_length, asked.max_completion_length, passes,
            on_gpu if asked.checkpointing is None else asked.checkpointing,
            asked.stage == "rl" and asked.algorithm == "reinforce" and arm.rank > 0, asked.rewards,
            asked.stage == "rl" and self.source.adapter is not None, True, on_gpu,
        )  # fmt: skip

    def targets(self, asked: Asked) -> tuple[str, ...] | str:
        """The modules that get an adapter. Raises PerlError for one that the model lacks."""
        found = target_modules(self.skeleton, asked.target_modules)
        return found if isinstance(found, str) else tuple(found)


def dtype_of(wanted: settings.Dtype, arm: Arm, *, on_gpu: bool) -> str:
    """The dtype of what isn't quantised, on the machine at hand or on a GPU that isn't."""
    if on_gpu and wanted == "auto" and device.kind() == "cpu":
        return "bfloat16"
    return device.dtype_name(
        settings.ModelSettings(dtype=wanted, load_in_8bit=arm.bits == 8, load_in_4bit=arm.bits == 4)
    )


def asked_of(given: settings.Training) -> Asked:
    """What a run of `perl sft|reward|rl` with a new adapter asks for, from its resolved settings. Raises PerlError."""
    flat = settings.flat(given)
    if flat["peft"]:
        raise PerlError(
            f"--peft {flat['peft']}: LoRA and DoRA alone are predicted", "a run of some steps tells its peak"
        )
    stage: Any = settings.command_of(given)
    bits = 4 if flat["load_in_4bit"] else 8 if flat["load_in_8bit"] else 0
    kind = FULL if flat["full"] else ("dora" if flat["use_dora"] else "lora") + (f"-{bits}bit" if bits else "")
    set_apart = dict(item.split("=", 1) for item in flat["set"] if "=" in item)
    asked = set_apart.get("gradient_checkpointing")
    found = Asked(
        stage, kind, int(flat["lora_r"] or 0), str(flat["lora_target_modules"]), flat["dtype"],
        int(flat["per_device_train_batch_size"]), flat["gradient_accumulation_steps"], int(flat["max_length"]),
        checkpointing=None if asked is None else asked.strip().lower() in ("true", "1", "yes", "on"),
    )  # fmt: skip
    if not isinstance(given, settings.Rl):
        return found
    return replace(
        found, max_completion_length=flat["max_completion_length"], algorithm=flat["algorithm"],
        rewards=len(flat["reward"]),
    )  # fmt: skip


def parse_gpu(words: str) -> int:
    """The bytes of `24`, `24GB` or `24GiB`, all GiB as GPUs are sold; raises PerlError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*(gi?b?)?\s*", words, re.IGNORECASE)
    if not found or not float(found[1]) > 0:
        raise PerlError(f"--gpu {clip(words)} is no size of memory", "--gpu 24GB")
    return int(float(found[1]) * GIB)


def parse_arms(words: str, ranks: str) -> list[Arm]:
    """An arm for each name and rank; raises PerlError for an unknown name or a rank that is none."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        raise PerlError(f"--arms: there is no arm {', '.join(unknown) or 'at all'}", f"arms: {', '.join(ARMS)}")
    numbers = [word.strip() for word in ranks.split(",")]
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", number) for number in numbers):
        raise PerlError(f"--lora-r must be whole numbers above 0, comma-separated, not {ranks}", "--lora-r 1,4,16")
    found = []
    for name in names:
        is_dora, bits = ARMS[name]
        found += [Arm(FULL)] if name == FULL else [Arm(name, int(rank), bits, is_dora) for rank in numbers]
    return found


def stock(plan: Plan) -> Plan:
    """The same with a copy of the base for each role, as stock TRL has them."""
    return replace(plan, one_base=False)


def row_of(shape: Shape, plan: Plan, limit: int | None) -> Row:
    """The prediction, and whether and with which batch it fits."""
    found = predict(shape, plan)
    name = (
        plan.arm.name + (f" r={plan.arm.rank}" if plan.arm.rank else "") + ("" if plan.one_base else ", stock copies")
    )
    if limit is None:
        return Row(plan, name, found, None, None)
    return Row(plan, name, found, takes(found, plan) <= limit, largest_batch(shape, plan, limit))


def table(rows: Sequence[Row], limit: int | None = None) -> str:
    """The arms of a stage side by side; against full tuning where it is among them, and against a limit in bytes."""
    header = [*HEADER, *([f"fits {limit / GIB:.3g} GiB", "largest batch"] if limit is not None else [])]
    return plain_table(header, [cells(row, rows) for row in rows])


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
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

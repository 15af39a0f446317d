"""What a run would hold in memory: from its settings to a plan that can be predicted, and its row in a table."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from perlcli import arms, device, settings
from perlcli.arms import Arm
from perlcli.errors import PerlError
from perlcli.memory import optimisers, prediction, trace
from perlcli.memory.prediction import Plan, Prediction, Shape
from perlcli.memory.tracking import CACHE
from perlcli.model import adapters, checks, context, quantised, sources
from perlcli.model.target_modules import target_modules
from perlcli.settings.yaml import parse
from perlcli.text import clip, plain_table

GB, GIB = 10**9, 2**30
HEADER = ("arm", "weights", "adapters", "optimiser", "gradients", "activations", "KV cache", "peak", "of full")
CHECKPOINTING = {"true": True, "false": False}  # anything else: where the run doesn't fit without
KWARGS = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")  # TRL's name, and the one of transformers
LARGE_SHARE = 0.25  # of the peak that an optimiser's state takes, from which on a smaller one is advised
SMALLER = ("paged_adamw_8bit", "adamw_8bit")  # with a GPU to fit on, and without


@dataclass(frozen=True)
class Row:
    """The prediction for one arm of a stage."""

    plan: Plan
    name: str
    prediction: Prediction
    fits: bool | None  # None without a GPU to fit on
    largest: int | None  # batch that fits; 0 if none does, None without a GPU

    @property
    def peak(self) -> int:
        return self.prediction.peak

    @property
    def training(self) -> int:
        """The bytes that a run's `training_mb` measures: the peak since training began; on a CPU, where a process can't
        reset its peak, since it began to load."""
        return self.prediction.training if self.plan.cuda else self.peak


class Model:
    """A model whose runs are predicted; its config is read once. Raises PerlError if it can't be predicted."""

    def __init__(self, name: str | None, *, trust_remote_code: bool = False) -> None:
        self.source = sources.locate(name, trust_remote_code=trust_remote_code)
        checks.modules(self.source, trust_remote_code=trust_remote_code)
        self.shape = prediction.shape_of(self.source.config, self.source.base_name, trust_remote_code=trust_remote_code)
        skeleton = sources.skeleton(self.source, trust_remote_code=trust_remote_code)
        if skeleton is None:
            raise PerlError(f"{self.source.base_name} can't be built without its weights", "name another --model")
        self.skeleton = skeleton

    def row(self, given: settings.Training, limit: int | None = None, *, on_gpu: bool | None = None) -> Row:
        """The prediction for a run with these resolved settings, as `plan` takes them; `limit` is a GPU's bytes."""
        return row_of(self.shape, self.plan(given, self.arm_of(given), on_gpu=on_gpu), limit)

    def counts(self, reward: str) -> bool:
        """Whether a plan counts what this `--reward` takes: an adapter on the model's base, or a function's nothing."""
        if ":" in reward and not Path(reward).expanduser().exists():
            return True
        source = sources.locate(reward, option="--reward", trust_remote_code=self.shape.trust_remote_code)
        return source.adapter is not None and sources.same_base(source, self.source)

    def arm_of(self, given: settings.Training) -> Arm:
        """The arm of a run on this model; if the model is an adapter, with that adapter's rank and modules. Raises
        PerlError for an adapter that is neither LoRA nor DoRA."""
        if given.lora.peft:
            raise PerlError(
                f"--peft {given.lora.peft}: memory is only predicted for LoRA and DoRA",
                "a short run reports its peak: --max-steps 2",
            )
        arm, own = arms.of_run(given), self.source.adapter_config
        if own is None or arm.is_full:
            return arm
        lora = adapters.as_lora(own)
        if lora is None:
            raise PerlError(f"{self.source.name} is {adapters.words(own)}; memory is only predicted for LoRA and DoRA")
        modules = lora.target_modules or []
        names = modules if isinstance(modules, str) else ",".join(sorted(modules))
        kind = arm.kind.replace(arms.LORA, arms.DORA) if lora.use_dora else arm.kind
        return Arm(kind, lora.r, names)

    def plan(self, given: settings.Training, arm: Arm, *, on_gpu: bool | None = None) -> Plan:
        """What `perl STAGE` with these resolved settings would do under an arm. `on_gpu` is None for the machine that
        this runs on. Raises PerlError for modules that the model lacks."""
        if on_gpu is None:
            on_gpu = prediction.device_bytes() is not None
        self.check(given, arm)
        words = arm.target_modules or str(given.lora.lora_target_modules)
        names = () if arm.is_full else target_modules(self.skeleton, words)
        plan = Plan(
            stage=cast(settings.Use, settings.command_of(given)),
            arm=arm,
            targets=names if isinstance(names, str) else tuple(names),
            dtype=_dtype(given.model, on_gpu=on_gpu),
            batch=int(given.train.per_device_train_batch_size or 1),
            length=int(given.data.max_length or 1),
            accumulation=int(given.train.gradient_accumulation_steps or 1),
            checkpointing=CHECKPOINTING.get(str(given.train.gradient_checkpointing)),
            reentrant=is_reentrant(given),
            optim=str(given.train.optim or optimisers.DEFAULT),
            cuda=on_gpu,
        )
        if not isinstance(given, settings.Rl):
            return plan
        return replace(
            plan,
            completion=int(given.sampling.max_completion_length or 1),
            group=math.gcd(plan.batch, given.rl.num_generations or 1) if self._shares(given) else 1,
            reinforce=given.rl.algorithm == "reinforce" and not arm.is_full,
            rewards=len(given.sampling.reward),
            anchor=self.source.adapter is not None,
        )

    def _shares(self, given: settings.Rl) -> bool:
        trust = self.shape.trust_remote_code
        return given.sharing.shared_prompts and trace.shares(self.source.config, trust_remote_code=trust)

    def check(self, given: settings.Training, arm: Arm) -> None:
        """Raises PerlError for what a run under this arm would refuse before it loads the model."""
        source, bits = self.source, quantised.bits_of(self.source.config)
        if bits and arm.bits != bits and not arm.is_full:
            held = f"{source.base_name} is stored in {bits} bits, so that the arm {arm.name} can't be run"
            raise PerlError(held, f"--arms lora-{bits}bit")
        quantised.check(source, given.model, full=arm.is_full)
        if given.data.max_length:
            context.check(source, given.data.max_length, self.skeleton)
        if arm.is_full or source.adapter is not None:
            return
        words = arm.target_modules or str(given.lora.lora_target_modules)
        lora = replace(
            given.lora, lora_r=arm.rank, lora_alpha=arm.rank, use_dora=arm.is_dora, lora_target_modules=words, peft=None
        )
        adapters.try_on(lora, copy.deepcopy(self.skeleton), "CAUSAL_LM")


def is_reentrant(given: settings.Training) -> bool:
    """Whether gradient checkpointing is reentrant: on an 8-bit base, unless `--set` has its kwargs.

    bitsandbytes (0.50) keeps a layer's input as an attribute of the autograd context, which non-reentrant checkpointing
    can't drop: the input of every layer stays in memory
    (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2034). Remove this when bitsandbytes saves it by
    `save_for_backward`; tests/training/test_checkpointing.py fails without it as long as it is needed.
    """
    kwargs = own_kwargs(given)
    if kwargs is None:
        return given.model.load_in_8bit
    return isinstance(kwargs, dict) and kwargs.get("use_reentrant") is True


def own_kwargs(given: settings.Training) -> object:
    """The kwargs of gradient checkpointing that `--set` has; None without."""
    for item in given.train.set:
        name, _, value = item.partition("=")
        if name.strip().replace("-", "_") in KWARGS:
            return parse(value, "--set")
    return None


def _dtype(given: settings.ModelSettings, *, on_gpu: bool) -> str:
    """The dtype of what isn't quantised, on this machine or on a GPU that it may not have."""
    if on_gpu and given.dtype == "auto" and device.kind() == "cpu":
        return "bfloat16"
    return device.dtype_name(given)


def parse_gpu(words: str) -> int:
    """The bytes of `24`, `24GB` or `24GiB`, all GiB as GPUs are sold. Raises PerlError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*(gi?b?)?\s*", words, re.IGNORECASE)
    if not match or not float(match[1]) > 0:
        raise PerlError(f"--gpu must be a size of memory, not {clip(words)}", "--gpu 24GB")
    return int(float(match[1]) * GIB)


def row_of(shape: Shape, plan: Plan, limit: int | None) -> Row:
    """The prediction, and whether and with which batch it fits."""
    chosen = prediction.settled(shape, plan, limit)
    predicted = prediction.predict(shape, chosen)
    name = plan.arm.name if plan.one_base else f"{plan.arm.name}, stock copies"
    if limit is None:
        return Row(chosen, name, predicted, fits=None, largest=None)
    fits = prediction.takes(predicted, chosen) <= limit
    return Row(chosen, name, predicted, fits=fits, largest=prediction.largest_batch(shape, plan, limit))


def advice(shape: Shape, row: Row, limit: int | None) -> str:
    """A line if a smaller optimiser makes a run fit, or makes it much smaller; else empty."""
    share = row.prediction.optimiser / row.peak
    smaller = SMALLER[0] if row.plan.cuda else SMALLER[1]
    if "8bit" in row.plan.optim or (share < LARGE_SHARE and row.fits is not False):
        return ""
    other = row_of(shape, replace(row.plan, optim=smaller), limit)
    if row.fits is False and not other.fits and share < LARGE_SHARE:
        return ""
    saved = f"{_gigabytes(other.peak)} GB instead of {_gigabytes(row.peak)} GB"
    fits = ", and fits" if row.fits is False and other.fits else ""
    return f"{row.name}: --optim {smaller} takes {saved}{fits}"


def table(rows: Sequence[Row], limit: int | None = None) -> str:
    """The arms of a stage side by side, compared with full tuning if it is one of them; `limit` is a GPU's bytes."""
    fits = () if limit is None else ("checkpointing", f"fits {limit / GIB:.3g} GiB", "largest batch")
    return plain_table([*HEADER, *fits], [_cells(row, rows) for row in rows])


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    parts = row.prediction.highest.parts
    full = next((other.peak for other in rows if other.plan.arm.is_full), None)
    sizes = [parts.get(name, 0) for name in ("weights", "adapters", "optimiser", "gradients")]
    cache = max(phase.parts.get(CACHE, 0) for phase in row.prediction.phases)
    sizes += [parts.get("activations", 0) + parts.get("logits", 0), cache, row.peak]
    cells = [row.name, *map(_gigabytes, sizes), f"{row.peak / full:.2f}" if full else ""]
    if row.fits is None:
        return cells
    checkpointing = "on" if row.plan.checkpointing else "off"
    return [*cells, checkpointing, "yes" if row.fits else "no", str(row.largest) if row.largest else "none"]


def _gigabytes(size: int) -> str:
    return f"{size / GB:,.1f}" if size >= 10 * GB else f"{size / GB:.3f}"

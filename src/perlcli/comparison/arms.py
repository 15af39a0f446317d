"""The arms of a comparison: which runs it takes, each as the settings of its stage. Pure: nothing is loaded or run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perlcli import coffee, recipes, settings
from perlcli.errors import PerlError, nearest

FULL, LORA, DORA = "full", "lora", "dora"
KINDS: dict[str, dict[str, Any]] = {
    FULL: {"full": True},
    LORA: {},
    "lora-8bit": {"load_in_8bit": True},
    "lora-4bit": {"load_in_4bit": True},
    DORA: {"use_dora": True},
}
STAGES = ("sft", "reward", "rl")
OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
OWN = (
    "stage",
    "arms",
    "full_learning_rate",
    "repeats",
    "estimate",
    "gpu",
    "lora_r",
    "seed",
    "model",
    "output",
    *settings.ONCE,
)
DEFAULT_RANK: Any = settings.GENERAL["lora_r"]
RATIO = 10  # LoRA's learning rate over full tuning's where one is not given, as in the paper
LONGEST = 80  # letters of a folder's name
MEMORY_STEPS = 8  # steps of a process that runs for its memory alone

Values = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One way to train one model: an arm, before it has run."""

    kind: str
    model: str | None  # None is the embedded base
    rank: int | None = None

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.kind if self.rank is None else f"{self.kind} r={self.rank}"

    @property
    def is_full(self) -> bool:
        """Whether it trains every parameter."""
        return self.kind == FULL


@dataclass(frozen=True)
class Job:
    """One run of a stage, in a process of its own."""

    stage: str
    way: Way
    seed: int
    repeat: int = 1
    for_memory: bool = False  # a few steps, of which the peak counts
    values: Values = field(default_factory=dict)
    folder: Path = Path()  # below the comparison's output

    @property
    def words(self) -> str:
        """The job in a line of progress."""
        parts = [self.stage, *([self.way.model] if self.way.model else []), self.way.name]
        parts.append("memory" if self.for_memory else f"seed {self.seed}")
        return ", ".join(parts + ([f"repeat {self.repeat}"] if self.repeat > 1 else []))


def stages(given: settings.CompareFull) -> tuple[str, ...]:
    """The stages that are compared, in their order. Raises PerlError where none is named."""
    wanted = given.compare.stage
    if wanted is None:
        raise PerlError("STAGE is missing", "perl compare-full reward, or sft, rl, all")
    return STAGES if wanted == "all" else (wanted,)


def models(given: settings.CompareFull) -> list[str | None]:
    """The models that are compared, each on its own; None is the embedded base."""
    names = given.model.model
    return [None] if names is None else list(dict.fromkeys(filter(None, map(str.strip, names.split(",")))))


def ways(given: settings.CompareFull, model: str | None, ranks: Sequence[int | None]) -> list[Way]:
    """The arms for a model, full tuning first. Raises PerlError for a name that is none."""
    names = list(dict.fromkeys(filter(None, map(str.strip, given.compare.arms.split(",")))))
    for name in names:
        if name not in KINDS:
            hint = f"{nearest(name, KINDS)} There are {', '.join(KINDS)}".strip()
            raise PerlError(f"--arms {given.compare.arms}: there is no arm {name}", hint)
    if not names:
        raise PerlError("--arms is empty", f"there are {', '.join(KINDS)}")
    full = [Way(FULL, model)] if FULL in names else []
    return full + [Way(name, model, rank) for name in names if name != FULL for rank in ranks]


def given_values(given: settings.CompareFull, stage: str) -> Values:
    """What the user set for a stage, under what --recipe or the embedded default sets.

    Raises PerlError for an option that no compared stage has.
    """
    defaults = {item.name: item.default for item in settings.options(type(given))}
    named = {name: value for name, value in settings.flat(given).items() if name not in OWN and value != defaults[name]}
    _refuse_foreign(named, stages(given))
    kind = settings.COMMANDS[stage]
    values = recipes.fill(kind, {name: value for name, value in named.items() if name in settings.names(kind)})
    if given.lora.lora_r and given.lora.lora_alpha is None:
        values.pop("lora_alpha", None)  # the recipe's is for the recipe's rank
    is_embedded = given.model.model is None and given.data.data is None and given.recipe.recipe is None
    return settings.layered(values, coffee.SETTINGS[stage]) if is_embedded else values


def _refuse_foreign(named: Values, wanted: Sequence[str]) -> None:
    known = {name for stage in wanted for name in settings.names(settings.COMMANDS[stage])}
    foreign = [f"--{settings.dashed(name)}" for name in named if name not in known]
    if foreign:
        raise PerlError(
            f"{', '.join(foreign)}: no option of perl {' or perl '.join(wanted)}, which is compared here",
            f"perl {wanted[0]} --help lists them",
        )


def ranks(given: settings.CompareFull, values: Mapping[str, Any]) -> list[int | None]:
    """The ranks to compare: the user's, else the recipe's or preset's, else the general default."""
    return list(given.lora.lora_r) or [values.get("lora_r") or DEFAULT_RANK]


def learning_rates(given: settings.CompareFull, stage: str, values: Mapping[str, Any]) -> tuple[float, float]:
    """The peak learning rates of adapters and of full tuning."""
    rate = float(values.get("learning_rate") or settings.LEARNING_RATES[stage][0])
    full = given.compare.full_learning_rate
    return rate, rate / RATIO if full is None else full


def job_values(given: settings.CompareFull, stage: str, way: Way, seed: int, values: Mapping[str, Any]) -> Values:
    """The settings of one run, as its --config file has them; `values` are those that all arms share."""
    rates = learning_rates(given, stage, values)
    left_out = set(OF_ADAPTERS) if way.is_full else {"lora_r"}
    found = {name: value for name, value in values.items() if name not in left_out}
    found |= KINDS[way.kind] | {"seed": seed, "learning_rate": rates[1] if way.is_full else rates[0]}
    if way.model is not None:
        found["model"] = way.model
    if way.rank is not None:
        found["lora_r"] = way.rank
    return found


def for_memory(stage: str, values: Values) -> Values:
    """The same run with some steps and rows to measure on: enough for its peak."""
    steps = min(MEMORY_STEPS, values.get("max_steps") or MEMORY_STEPS)
    rows = {"max_eval_samples": MEMORY_STEPS} if "max_eval_samples" in settings.names(settings.COMMANDS[stage]) else {}
    return {**values, "max_steps": steps, **rows}


def jobs(
    given: settings.CompareFull, stage: str, found: Sequence[tuple[Way, Values]], *, memory: bool
) -> Iterator[Job]:
    """The runs of a stage in their order: for memory where that is measured apart, then by repeat and seed, arms and
    models in turn and every other time the other way round, so that none always runs first."""
    if memory:
        for way, values in found:
            seed = given.run.seed[0]
            yield Job(
                stage, way, seed, 1, True, for_memory(stage, values | {"seed": seed}), place(found, way) / "memory"
            )
    turn = 0
    for repeat in range(1, given.compare.repeats + 1):
        for seed in given.run.seed:
            for way, values in found if turn % 2 == 0 else reversed(found):
                name = f"seed-{seed}" + (f"-repeat-{repeat}" if repeat > 1 else "")
                yield Job(stage, way, seed, repeat, False, values | {"seed": seed}, place(found, way) / name)
            turn += 1


def place(found: Sequence[tuple[Way, Values]], way: Way) -> Path:
    """The folder of an arm: named by its model where there are several."""
    names = list(dict.fromkeys(other.model for other, _ in found))
    folder = Path(slug(way.name))
    return folder if len(names) < 2 else Path(f"{names.index(way.model) + 1}-{slug(str(way.model))}") / folder


def slug(name: str) -> str:
    """A name as a folder's: the end of its last part, letters, digits, dots and dashes alone."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.rstrip("/").rsplit("/", 1)[-1])[-LONGEST:].strip("-.") or "model"

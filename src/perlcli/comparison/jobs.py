"""What a comparison runs: each arm on each model, with the settings of its runs. Nothing is loaded or run here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perlcli import arms, coffee, recipes, settings
from perlcli.arms import FULL, Arm
from perlcli.errors import PerlError
from perlcli.model.weights import ADAPTER_CONFIG

STAGES = ("sft", "reward", "rl")
OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
OWN = (
    {"stage", "arms", "full_learning_rate", "repeats", "estimate", "gpu"}
    | {"lora_r", "seed", "model", "output", *settings.ONCE}  # which each run has set for it
)
DEFAULT_RANK: Any = settings.GENERAL["lora_r"]
RATIO = 10  # of LoRA's learning rate to full tuning's unless one is given, as in the paper
LONGEST = 80  # characters of a folder's name
MEMORY_STEPS = 8  # steps of a run that only measures memory

Values = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """An arm on a model."""

    arm: Arm
    model: str | None  # None for the embedded base
    values: Values  # the settings of its runs, with the first seed
    folder: Path = Path()  # below the stage's

    def is_same(self, other: Planned | Job) -> bool:
        """Whether both are the same arm on the same model."""
        return (self.arm, self.model) == (other.arm, other.model)


@dataclass(frozen=True)
class Job:
    """One run of a stage, in its own process."""

    stage: str
    arm: Arm
    model: str | None
    seed: int
    repeat: int = 1
    for_memory: bool = False  # a few steps, of which only the peak memory counts
    values: Values = field(default_factory=dict)
    folder: Path = Path()  # below the comparison's

    @property
    def words(self) -> str:
        """The job in a line of progress."""
        seed = "memory" if self.for_memory else f"seed {self.seed}"
        repeat = f"repeat {self.repeat}" if self.repeat > 1 else ""
        return ", ".join(filter(None, (self.stage, self.model, self.arm.name, seed, repeat)))


def stages(given: settings.CompareFull) -> tuple[str, ...]:
    """The stages that are compared, in order. Raises PerlError if none is named."""
    wanted = given.compare.stage
    if wanted is None:
        raise PerlError("STAGE is missing", "perl compare-full reward, or sft, rl, all")
    return STAGES if wanted == "all" else (wanted,)


def _models(given: settings.CompareFull) -> list[str | None]:
    """The models that are compared, each with its own arms; None is the embedded base."""
    if given.model.model is None:
        return [None]
    return list(dict.fromkeys(filter(None, map(str.strip, given.model.model.split(",")))))


def plan(given: settings.CompareFull, stage: str) -> list[Planned]:
    """Every arm of a stage on every model, full tuning first. Raises PerlError."""
    shared = given_values(given, stage)
    kinds = sorted(arms.parse_kinds(given.compare.arms), key=lambda kind: kind != FULL)
    names = _models(given)
    planned: list[Planned] = []
    for name in names:
        model = name or shared.get("model")
        chosen = arms.every(kinds, _ranks(given, model, shared), _module_sets(given, model))
        start = shared if model is None else {**shared, "model": model}
        for arm, folder in zip(chosen, _folders(chosen), strict=True):
            planned.append(Planned(arm, model, _run_values(given, stage, arm, start), place(names, name) / folder))
    return planned


def given_values(given: settings.CompareFull, stage: str) -> Values:
    """What the user set for a stage, on top of what --recipe or the embedded default sets. Raises PerlError for an
    option that no compared stage has."""
    defaults = {item.name: item.default for item in settings.options(type(given))}
    named = {name: value for name, value in settings.flat(given).items() if name not in OWN and value != defaults[name]}
    _refuse_foreign(named, stages(given))
    if given.lora.lora_target_modules is not None:
        named["lora_target_modules"] = arms.parse_module_sets(given.lora.lora_target_modules)[0]
    kind = settings.COMMANDS[stage]
    values = recipes.fill(kind, {name: value for name, value in named.items() if name in settings.names(kind)})
    if given.lora.lora_r and given.lora.lora_alpha is None:
        values.pop("lora_alpha", None)  # the recipe's suits the recipe's rank
    is_embedded = given.model.model is None and given.data.data is None and given.recipe.recipe is None
    return settings.layered(values, coffee.SETTINGS[stage]) if is_embedded else values


def _refuse_foreign(named: Values, wanted: Sequence[str]) -> None:
    known = {name for stage in wanted for name in settings.names(settings.COMMANDS[stage])}
    foreign = [f"--{settings.dashed(name)}" for name in named if name not in known]
    if foreign:
        raise PerlError(
            f"{', '.join(foreign)}: not an option of perl {' or perl '.join(wanted)}, which is compared here",
            f"perl {wanted[0]} --help lists the options",
        )


def _ranks(given: settings.CompareFull, model: str | None, values: Mapping[str, Any]) -> list[int | None]:
    """The ranks to compare on a model: the user's, else the recipe's or preset's, else the general default. An adapter
    keeps its own rank (None). Raises PerlError if the user gives ranks for one."""
    if not is_adapter(model):
        return list(given.lora.lora_r) or [values.get("lora_r") or DEFAULT_RANK]
    if given.lora.lora_r:
        _refuse_for_adapter(f"--lora-r {','.join(map(str, given.lora.lora_r))}", str(model), "rank")
    return [None]


def _module_sets(given: settings.CompareFull, model: str | None) -> list[str]:
    """The sets of modules to compare on a model; none if the user gives none. Raises PerlError if the user gives
    several for an adapter, which keeps its own."""
    words = given.lora.lora_target_modules
    sets = [] if words is None else arms.parse_module_sets(words)
    if len(sets) > 1 and is_adapter(model):
        _refuse_for_adapter(f"--lora-target-modules {words}", str(model), "modules")
    return sets


def _refuse_for_adapter(option: str, model: str, what: str) -> None:
    problem = f"{option}: {model} is already an adapter, with its own {what}"
    raise PerlError(problem, f"perl merge {model} --output DIR, then --model DIR")


def is_adapter(model: str | None) -> bool:
    """Whether a model is a local adapter's folder."""
    return model is not None and (Path(model).expanduser() / ADAPTER_CONFIG).exists()


def learning_rates(given: settings.CompareFull, stage: str, values: Mapping[str, Any]) -> tuple[float, float]:
    """The peak learning rates of adapters and of full tuning."""
    rate = float(values.get("learning_rate") or settings.LEARNING_RATES[stage][0])
    full = given.compare.full_learning_rate
    return rate, rate / RATIO if full is None else full


def _run_values(given: settings.CompareFull, stage: str, arm: Arm, shared: Mapping[str, Any]) -> Values:
    """The settings of an arm's runs, as a --config file has them; `shared` are those that all arms have."""
    of_adapters, of_full = learning_rates(given, stage, shared)
    left_out = OF_ADAPTERS if arm.is_full else ("lora_r",)
    values = {name: value for name, value in shared.items() if name not in left_out}
    steering = {"seed": given.run.seed[0], "learning_rate": of_full if arm.is_full else of_adapters}
    return {**values, **arm.options, **steering}


def for_memory(values: Values) -> Values:
    """The same run with few steps and few rows to evaluate, which is enough for its peak memory."""
    steps = min(MEMORY_STEPS, values.get("max_steps") or MEMORY_STEPS)
    return {**values, "max_steps": steps, "max_eval_samples": MEMORY_STEPS}


def jobs(given: settings.CompareFull, stage: str, planned: Sequence[Planned], *, memory: bool) -> Iterator[Job]:
    """The runs of a stage in order: first those for memory if that is measured separately, then by repeat and seed.
    Every other round goes through arms and models in reverse, so that none always runs first."""
    if memory:
        for each in planned:
            values, folder = for_memory(each.values), each.folder / "memory"
            yield Job(stage, each.arm, each.model, given.run.seed[0], for_memory=True, values=values, folder=folder)
    rounds = [(repeat, seed) for repeat in range(1, given.compare.repeats + 1) for seed in given.run.seed]
    for turn, (repeat, seed) in enumerate(rounds):
        name = f"seed-{seed}-repeat-{repeat}" if repeat > 1 else f"seed-{seed}"
        for each in planned if turn % 2 == 0 else reversed(planned):
            values, folder = {**each.values, "seed": seed}, each.folder / name
            yield Job(stage, each.arm, each.model, seed, repeat, values=values, folder=folder)


def place(names: Sequence[str | None], name: str | None) -> Path:
    """The folder of a model's arms, below the stage's: its number and name if several models are compared."""
    return Path(f"{names.index(name) + 1}-{slug(str(name))}") if len(names) > 1 else Path()


def _folders(chosen: Sequence[Arm]) -> list[str]:
    """A folder's name for each arm, with a number if two names would be the same."""
    names = [slug(arm.name) for arm in chosen]
    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names, 1)]


def slug(name: str) -> str:
    """A name as a folder's: the end of its last part, with letters, digits, dots and dashes only."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.rstrip("/").rsplit("/", 1)[-1])[-LONGEST:].strip("-.") or "model"

"""The ways to train: full tuning, and LoRA or DoRA on a base that may be quantised to 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perlcli import settings
from perlcli.errors import PerlError, nearest
from perlcli.settings import ATTENTION

FULL, LORA, DORA = "full", "lora", "dora"
KINDS = (FULL, LORA, "lora-8bit", "lora-4bit", DORA, "dora-8bit", "dora-4bit")
MODULE_SETS = (ATTENTION, "all-linear")  # the sets of modules that have a name


@dataclass(frozen=True)
class Arm:
    """One way to train a model."""

    kind: str  # one of KINDS
    rank: int | None = None  # None for full tuning, and for an adapter that keeps its own
    target_modules: str | None = None  # None unless several sets are compared

    @property
    def name(self) -> str:
        """What tables and reports call it, such as `lora r=16 all-linear`."""
        rank = None if self.rank is None else f"r={self.rank}"
        return " ".join(part for part in (self.kind, rank, self.target_modules) if part is not None)

    @property
    def is_full(self) -> bool:
        return self.kind == FULL

    @property
    def is_dora(self) -> bool:
        return self.kind.startswith(DORA)

    @property
    def bits(self) -> int:
        """8 or 4 if the base is quantised, else 0."""
        return int(self.kind.partition("-")[2].removesuffix("bit") or 0)

    @property
    def options(self) -> dict[str, object]:
        """The options of `perl sft`, `reward` and `rl` that make this arm."""
        if self.is_full:
            return {"full": True}
        options: dict[str, object] = {f"load_in_{self.bits}bit": True} if self.bits else {}
        options |= {"use_dora": True} if self.is_dora else {}
        options |= {"lora_r": self.rank, "lora_target_modules": self.target_modules}
        return {name: value for name, value in options.items() if value is not None}


def of_run(given: settings.Training) -> Arm:
    """The arm that a run's resolved settings describe, a new LoRA or DoRA adapter unless it is full tuning."""
    if given.lora.full:
        return Arm(FULL)
    kind = DORA if given.lora.use_dora else LORA
    if given.model.load_in_8bit:
        kind += "-8bit"
    elif given.model.load_in_4bit:
        kind += "-4bit"
    return Arm(kind, given.lora.lora_r)


def parse_kinds(words: str) -> list[str]:
    """The kinds in a comma-separated list, each once. Raises PerlError for an unknown one, and for none."""
    kinds, known = _parts(words, ","), f"The arms are {', '.join(KINDS)}"
    if not kinds:
        raise PerlError("--arms is empty", known)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise PerlError(f"--arms: unknown arm {', '.join(unknown)}", f"{nearest(unknown[0], KINDS)} {known}".strip())
    return kinds


def parse_module_sets(words: str) -> list[str]:
    """The sets of modules in `attention,all-linear` or `attention;q_proj,v_proj`, each as one run takes it. Raises
    PerlError if a named set and module names are mixed without a semicolon, and for none."""
    sets: list[str] = []
    for part in _parts(words, ";"):
        names = _parts(part, ",")
        named = [name for name in names if name in MODULE_SETS]
        if named and len(named) < len(names):
            modules = ",".join(name for name in names if name not in MODULE_SETS)
            problem = f"--lora-target-modules {part} mixes {named[0]}, which is a set of modules, with module names"
            raise PerlError(problem, f'put a semicolon between sets: "{";".join([*named, modules])}"')
        sets += named or ([",".join(names)] if names else [])
    if not sets:
        raise PerlError("--lora-target-modules is empty", "--lora-target-modules attention")
    return list(dict.fromkeys(sets))


def _parts(words: str, separator: str) -> list[str]:
    parts = dict.fromkeys(part.strip() for part in words.split(separator))
    return [part for part in parts if part]


def every(kinds: Sequence[str], ranks: Sequence[int | None], module_sets: Sequence[str] = ()) -> list[Arm]:
    """An arm for each kind, with adapters also for each rank and, if there are several, each set of modules."""
    modules = module_sets if len(module_sets) > 1 else [None]
    arms: list[Arm] = []
    for kind in kinds:
        if kind == FULL:
            arms.append(Arm(FULL))
        else:
            arms += [Arm(kind, rank, names) for rank in ranks for names in modules]
    return arms

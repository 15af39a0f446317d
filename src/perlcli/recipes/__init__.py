"""Recipes: the paper's tasks as YAML files, each with the values that every stage takes.

A recipe has some texts for the reader (TEXTS) and a section for each stage that it knows. Its values lie under those
that the user gives: command line, then --config, then recipe, then the general defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlcli import settings
from perlcli.errors import PerlError, listing, nearest
from perlcli.settings.yaml import checked, read_mapping, read_text
from perlcli.text import clip, shorten

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")
TEXTS = ("title", "paper", "data", "prompt", "evaluation", "bring")
STAGES: dict[str, type[Any]] = {name: settings.COMMANDS[name] for name in ("sft", "reward", "rl", "eval")}
LENGTH = {"max_steps", "num_train_epochs"}
# What belongs to the source that `data` names.
OF_DATA = {"data_format", "subset", "split", "eval_data", "shp_score_ratio", "shp_per_post"}


@dataclass(frozen=True)
class Recipe:
    """A recipe as its file has it, every value checked."""

    name: str
    title: str
    stages: dict[str, dict[str, Any]]


def names() -> list[str]:
    """The names of the recipes that perlcli brings."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a recipe, by its name or its own path. Raises PerlError."""
    if wrong := settings.misfit("recipe", name):
        raise PerlError(f"The recipe {wrong}")
    if name in names():
        return FOLDER / f"{name}.yaml"
    if name.endswith(SUFFIXES) or Path(name).expanduser().is_file():
        return Path(name).expanduser()
    hint = f"{nearest(name, names())} `perl recipes` lists them; your own is named by its file, NAME.yaml".strip()
    raise PerlError(f"There is no recipe {name}", hint)


def text(name: str) -> str:
    """A recipe's file as it stands. Raises PerlError."""
    return read_text(find(name), "the recipe")


def read(name: str) -> Recipe:
    """A recipe by its name or file. Raises PerlError that tells every fault in the file."""
    path = find(name)
    content = read_mapping(path, "--recipe")
    stages: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    for key, value in content.items():
        if key in STAGES:
            stages[key], wrong = _section(path, key, value)
            faults += wrong
        elif key not in TEXTS:
            shown = clip(key) if isinstance(key, str) else shorten(key)
            faults.append(f"{path}: unknown key {shown}. {nearest(shown, (*TEXTS, *STAGES))}".rstrip())
        elif not isinstance(value, str):
            faults.append(f"{path}: {key} must be text")
    if faults:
        raise PerlError(listing(faults), f"a recipe has {', '.join(TEXTS)} and the stages {', '.join(STAGES)}")
    return Recipe(name, content.get("title", ""), stages)


def _section(path: Path, stage: str, content: Any) -> tuple[dict[str, Any], list[str]]:
    """The values of a recipe's stage, and what is wrong with them."""
    place = f"{path}, {stage}"
    if not isinstance(content, dict):
        return {}, [f"{place}: must hold `name: value` lines, not {shorten(content)}"]
    values, faults = checked(STAGES[stage], content, place)
    if "recipe" in values:
        faults.append(f"{place}: a recipe can't name a recipe")
    return values, faults


def fill(stage: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given values, and for what isn't given those of the recipe that they name. Raises PerlError."""
    name = given.get("recipe")
    if (
        name is None or stage not in STAGES.values() or set(settings.names(stage)) <= {*given, *settings.ONCE}
    ):  # as a run's settings.yaml: whole
        return dict(given)
    recipe, command = read(name), settings.command_of(stage)
    if command not in recipe.stages:
        known = ", ".join(recipe.stages) or "none"
        raise PerlError(f"The recipe {name} has no stage {command}, only {known}", f"perl recipes show {name}")
    values = _left(recipe.stages[command], given)
    merged = {**values, **given}
    if "set" in values:  # the TRL config's fields one by one, as the other values
        own = {item.partition("=")[0] for item in given.get("set", ())}
        kept = (item for item in values["set"] if item.partition("=")[0] not in own)
        merged["set"] = (*kept, *given.get("set", ()))
    return merged


def _left(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values without those that another choice of the user's makes void."""
    void: set[str] = set()
    if LENGTH & set(given):
        void |= LENGTH
    if given.get("data") is not None:
        void |= OF_DATA
    if given.get("full"):  # no adapter, and the learning rates of recipes are for one
        void |= {"learning_rate"}
    if given.get("full") or given.get("peft"):
        void |= {name for name in values if name.startswith("lora_")}
    return {name: value for name, value in values.items() if name not in void}


def check_made(name: str, option: str, folder: str | None) -> None:
    """Raise PerlError where a stage needs the folder of an earlier one that hasn't run, and say what to type."""
    if folder and not Path(folder).expanduser().exists() and (maker := _maker(name, folder)):
        raise PerlError(f"{option} {folder} is not there yet", f"{maker} makes it; or give another {option}")


def _maker(name: str, folder: str) -> str | None:
    """The command that leaves a folder, by this recipe or another that perlcli brings."""
    for each in (name, *names()):
        with suppress(PerlError):  # a run's settings.yaml outlives the file of its recipe
            for stage, values in read(each).stages.items():
                if values.get("output") == folder:
                    return f"perl {stage} --recipe {each}"
    return None


def table() -> str:
    """The recipes that perlcli brings, a line each."""
    known = names()
    width = max(map(len, known), default=0)
    return "\n".join(f"{name.ljust(width)}  {read(name).title}" for name in known)

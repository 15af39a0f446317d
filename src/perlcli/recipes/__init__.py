"""Recipes: the paper's tasks as YAML files, with the settings of every stage.

A recipe has some texts for the reader (TEXTS) and a section of settings for each of its stages. `settings.precedence`
says which value wins where the user gives another.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlcli import settings
from perlcli.errors import PerlError, listing, nearest
from perlcli.settings.declaring import Values
from perlcli.settings.yaml import checked, read_mapping, read_text
from perlcli.text import clip, shorten

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")
TEXTS = ("title", "paper", "data", "prompt", "evaluation", "bring")
STAGES: dict[str, type[Any]] = {name: settings.COMMANDS[name] for name in ("sft", "reward", "rl", "eval")}


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe's file, with every value checked."""

    name: str
    title: str
    stages: dict[str, dict[str, Any]]


def names() -> list[str]:
    """The names of the recipes that come with perlcli."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a recipe, given its name or path. Raises PerlError if there is none."""
    if fault := settings.place_fault(name):
        raise PerlError(f"--recipe {fault}")
    if name in names():
        return FOLDER / f"{name}.yaml"
    if name.endswith(SUFFIXES) or Path(name).expanduser().is_file():
        return Path(name).expanduser()
    hint = f"{nearest(name, names())} `perl recipes` lists them; for a recipe of your own, give its file, NAME.yaml"
    raise PerlError(f"No such recipe: {name}", hint.strip())


def text(name: str) -> str:
    """The content of a recipe's file. Raises PerlError if it cannot be read."""
    return read_text(find(name), "the recipe")


def read(name: str) -> Recipe:
    """A recipe, given its name or file. Raises PerlError that lists every fault in the file."""
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
            faults.append(f"{path}: unknown key: {shown}. {nearest(shown, (*TEXTS, *STAGES))}".rstrip())
        elif not isinstance(value, str):
            faults.append(f"{path}: {key} must be text")
    if faults:
        raise PerlError(listing(faults), f"a recipe may contain {', '.join(TEXTS)} and the stages {', '.join(STAGES)}")
    return Recipe(name, str(content.get("title", "")), stages)


def _section(path: Path, stage: str, content: object) -> tuple[dict[str, Any], list[str]]:
    """The values of a recipe's stage, and its faults."""
    place = f"{path}, {stage}"
    if not isinstance(content, dict):
        return {}, [f"{place}: must contain `name: value` lines, not {shorten(content)}"]
    values, faults = checked(STAGES[stage], content, place)
    if "recipe" in values:
        faults.append(f"{place}: a recipe can't name another recipe")
    return values, faults


def fill(stage: type[Any], given: Values) -> dict[str, Any]:
    """The given values over those of the recipe that they name. Raises PerlError if the recipe is not valid or does not
    have the stage."""
    name = given.get("recipe")
    is_complete = set(settings.names(stage)) <= {*given, *settings.ONCE}  # as in the settings.yaml of a run
    if name is None or stage not in STAGES.values() or is_complete:
        return dict(given)
    recipe, command = read(name), settings.command_of(stage)
    if command not in recipe.stages:
        known = ", ".join(recipe.stages) or "none"
        raise PerlError(f"Recipe {name} has no stage {command}; its stages: {known}", f"perl recipes show {name}")
    values = dict(recipe.stages[command])
    if given.get("full"):
        values.pop("learning_rate", None)  # the learning rates of recipes are for adapters
    return settings.layered(given, values)


def check_made(name: str, option: str, folder: str | None) -> None:
    """Raises PerlError if a stage needs the folder of an earlier stage that has not run, with the command to run."""
    if folder is None or Path(folder).expanduser().exists():
        return
    if maker := _maker(name, folder):
        raise PerlError(f"{option} {folder} does not exist yet", f"`{maker}` creates it; or give another {option}")


def _maker(name: str, folder: str) -> str | None:
    """The command that creates a folder, with this recipe or another that comes with perlcli."""
    for each in (name, *names()):
        with suppress(PerlError):  # the recipe's file may be gone by the time its run is used
            for stage, values in read(each).stages.items():
                if values.get("output") == folder:
                    return f"perl {stage} --recipe {each}"
    return None


def table() -> str:
    """The recipes that come with perlcli, one per line."""
    known = names()
    width = max(map(len, known), default=0)
    return "\n".join(f"{name.ljust(width)}  {read(name).title}" for name in known)

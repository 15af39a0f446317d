"""Settings from YAML files, read and checked against the options of a command. Errors name the file."""

from __future__ import annotations

from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

from perlcli import settings
from perlcli.errors import SHOWN_FAULTS, PerlError, line, listing, nearest, reason
from perlcli.settings.types import convert, describe, fits
from perlcli.text import clip, shorten

LONGEST_PATH = 4096  # of letters that are shown: what a system takes
LARGEST = 100_000  # bytes: ten times the longest recipe, and what YAML in Python takes a second or two to parse


def read_config(stage: type[Any], path: Path) -> dict[str, Any]:
    """The settings in a YAML file; raises PerlError that names every unknown key and every wrong type."""
    values, faults = checked(stage, read_mapping(path, "--config"), str(path))
    if faults:
        raise PerlError(listing(faults), f"perl {settings.command_of(stage)} --help lists the names")
    return values


def read_mapping(path: Path, option: str) -> dict[Any, Any]:
    """The `name: value` lines of a YAML file that `option` names; raises PerlError for a file that holds others."""
    content = parse(read_text(path, option), str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise PerlError(f"{path} must hold `name: value` lines, not a {type(content).__name__}")
    return content


def read_text(path: Path, option: str) -> str:
    """The text of a file that `option` names; raises PerlError for one that can't be read, or is too large for YAML."""
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(LARGEST + 1)  # no more, as it may be a disk image
        if len(content) > LARGEST:
            raise PerlError(f"Can't read {option} {path}: longer than {LARGEST:,} bytes, so it holds no settings")
        return content.decode("utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: no text; RuntimeError: a home that nobody has
        raise PerlError(f"Can't read {option} {clip(str(path), LONGEST_PATH)}: {reason(error)}") from error


def parse(text: str, name: str) -> Any:
    """What YAML holds, of plain types alone; raises PerlError, which names it `name`, for what is none, is nested too
    deeply, holds itself, or would grow too large by its aliases."""
    import yaml  # 20 ms that a call without a file needn't pay

    from perlcli.settings.yaml_loader import Loader

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: of a \\U that is no character
        raise PerlError(f"{name} is not valid YAML: {line(error, 600)}") from error


def checked(stage: type[Any], content: Mapping[Any, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """The values that are settings of the stage, as their types, and a line for every fault, which names the place."""
    known = {item.name: item for item in settings.options(stage)}
    values: dict[str, Any] = {}
    faults: list[str] = []
    for key, value in content.items():
        shown = clip(key) if isinstance(key, str) else shorten(key)
        name = shown.replace("-", "_")
        name += "_" if iskeyword(name) else ""
        if name not in known:
            hint = nearest(name, known) if len(faults) < SHOWN_FAULTS else ""
            faults.append(f"{place}: unknown key {shown}. {hint}".rstrip())
        elif name in values:
            faults.append(f"{place}: {shown} stands twice, once with another spelling")
        elif not fits(value, known[name].type):
            faults.append(f"{place}: {shown} must be {describe(known[name].type)}, not {shorten(value)}")
        else:
            values[name] = convert(value, known[name].type)
            if unusable := settings.misfit(name, values[name]):
                faults.append(f"{place}: {shown} {unusable}")
    return values, faults

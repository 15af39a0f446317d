"""Reads settings from YAML files and checks them against the options of a command. Errors name the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

from perlcli import settings
from perlcli.errors import SHOWN_FAULTS, PerlError, line, listing, nearest, reason
from perlcli.settings.faults import limit_fault, misfit, type_fault
from perlcli.settings.types import convert
from perlcli.text import clip, shorten

KWARGS = ("chat_template_kwargs", "reward_kwargs")  # text on the command line, JSON or YAML; mappings in a file
LONGEST_PATH = 4096  # characters shown of a path
LARGEST = 100_000  # bytes: ten times the longest recipe, and as much as PyYAML parses in a second or two


def read_config(stage: type[Any], path: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises PerlError that lists every unknown key and every wrong value."""
    values, faults = checked(stage, read_mapping(path, "--config"), str(path))
    if faults:
        raise PerlError(listing(faults), f"perl {settings.command_of(stage)} --help lists the options")
    return values


def read_mapping(path: Path, option: str) -> dict[object, object]:
    """The `name: value` lines of the YAML file that `option` names. Raises PerlError if the file cannot be read or has
    other content."""
    content = parse(read_text(path, option), str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise PerlError(f"{path} must contain `name: value` lines, not a {type(content).__name__}")
    return content


def read_text(path: Path, option: str) -> str:
    """The text of the file that `option` names. Raises PerlError if it cannot be read, or is too large for settings."""
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(LARGEST + 1)  # not all of it: it may be a disk image
        if len(content) > LARGEST:
            raise PerlError(f"Can't read {option} {path}: larger than {LARGEST:,} bytes, too large for settings")
        return content.decode("utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: not UTF-8; RuntimeError: no such home folder
        raise PerlError(f"Can't read {option} {clip(str(path), LONGEST_PATH)}: {reason(error)}") from error


def parse(text: str, name: str) -> object:
    """The content of a YAML text, in plain types. Raises PerlError that starts with `name` if the text is not valid
    YAML, is nested too deeply, contains itself, or would grow too large through its aliases."""
    import yaml  # takes 20 ms, which a call without a file need not pay

    from perlcli.settings.yaml_loader import Loader

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: from a \U escape out of range
        raise PerlError(f"{name} is not valid YAML: {line(error, 600)}") from error


def _as_text(given: object) -> object:
    """Keyword arguments as they are on the command line."""
    if isinstance(given, list):
        return [_as_text(item) for item in given]
    return json.dumps(given) if isinstance(given, dict) else given


def checked(stage: type[Any], content: Mapping[object, object], place: str) -> tuple[dict[str, Any], list[str]]:
    """The values that are settings of the stage, as their types, and a line for every fault. Each line starts with
    `place`, which says where the content is."""
    known = {item.name: item for item in settings.options(stage)}
    values: dict[str, Any] = {}
    faults: list[str] = []
    for key, given in content.items():
        value = _as_text(given) if isinstance(key, str) and key.replace("-", "_") in KWARGS else given
        shown = clip(key) if isinstance(key, str) else shorten(key)
        name = shown.replace("-", "_")
        name += "_" if iskeyword(name) else ""
        if name not in known:
            hint = nearest(name, known) if len(faults) < SHOWN_FAULTS else ""
            faults.append(f"{place}: unknown key: {shown}. {hint}".rstrip())
        elif name in values:
            faults.append(f"{place}: duplicate key: {shown}, with dashes and with underscores")
        elif fault := type_fault(known[name], value):
            faults.append(f"{place}: {shown} {fault}")
        else:
            values[name] = convert(value, known[name].type)
            if fault := misfit(known[name], values[name]) or limit_fault(known[name], values[name]):
                faults.append(f"{place}: {shown} {fault}")
    return values, faults

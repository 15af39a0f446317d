"""Reads settings from YAML files and checks them against the options of a command. Errors name the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

from perlcli import settings
from perlcli.errors import SHOWN_FAULTS, PerlError, line, listing, reason
from perlcli.settings.declaring import Option
from perlcli.settings.faults import limit_fault, misfit, type_fault
from perlcli.settings.naming import PASSED
from perlcli.settings.synonyms import Translation, set_items, translate
from perlcli.settings.types import convert
from perlcli.settings.unknown_names import meaning
from perlcli.text import clip, shorten

KWARGS = ("chat_template_kwargs", "reward_kwargs")  # text on the command line, JSON or YAML; mappings in a file
COMMAS = ("lora_target_modules", "report_to", "columns", "label_map")  # texts with commas; lists in a file
EQUALS = ("columns", "label_map")  # NAME=VALUE, comma-separated; mappings in a file
LONGEST_PATH = 4096  # characters shown of a path
LARGEST = 100_000  # bytes: ten times the longest recipe, and as much as PyYAML parses in a second or two


def read_config(stage: type[Any], path: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises PerlError that lists every unknown key and every wrong value."""
    return read_translated(stage, path)[0]


def read_translated(stage: type[Any], path: Path) -> tuple[dict[str, Any], Translation]:
    """The settings in a YAML file, and which of its names are of another tool. Raises PerlError as `read_config`."""
    values, read = translated(stage, path)
    if read.faults:
        raise PerlError(listing(read.faults), f"perl {settings.command_of(stage)} --help lists the options")
    return values, read


def translated(stage: type[Any], path: Path) -> tuple[dict[str, Any], Translation]:
    """The settings in a YAML file, and what was found in it, faults included. Raises PerlError if it can't be read."""
    command, names = settings.command_of(stage), settings.names(stage)
    content = read_mapping(path, "--config")
    read = translate(command, names, content.items(), f"{path}: ")
    values, faults = checked(stage, dict(read.own), str(path))
    added, wrong = checked(stage, {name: value for name, value in read.added.items() if name != PASSED}, str(path))
    read.faults = [*faults, *wrong, *read.faults]
    values |= added
    if items := read.added.get(PASSED):
        values[PASSED] = (*values.get(PASSED, ()), *items)
    return values, read


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


def _as_typed(name: str, given: object) -> object:
    """A value as it is on the command line: keyword arguments as JSON, and lists and mappings with commas. Raises
    ValueError for one that can't be written so."""
    if name == PASSED:
        return set_items(given) if isinstance(given, dict) else given
    if name in KWARGS:
        return _as_json(given)
    if isinstance(given, dict) and name in EQUALS:
        given = [f"{_part(key)}={_part(value)}" for key, value in given.items()]
    elif isinstance(given, list) and name in COMMAS:
        given = [_part(item, ",") for item in given]
    if name == "report_to" and given == []:
        return "none"
    return ",".join(given) if isinstance(given, list) and name in COMMAS else given


def _part(value: object, separators: str = ",=") -> str:
    """An item of a list or mapping. Raises ValueError for other types, and for a separator in it."""
    if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value):
        raise ValueError(f"must have texts as its items, not {shorten(value)} (put words like yes and no in quotes)")
    if any(separator in str(value) for separator in separators):
        raise ValueError(f"can't have an item with {' or '.join(separators)} in it: {shorten(value)}")
    return str(value)


def _as_json(given: object) -> object:
    if isinstance(given, list):
        return [_as_json(item) for item in given]
    return json.dumps(given) if isinstance(given, dict) else given


def checked(stage: type[Any], content: Mapping[Any, object], place: str) -> tuple[dict[str, Any], list[str]]:
    """The values that are settings of the stage, as their types, and a line for every fault. Each line starts with
    `place`, which says where the content is."""
    known = {item.name: item for item in settings.options(stage)}
    command = settings.command_of(stage)
    values: dict[str, Any] = {}
    faults: list[str] = []
    for key, given in content.items():
        shown = clip(key) if isinstance(key, str) else shorten(key)
        name = shown.replace("-", "_")
        name += "_" if iskeyword(name) else ""
        if name not in known:
            hint = meaning(name, command, known) if len(faults) < SHOWN_FAULTS else ""
            faults.append(f"{place}: unknown key: {shown}. {hint}".rstrip())
        elif name in values:
            faults.append(f"{place}: duplicate key: {shown}, with dashes and with underscores")
        elif fault := _read(known[name], given, values):
            faults.append(f"{place}: {shown} {fault}")
    return values, faults


def _read(item: Option, given: object, values: dict[str, Any]) -> str:
    """Adds the value of an option to the values; what is wrong with it, empty if nothing."""
    try:
        value = _as_typed(item.name, given)
    except ValueError as error:
        return str(error)
    if fault := type_fault(item, value):
        return fault
    values[item.name] = convert(value, item.type)
    return misfit(item, values[item.name]) or limit_fault(item, values[item.name])
